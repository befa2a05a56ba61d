"""Scaling laws: the loss of an SAE by its size, and what its latents are spent on.

The joint law of Gao et al. 2024 (arXiv 2406.04093, eq. 3), of converged TopK SAEs:

    L(n, k) = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n)
              + exp(zeta + eta ln k)                               (irreducible)

so at a fixed k the reducible part is a power law in n, of exponent beta_n + gamma ln k.

The capacity model (Michaud et al. 2025, arXiv 2509.02565, after Brill 2024) lets each
latent serve one feature. Feature i occurs with frequency p_i and costs L(n_i) when it
occurs, n_i being the latents it was given, and training is taken to find

    min  sum_i p_i L(n_i)   over   sum_i n_i = N .

With p_i ~ i^-(1 + alpha) and L(n) ~ n^-beta, equal marginal gains p_i L'(n_i) give
n_i ~ i^-((1 + alpha) / (1 + beta)). If alpha < beta, the latents spread over about N
features. If beta < alpha, a few frequent features (manifolds, tiled ever more finely)
swallow most of them, and ever fewer features are discovered for a latent.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class JointLaw:
    """The joint law's six constants; its methods broadcast over n_latents and k."""

    alpha: float
    beta_k: float
    beta_n: float
    gamma: float
    zeta: float
    eta: float

    def expected_loss(self, n_latents: ArrayLike, k: ArrayLike) -> Array:
        """Normalised mean square error at convergence, irreducible part included."""
        log_n, log_k = np.log(n_latents), np.log(k)
        exponent_of_n = self.beta_n + self.gamma * log_k
        reducible = np.exp(self.alpha + self.beta_k * log_k + exponent_of_n * log_n)
        return reducible + self.irreducible_loss(k)

    def irreducible_loss(self, k: ArrayLike) -> Array:
        """What remains however many latents there are."""
        return np.exp(self.zeta + self.eta * np.log(k))


# Of SAEs of GPT-4, in the normalised error of Gao et al.
GPT4_LAW = JointLaw(
    alpha=-0.50, beta_k=0.26, beta_n=-0.017, gamma=-0.042, zeta=-1.32, eta=-0.085
)


def allocation(
    frequencies_f: Array, loss_of_n: Callable[[Array], Array], n_latents: int
) -> NDArray[np.int64]:
    """How many latents each of F features gets in the optimum; they sum to n_latents.

    `loss_of_n` takes a vector of counts 0, 1, ... to the loss of a feature that was
    given so many. It must fall, and be convex: then giving every latent to the feature
    that gains most, p_i (L(n) - L(n + 1)), is optimal. Ties go to the most frequent
    feature, and among equals to the first. Memory is O(F + N ln N).
    ValueError where an argument is not as said.
    """
    frequencies_f = np.asarray(frequencies_f, np.float64)
    _check_frequencies(frequencies_f, n_latents)
    gains_n = _gains(loss_of_n, n_latents)
    by_frequency = np.argsort(-frequencies_f, kind="stable")[:n_latents]
    # A feature has no more latents than a more frequent one: rank j, from 1, has at
    # most N / j. Few enough candidates (rank, n) are left to sort them all.
    limits = n_latents // np.arange(1, len(by_frequency) + 1)
    ranks = np.repeat(np.arange(len(by_frequency)), limits)
    counts = np.arange(len(ranks)) - np.repeat(np.cumsum(limits) - limits, limits)
    gains = frequencies_f[by_frequency][ranks] * gains_n[counts]
    best = np.argsort(-gains, kind="stable")[:n_latents]
    return np.bincount(by_frequency[ranks[best]], minlength=len(frequencies_f))


def predicted_exponents(alpha: float, beta: float) -> tuple[float, float]:
    """Exponents of N in the number of features with a latent, and in the loss.

    Of frequencies i^-(1 + alpha) and losses n^-beta, both > 0, for large N; where alpha
    and beta are close they are approached slowly.

        alpha < beta  (benign)         1                            -alpha
        beta < alpha  (pathological)   (1 + beta) / (1 + alpha)     -beta
    """
    if not (alpha > 0 and beta > 0):
        raise ValueError(f"alpha {alpha} and beta {beta} must both be above 0")
    return min(1.0, (1 + beta) / (1 + alpha)), -min(alpha, beta)


def _check_frequencies(frequencies_f: Array, n_latents: int) -> None:
    if frequencies_f.ndim != 1 or not len(frequencies_f):
        raise ValueError(
            f"frequencies have shape {frequencies_f.shape}: give one for each feature"
        )
    is_bad_f = ~(np.isfinite(frequencies_f) & (frequencies_f >= 0))
    if is_bad_f.any():
        first = int(np.flatnonzero(is_bad_f)[0])
        raise ValueError(
            f"frequency {first} is {frequencies_f[first]}: give finite numbers >= 0"
        )
    if n_latents < 0:
        raise ValueError(f"n_latents is {n_latents}: give 0 or more")


def _gains(loss_of_n: Callable[[Array], Array], n_latents: int) -> Array:
    """What the latent after n others saves, for n from 0: never negative, never rising.

    Where the curve is flat, rounding makes the differences rise and fall; what is no
    more than rounding is levelled.
    """
    losses_n = np.asarray(loss_of_n(np.arange(n_latents + 1, dtype=float)))
    gains_n = losses_n[:-1] - losses_n[1:]
    level_n = np.maximum(np.minimum.accumulate(gains_n), 0)
    rounding = 4 * np.finfo(np.float64).eps * np.abs(losses_n).max()
    is_bad_n = ~(np.abs(gains_n - level_n) <= rounding)
    if is_bad_n.any():
        first = int(is_bad_n.argmax())
        raise ValueError(
            f"loss_of_n saves {gains_n[first]:g} by latent {first + 1}: it must fall, "
            "and each latent must save no more than the one before"
        )
    return level_n
