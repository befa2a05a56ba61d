"""Questions that a notebook asks of an SAE, its codes and its decoder.

    shrinkage     γ = E|x̂|^2 / E[x̂·x], the γ that makes E|x̂/γ - x|^2 least
    refinement    min over v >= 0, zero where the code is, of |sum_k v_k d_k + b - x|^2
    progression   nmse of the code's prefixes: the 1, 2, 4, ... strongest latents alone
    frequency     rows on which a latent is above 0 / rows
    neighbours    the decoder rows of largest cosine

x is a row and x̂ its reconstruction; d_k are decoder rows and b is what an empty code
decodes to. Refinement and progression work in the SAE's normalised space. All are pure
functions of arrays on any mesh, for every architecture whose decoder is linear.

Sources: Rajamanoharan et al. 2024 (arXiv:2404.16014), relative reconstruction bias, for
γ; Gao et al. 2024 (arXiv:2406.04093), section 5, for refinement and progression.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from sae_jax.saes.code import SparseCode

_TILE = 256  # latents whose cosines with all others are held at once


class Sae(Protocol):
    """What is asked of an architecture; it must be a pytree."""

    def weights(self) -> tuple[dict[str, jax.Array], Any]: ...

    def encode(self, acts: jax.Array) -> Any: ...

    def decode(self, code: Any) -> jax.Array: ...

    def normalize(
        self, acts: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]: ...


def shrinkage(recon_bd: jax.Array, target_bd: jax.Array) -> jax.Array:
    """γ of reconstructions [..., D]: 1 where unbiased, below 1 where shrunken.

    In the space of the arguments. Where the rows share a large mean that a bias
    rebuilds, γ is near 1 whatever the latents do: take the mean off both. NaN where
    nothing is reconstructed.
    """
    recon_bd, target_bd = _widen(recon_bd), _widen(target_bd)
    return jnp.sum(jnp.square(recon_bd)) / jnp.sum(recon_bd * target_bd)


@jax.jit
def refine(sae: Sae, acts: jax.Array, n_steps: int = 200) -> SparseCode:
    """The codes of rows [..., D] with the best values >= 0 on the same latents.

    Inactive slots stay 0, and an active one may become 0; values fall again, and their
    indices with them. The gathered decoder rows take B * K * D numbers and the Gram
    matrices B * K * K, so give it one batch at a time. After `n_steps` of accelerated
    projected gradient, values may be unsettled where decoder rows are almost parallel.
    """
    code = sae.encode(acts)
    normed_bd, _, _ = sae.normalize(acts)
    empty = dataclasses.replace(code, values=jnp.zeros_like(code.values))
    wanted_bd = _widen(normed_bd) - _decode_normed(sae, empty)
    rows_bkd = _widen(sae.weights()[0]["w_dec_ld"])[code.indices]
    rows_bkd = jnp.where(code.values[..., None] > 0, rows_bkd, 0)
    gram_bkk = _sum_products("...kd,...jd->...kj", rows_bkd, rows_bkd)
    along_bk = _sum_products("...kd,...d->...k", rows_bkd, wanted_bd)
    start_bk = code.values.astype(gram_bkk.dtype)
    values_bk = _solve_nonnegative(gram_bkk, along_bk, start_bk, n_steps)
    order_bk = jnp.argsort(values_bk, axis=-1, descending=True)
    return dataclasses.replace(
        code,
        values=jnp.take_along_axis(values_bk, order_bk, -1).astype(code.values.dtype),
        indices=jnp.take_along_axis(code.indices, order_bk, -1),
    )


def progressive_nmse(sae: Sae, acts: jax.Array, kept: Sequence[int]) -> jax.Array:
    """nmse [len(kept)] of rows [..., D] from each row's `kept` strongest latents alone.

    Relative to predicting the mean of these rows; 0 keeps nothing but the bias, and
    more than K keeps all.
    """
    return _measure_prefixes(sae, acts, jnp.asarray(tuple(kept), jnp.int32))


def l0_per_row(code: SparseCode) -> jax.Array:
    """How many latents are above 0, [...]."""
    return jnp.sum(code.values > 0, axis=-1)


def firing_frequency(code: SparseCode, n_latents: int) -> jax.Array:
    """The share of rows on which each latent is above 0, [L]."""
    fired = (code.values > 0).astype(jnp.int32)
    counts_l = jnp.zeros(n_latents, jnp.int32).at[code.indices].add(fired)
    return counts_l / (code.values.size // code.values.shape[-1])


def dense_latents(
    frequency_l: jax.Array | NDArray[Any], at_least: float = 0.1
) -> NDArray[np.int64]:
    """The latents that fire on at least this share of rows, most frequent first."""
    frequency_l = np.asarray(frequency_l)
    # A float32 share may be rounded below the one it stands for.
    latents = np.flatnonzero(frequency_l >= at_least * (1 - 1e-6))
    return latents[np.argsort(-frequency_l[latents], kind="stable")]


@functools.partial(jax.jit, static_argnames="n")
def decoder_neighbours(w_dec_ld: jax.Array, n: int = 1) -> tuple[jax.Array, jax.Array]:
    """For each latent, the n others whose decoder rows are nearest by cosine.

    Reads w_dec_ld [L, D] where it lies, sharded or not, and takes L * L * D products,
    256 latents at a time. A row of zeros has cosine 0 with every other.

    Returns:
        Cosines [L, n], falling, and the neighbours' indices [L, n].

    Raises:
        ValueError: there are not n others.
    """
    n_latents = w_dec_ld.shape[0]
    if not 1 <= n < n_latents:
        raise ValueError(
            f"n = {n} neighbours of each of {n_latents} latents: must be at least 1 "
            f"and at most {n_latents - 1}"
        )
    rows_ld = _widen(w_dec_ld)
    norms_l1 = jnp.linalg.norm(rows_ld, axis=1, keepdims=True)
    unit_ld = rows_ld / jnp.where(norms_l1 > 0, norms_l1, 1)
    latents_l = jnp.arange(n_latents)

    def take_largest(cosines_l: jax.Array, _: None) -> tuple[jax.Array, Any]:
        largest = jnp.argmax(cosines_l)
        rest_l = jnp.where(latents_l == largest, -jnp.inf, cosines_l)
        return rest_l, (jnp.max(cosines_l), largest)

    def nearest(latent: jax.Array) -> tuple[jax.Array, jax.Array]:
        cosines_l = _sum_products("ld,d->l", unit_ld, unit_ld[latent])
        cosines_l = jnp.where(latents_l == latent, -jnp.inf, cosines_l)
        # Not `top_k`: it would gather all cosines of a tile on every device.
        return lax.scan(take_largest, cosines_l, length=n)[1]

    return lax.map(nearest, latents_l, batch_size=_TILE)


def _widen(array: jax.Array) -> jax.Array:
    """In float32, or wider where it is."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _sum_products(axes: str, *arrays: jax.Array) -> jax.Array:
    """An einsum in full float32, also where the default rounds factors."""
    return jnp.einsum(axes, *arrays, precision=lax.Precision.HIGHEST)


