"""Tasks as an SAE sees them: codes of their rows, and a linear probe of each.

A probe is a logistic regression of whole rows x, in activation space, so its logit is
affine in x and a latent's share of it is a number:

    logit(x) = p·x + b;   latent l of value v gives v s (d_l·p)

with d_l its decoder row and s the scale of the row's normalisation. A latent is taken
out of rows by setting it to its mean over the train rows, as a channel can be: its
share of the logit becomes the mean of its shares. The SAE's error stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from sae_jax import logistic
from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import Context, Sae
from sae_jax.evals.task_rows import TaskRows, measure_task_rows
from sae_jax.mesh import replicated
from sae_jax.progress import Progress

Floats = NDArray[np.floating[Any]]

RIDGE = 0.01  # of probes of whole rows, on standardised channels
NS = (1, 5, 20)  # latents or channels that metrics take out
_SHARE_ROWS = 256  # of which a multiple is looked at, so that few programs serve


@dataclass(frozen=True, eq=False)
class Side:
    """The train or the held-out rows of a task, N of them."""

    acts_nd: Floats
    labels_n: NDArray[np.bool_]
    texts_n: NDArray[np.int64]
    values_nk: Floats  # of the code, times the row's scale
    indices_nk: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Concept:
    """A task with its probe: logit = acts · slope + intercept."""

    name: str
    train: Side
    heldout: Side
    slope_d: Floats
    intercept: float

    def logits(self, acts_nd: Floats) -> Floats:
        """The logits of rows in activation space."""
        return acts_nd @ self.slope_d + np.float32(self.intercept)


def measure_concepts(context: Context, config: EvaluateConfig) -> list[Concept]:
    """All tasks, encoded and probed; done once for each context."""
    key = ("concepts", config.tasks, config.task_rows)
    if key not in context.measured:
        tasks = measure_task_rows(context, config)
        context.measured[key] = make_concepts(context, tasks)
    return context.measured[key]


def make_concepts(context: Context, tasks: Sequence[TaskRows]) -> list[Concept]:
    """The tasks, encoded and probed."""
    n_most = max(len(task.labels_n) for task in tasks)
    n_most = -(-n_most // context.mesh.size) * context.mesh.size
    encode = jax.jit(_encode, out_shardings=replicated(context.mesh))
    concepts = []
    with Progress(
        len(tasks), "tasks", "concepts", is_shown=context.progress
    ) as progress:
        for task in tasks:
            values_nk, indices_nk = jax.device_get(
                encode(context.sae, _pad(task.acts_nd, n_most))
            )
            train_n = ~task.heldout_n
            slope_d, intercept = fit_probe(
                task.acts_nd[train_n], task.labels_n[train_n], n_most
            )
            n = len(task.labels_n)
            train, heldout = (
                Side(
                    task.acts_nd[chosen_n],
                    task.labels_n[chosen_n],
                    task.texts_n[chosen_n],
                    values_nk[:n][chosen_n],
                    indices_nk[:n][chosen_n],
                )
                for chosen_n in (train_n, task.heldout_n)
            )
            concepts.append(Concept(task.name, train, heldout, slope_d, intercept))
            progress.update(len(concepts))
    return concepts


def fit_probe(
    features_nf: Floats, labels_n: NDArray[np.bool_], n_rows: int, ridge: float = RIDGE
) -> tuple[Floats, float]:
    """Slope [F] and intercept, fit on rows padded to `n_rows`, so that one program
    serves tasks of all sizes."""
    weights_n = (np.arange(n_rows) < len(labels_n)).astype(np.float32)
    padded_n = np.pad(labels_n, (0, n_rows - len(labels_n)))
    probe = _fit(_pad(features_nf, n_rows), padded_n, weights_n, np.float32(ridge))
    return np.asarray(probe.slope), float(probe.intercept)


def find_shares(context: Context, side: Side, slope_d: Floats) -> Floats:
    """What each slot of the codes gives to the logit of a probe, [N, K]."""
    return side.values_nk * _find_along(context, side, slope_d)[0]


def find_cosines(context: Context, side: Side, slope_d: Floats) -> Floats:
    """The cosine of each slot's decoder row with a probe, [N, K]."""
    along_nk, norm_nk = _find_along(context, side, slope_d)
    lengths_nk = norm_nk * np.linalg.norm(slope_d)
    return along_nk / np.where(lengths_nk > 0, lengths_nk, 1)


