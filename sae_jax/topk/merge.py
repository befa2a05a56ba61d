"""The best K over all latent shards, given each shard's own candidates.

A shard's k_in = min(K, L/S) largest hold all winners it can own, so only candidates
move: one gather of B * S * k_in values. Candidates are ordered by shard and, inside a
shard, by falling value and rising index; `top_k` prefers the earlier of equals, so
among equal values the lowest global index wins and never more than K are kept.

These functions run inside `jax.shard_map`; `axis` names the mesh axis of the latents.
"""

import jax
import jax.numpy as jnp
from jax import lax


def rank_global(values_bk: jax.Array, k: int, axis: str) -> jax.Array:
    """The place, from 0, of each candidate [B, k_in] among those of all shards.

    K where it is not among the K best. No gradient passes: the choice is discrete, and
    the values that were chosen keep their own path.
    """
    n_rows, k_in = values_bk.shape
    gathered = lax.all_gather(
        lax.stop_gradient(values_bk), axis, axis=1, tiled=True
    )
    k_all = min(k, gathered.shape[1])
    _, winners_bk = lax.top_k(gathered, k_all)
    own_bk = winners_bk - lax.axis_index(axis) * k_in
    is_own_bk = (own_bk >= 0) & (own_bk < k_in)
    rows_b1 = jnp.arange(n_rows)[:, None]
    # Winners of other shards are sent to the column past the end, and dropped there.
    return (
        jnp.full((n_rows, k_in), k, jnp.int32)
        .at[rows_b1, jnp.where(is_own_bk, own_bk, k_in)]
        .set(jnp.arange(k_all, dtype=jnp.int32), mode="drop")
    )


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
    best_bk, positions_bk = lax.top_k(all_values, min(k, all_values.shape[1]))
    return best_bk, jnp.take_along_axis(all_indices, positions_bk, axis=1)
