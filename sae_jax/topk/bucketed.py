"""Two-stage choice: the best few of each bucket, then the best K of these.

A latent's bucket is its place in its tile mod n_buckets. The stride matters: where
latents that fire together lie together (sorted by frequency, Matryoshka groups),
contiguous buckets would lose more than `topk.recall` says. The first stage takes pre-
activations tile by tile, while they are hot, and keeps the `kept` largest of each
bucket with their places; the second sorts n_buckets * kept candidates instead of L.
(Samaga et al. 2025, arXiv 2506.04165; with kept = 1, Chern et al. 2022, arXiv
2206.14286.)

The first stage also remembers the largest value that it let go of in each bucket. Where
that is below the K-th value found, nothing was missed: the choice is exact, and known
to be. `topk.encoder` makes the exact method of this.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax.topk import exact


class Buckets(NamedTuple):
    """The first stage's candidates: level 0 has the largest of each bucket [B, n]."""

    values: tuple[jax.Array, ...]  # `kept` arrays [B, n_buckets], falling
    indices: tuple[jax.Array, ...]  # int32, the latents they belong to
    lost_bn: jax.Array | None  # the largest value that was let go of, if asked for


def start(x_bd: jax.Array, n_buckets: int, kept: int, is_exact: bool) -> Buckets:
    """Empty buckets for the rows of x."""
    shape = (x_bd.shape[0], n_buckets)
    dtype = jnp.promote_types(x_bd.dtype, jnp.float32)
    lowest = jnp.full_like(x_bd, -jnp.inf, dtype=dtype, shape=shape)
    first = jnp.full_like(x_bd, 0, dtype=jnp.int32, shape=shape)
    return Buckets((lowest,) * kept, (first,) * kept, lowest if is_exact else None)


def insert(buckets: Buckets, pre_bt: jax.Array, first: jax.Array) -> Buckets:
    """The buckets after one more tile of latents.

    Args:
        buckets: those of the tiles before.
        pre_bt: pre-activations [B, a multiple of n_buckets].
        first: the latent of the tile's first column.
    """
    n_buckets = buckets.values[0].shape[1]
    columns = first + lax.iota(jnp.int32, n_buckets)
    for at in range(0, pre_bt.shape[1], n_buckets):
        group_bn = pre_bt[:, at : at + n_buckets]
        latents_bn = jnp.broadcast_to(columns + at, group_bn.shape)
        buckets = _insert(buckets, group_bn, latents_bn)
    return buckets


def best(
    buckets: Buckets, k: int
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The K largest candidates and their latents, values falling: [B, K].

    And, if buckets know what they let go of, the rows whose K best may not be the K
    largest, ties by latent: bool [B]. There a value that was let go of reaches the
    K-th, or two of the first K + 1 are equal: candidates are not in the order of
    latents, which has to decide between equals.
    """
    candidates = jnp.concatenate(buckets.values, axis=1)
    latents = jnp.concatenate(buckets.indices, axis=1)
    n_first = k if buckets.lost_bn is None else k + 1
    first_bk, places_bk = exact.choose(candidates, n_first)
    values_bk = first_bk[:, :k]
    latents_bk = jnp.take_along_axis(latents, places_bk[:, :k], axis=1)
    if buckets.lost_bn is None:
        return values_bk, latents_bk, None
    # Not `>=`: a NaN that was let go of proves nothing.
    is_lost_b = ~(buckets.lost_bn.max(axis=1) < values_bk[:, -1])
    are_equal_b = (first_bk[:, 1:] == first_bk[:, :-1]).any(axis=1)
    return values_bk, latents_bk, is_lost_b | are_equal_b


def _insert(buckets: Buckets, value_bn: jax.Array, latent_bn: jax.Array) -> Buckets:
    """One value more for each bucket; the earlier of equals stays above."""
    values, indices = [], []
    for old_bn, old_latent_bn in zip(buckets.values, buckets.indices):
        is_above_bn = value_bn > old_bn
        values.append(jnp.where(is_above_bn, value_bn, old_bn))
        indices.append(jnp.where(is_above_bn, latent_bn, old_latent_bn))
        # What was pushed down, or did not come in, tries the next level.
        value_bn = jnp.where(is_above_bn, old_bn, value_bn)
        latent_bn = jnp.where(is_above_bn, old_latent_bn, latent_bn)
    lost_bn = buckets.lost_bn
    if lost_bn is not None:
        lost_bn = jnp.maximum(lost_bn, value_bn)
    return Buckets(tuple(values), tuple(indices), lost_bn)
