"""The best K over all latent shards, given each shard's own candidates.

A shard's k_in = min(K, L/S) largest hold all winners it can own, so only candidates
matter. Which of them win is found by one of three exchanges (`sae.exchange`):

    gather   all values to all shards: B S k_in of them, in one go
    tree     pairs of shards merge their best K, then pairs of pairs: B K log2 S
    count    the K-th largest by counting (`topk.threshold`): 3 B numbers for each of 16
             sums

The last two tell the K-th largest value, and then B S numbers say how many of those
equal to it each shard has. In all three the lowest latent wins among equal values, and
never more than K are kept: candidates are ordered by shard and, inside a shard, by
falling value and rising index.

These functions run inside `jax.shard_map`; `axis` names the mesh axis of the latents.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax.topk import exact
from sae_jax.topk.threshold import as_bits, count_reaching, find_largest


def are_best(
    values_bk: jax.Array, ks: Sequence[int], axis: str, exchange: str
) -> list[jax.Array]:
    """Which of a shard's candidates are among the K best of all, bool [B, k_in] each.

    No gradient passes: the choice is discrete, and the values that were chosen keep
    their own path.

    Args:
        values_bk: in falling order, none of them negative.
        ks: one answer for each.
        axis: of the latents.
        exchange: "gather", "tree" or "count".
    """
    values_bk = lax.stop_gradient(values_bk)
    if exchange == "gather":
        ranks_bk = _rank(values_bk, max(ks), axis)
        return [ranks_bk < k for k in ks]
    bits_bk = as_bits(values_bk)
    if exchange == "tree":
        best_bk = _merge_pairs(bits_bk, max(ks), axis)
        leasts = [best_bk[:, min(k, best_bk.shape[1]) - 1] for k in ks]
    else:
        leasts = [_count_to(bits_bk, k, axis) for k in ks]
    return [_are_reaching(bits_bk, k, least_b, axis) for k, least_b in zip(ks, leasts)]


def share(wanted_b: jax.Array, n_left_b: jax.Array, axis: str) -> jax.Array:
    """What a shard gets of n_left where those before it come first."""
    wanted_sb = lax.all_gather(wanted_b, axis)
    is_before_s = jnp.arange(wanted_sb.shape[0]) < lax.axis_index(axis)
    n_before_b = is_before_s.astype(jnp.int32) @ wanted_sb
    return jnp.clip(n_left_b - n_before_b, 0, wanted_b)


def merge_codes(
    values_bk: jax.Array,
    indices_bk: jax.Array,
    k: int,
    latents_per_shard: int,
    axis: str,
) -> tuple[jax.Array, jax.Array]:
    """The K best values and their global indices [B, K], the same on every shard."""
    global_bk = indices_bk + lax.axis_index(axis) * latents_per_shard
    all_values = lax.all_gather(values_bk, axis, axis=1, tiled=True)
    all_indices = lax.all_gather(global_bk, axis, axis=1, tiled=True)
    best_bk, positions_bk = exact.choose(all_values, k)
    return best_bk, jnp.take_along_axis(all_indices, positions_bk, axis=1)


def _rank(values_bk: jax.Array, k: int, axis: str) -> jax.Array:
    """The place, from 0, of each candidate among those of all shards.

    K where it is not among the K best.
    """
    n_rows, k_in = values_bk.shape
    gathered = lax.all_gather(values_bk, axis, axis=1, tiled=True)
    _, winners_bk = exact.choose(gathered, k)
    own_bk = winners_bk - lax.axis_index(axis) * k_in
    is_own_bk = (own_bk >= 0) & (own_bk < k_in)
    rows_b1 = jnp.arange(n_rows)[:, None]
    # Winners of other shards are sent to the column past the end, and dropped there.
    return (
        jnp.full((n_rows, k_in), k, jnp.int32)
        .at[rows_b1, jnp.where(is_own_bk, own_bk, k_in)]
        .set(jnp.arange(winners_bk.shape[1], dtype=jnp.int32), mode="drop")
    )


def _merge_pairs(bits_bk: jax.Array, k: int, axis: str) -> jax.Array:
    """The K largest of all shards, in falling order; S is a power of two."""
    n_shards, distance = lax.axis_size(axis), 1
    while distance < n_shards:
        pairs = [(shard, shard ^ distance) for shard in range(n_shards)]
        others_bk = lax.ppermute(bits_bk, axis, pairs)
        both_bk = jnp.concatenate([bits_bk, others_bk], axis=1)
        bits_bk, _ = exact.choose(both_bk, k)
        distance *= 2
    return bits_bk


def _count_to(bits_bk: jax.Array, k: int, axis: str) -> jax.Array:
    """The K-th largest of all shards; 0 where there are fewer."""

    def are_reached(patterns_pb: jax.Array) -> jax.Array:
        return lax.psum(count_reaching(bits_bk, patterns_pb), axis) >= k

    return find_largest(are_reached, jnp.zeros_like(bits_bk[:, 0]))


def _are_reaching(
    bits_bk: jax.Array, k: int, least_b: jax.Array, axis: str
) -> jax.Array:
    """Those above the K-th largest, and of those equal to it as many as make K."""
    n_above_b, n_reached_b = count_reaching(bits_bk, jnp.stack([least_b + 1, least_b]))
    n_left_b = k - lax.psum(n_above_b, axis)
    n_own_b = n_above_b + share(n_reached_b - n_above_b, n_left_b, axis)
    return lax.iota(jnp.int32, bits_bk.shape[1]) < n_own_b[:, None]