def find_mean_differences(
    side: Side, amounts_nk: Floats
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The latents of the codes, and how much more they have on positives.

    Of amounts by slot, such as values: a latent's mean over positive rows less that
    over negative ones, where a row without the latent has 0.
    """
    latents, number_m = np.unique(side.indices_nk, return_inverse=True)
    weight_n = np.where(
        side.labels_n, 1 / side.labels_n.sum(), -1 / (~side.labels_n).sum()
    )
    weighted_nk = amounts_nk * weight_n[:, None]
    differences_l = np.bincount(number_m.reshape(-1), weighted_nk.reshape(-1))
    return latents.astype(np.int64), differences_l.astype(np.float64)


def find_share_means(
    train: Side, share_nk: Floats, latents_m: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The mean share of each of these latents over the train rows, [M]."""
    is_it_nkm = train.indices_nk[..., None] == latents_m
    return np.sum(share_nk[..., None] * is_it_nkm, axis=(0, 1)) / len(share_nk)


def choose_given(side: Side, amounts_nk: Floats, n: int) -> NDArray[np.int64]:
    """At most n latents that have most more on positives than on negatives."""
    latents, difference_l = find_mean_differences(side, amounts_nk)
    order_l = np.argsort(-difference_l, kind="stable")[:n]
    return latents[order_l][difference_l[order_l] > 0]


def find_values(side: Side, latents_f: NDArray[np.int64]) -> Floats:
    """The values of some latents, [N, F]."""
    is_it_nkf = side.indices_nk[..., None] == latents_f
    return np.sum(side.values_nk[..., None] * is_it_nkf, axis=1)


def choose_channels(concept: Concept, n: int) -> NDArray[np.int64]:
    """At most n channels that give most to the probe on positives of the train rows."""
    side = concept.train
    positive_d = side.acts_nd[side.labels_n].mean(axis=0)
    given_d = (positive_d - side.acts_nd[~side.labels_n].mean(axis=0)) * concept.slope_d
    order_d = np.argsort(-given_d, kind="stable")[:n]
    return order_d[given_d[order_d] > 0]


def find_channel_shares(concept: Concept) -> Floats:
    """What each channel of held-out rows, less its train mean, gives, [N, D]."""
    centred_nd = concept.heldout.acts_nd - concept.train.acts_nd.mean(axis=0)
    return centred_nd * concept.slope_d


def measure_accuracy(logits_n: Floats, labels_n: NDArray[np.bool_]) -> float:
    """The share of rows whose logit has the sign of their label; 0 counts as half."""
    right_n = np.where(logits_n == 0, 0.5, (logits_n > 0) == labels_n)
    return float(right_n.mean())


def _encode(sae: Sae, acts_nd: jax.Array) -> tuple[jax.Array, jax.Array]:
    code = sae.encode(acts_nd)
    return (code.values * code.scale).astype(jnp.float32), code.indices


@jax.jit
def _fit(
    features_nf: Any, labels_n: Any, weights_n: Any, ridge: Any
) -> logistic.Probe:
    return logistic.fit_together(features_nf, labels_n, weights_n, ridge)


def _find_along(
    context: Context, side: Side, slope_d: Floats
) -> tuple[Floats, Floats]:
    """d_l·p and |d_l| of each slot, [N, K]."""
    n = len(side.indices_nk)
    padded_nk = _pad(side.indices_nk, -(-n // _SHARE_ROWS) * _SHARE_ROWS)
    along_nk, norm_nk = jax.device_get(_project(context.sae, padded_nk, slope_d))
    return along_nk[:n], norm_nk[:n]


@jax.jit
def _project(sae: Sae, indices_nk: Any, slope_d: Any) -> tuple[jax.Array, jax.Array]:
    w_dec_ld = sae.weights()[0]["w_dec_ld"]
    # Of all latents: a gather of decoder rows would hold [N, K, D].
    along_l = jnp.matmul(w_dec_ld, slope_d, precision=jax.lax.Precision.HIGHEST)
    return along_l[indices_nk], jnp.linalg.norm(w_dec_ld, axis=1)[indices_nk]


def _pad(rows_nf: NDArray[Any], n_rows: int) -> NDArray[Any]:
    return np.pad(rows_nf, ((0, n_rows - len(rows_nf)), (0, 0)), mode="edge")