def _decode_normed(sae: Sae, code: SparseCode) -> jax.Array:
    """The reconstruction in the SAE's normalised space."""
    # With nothing to undo; taking shift off the result would cancel where it is large.
    shift, scale = jnp.zeros_like(code.shift), jnp.ones_like(code.scale)
    return _widen(sae.decode(dataclasses.replace(code, shift=shift, scale=scale)))


@jax.jit
def _measure_prefixes(sae: Sae, acts: jax.Array, kept_n: jax.Array) -> jax.Array:
    code = sae.encode(acts)
    normed_bd = _widen(sae.normalize(acts)[0])
    slots_k = jnp.arange(code.values.shape[-1])

    def error(n_kept: jax.Array) -> jax.Array:
        # A prefix holds the strongest, for values fall.
        values_bk = jnp.where(slots_k < n_kept, code.values, 0)
        prefix = dataclasses.replace(code, values=values_bk)
        return jnp.sum(jnp.square(_decode_normed(sae, prefix) - normed_bd))

    mean_d = jnp.mean(normed_bd, axis=range(normed_bd.ndim - 1))
    variation = jnp.sum(jnp.square(normed_bd - mean_d))
    return lax.map(error, kept_n) / variation


def _solve_nonnegative(
    gram_bkk: jax.Array, along_bk: jax.Array, start_bk: jax.Array, n_steps: int
) -> jax.Array:
    """The v >= 0 [..., K] that makes v·Gv / 2 - c·v least, for each G and c.

    Projected gradient with Nesterov's momentum, dropped in a row when it leads uphill
    (O'Donoghue and Candès 2015).
    """
    lengths_bk = jnp.sqrt(jnp.diagonal(gram_bkk, axis1=-2, axis2=-1))
    lengths_bk = jnp.where(lengths_bk > 0, lengths_bk, 1)
    # G <= diag(curvature), as cosines <= diag(their absolute row sums): each latent has
    # a safe step of its own, whatever the length of its decoder row.
    shares_bkk = jnp.abs(gram_bkk) / lengths_bk[..., None, :]
    curvature_bk = lengths_bk * jnp.sum(shares_bkk, axis=-1)
    curvature_bk = jnp.where(curvature_bk > 0, curvature_bk, 1)

    def step(_: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        values_bk, ahead_bk, t_b1 = state
        slope_bk = _sum_products("...kj,...j->...k", gram_bkk, ahead_bk) - along_bk
        next_bk = jnp.maximum(ahead_bk - slope_bk / curvature_bk, 0)
        moved_bk = next_bk - values_bk
        uphill_bk = curvature_bk * (ahead_bk - next_bk) * moved_bk
        t_b1 = jnp.where(jnp.sum(uphill_bk, axis=-1, keepdims=True) > 0, 1, t_b1)
        next_t_b1 = (1 + jnp.sqrt(1 + 4 * jnp.square(t_b1))) / 2
        return next_bk, next_bk + (t_b1 - 1) / next_t_b1 * moved_bk, next_t_b1

    t_b1 = jnp.ones_like(start_bk[..., :1])
    return lax.fori_loop(0, n_steps, step, (start_bk, start_bk, t_b1))[0]
