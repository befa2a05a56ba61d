"""Losses of architectures whose number of active latents varies, tile by tile.

Everything such a loss needs is a sum over latents: the reconstruction, the penalty, L0.
So each architecture says what a tile of latents adds for each row, and here tiles are
added up, first within a latent shard, then over all shards. Only the sums are kept for
the backward pass, which computes a tile's code again: of a batch's dense code [B, L]
there is never more than one tile.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from sae_jax.mesh import DATA, LATENT, is_spread
from sae_jax.saes.base import LATENTS, ROWS, Sae, Weights

Sums = dict[str, jax.Array]  # each [B] or [B, D]
# What a tile of latents adds, and which of them fire on each row, bool [B, tile].
OnTile = Callable[[jax.Array, Weights], tuple[Sums, jax.Array]]

TILE_SIZE = 2**26  # elements of a tile's dense code: 256 MiB in float32


def sum_over_latents(
    sae: Sae, on_tile: OnTile, normed_bd: jax.Array
) -> tuple[Sums, jax.Array]:
    """The sums of `on_tile(normed_bd, weights)` over all latents, and fired_l.

    "l0", the number of latents of each row that fire, is added to the sums.
    """

    def on_shard(normed_bd, weights):  # type: ignore[no-untyped-def]
        sums, fired_l = _on_tiles(_with_l0(on_tile), normed_bd, weights)
        return lax.psum(sums, LATENT), lax.pmax(fired_l, DATA) > 0

    return sae.on_shards(on_shard, (ROWS,), (P(DATA), LATENTS))(normed_bd)


def _with_l0(on_tile: OnTile) -> OnTile:
    def counted(normed_bd: jax.Array, weights: Weights) -> tuple[Sums, jax.Array]:
        sums, fired_bl = on_tile(normed_bd, weights)
        l0_b = jnp.sum(fired_bl, axis=1).astype(normed_bd.dtype)
        return sums | {"l0": l0_b}, jnp.any(fired_bl, axis=0).astype(jnp.int32)

    return counted


def _on_tiles(
    on_tile: OnTile, normed_bd: jax.Array, weights: Weights
) -> tuple[Sums, jax.Array]:
    """The tiles of one latent shard, one after another."""
    n_own = weights["w_enc_ld"].shape[0]
    n_tiles = _count_tiles(n_own, normed_bd.shape[0], TILE_SIZE)
    if n_tiles == 1:
        return on_tile(normed_bd, weights)
    tiled = {
        name: value.reshape(n_tiles, -1, *value.shape[1:])
        for name, value in weights.items()
        if is_spread(name)
    }
    shared = {name: weights[name] for name in weights.keys() - tiled.keys()}
    on_tile = jax.checkpoint(on_tile)

    def add(sums: Sums, tile: Weights) -> tuple[Sums, jax.Array]:
        more, fired_l = on_tile(normed_bd, tile | shared)
        return jax.tree.map(jnp.add, sums, more), fired_l

    first, rest = (jax.tree.map(lambda w: w[at], tiled) for at in (0, slice(1, None)))
    sums, fired_l = on_tile(normed_bd, first | shared)
    sums, fired_nl = lax.scan(add, sums, rest)
    return sums, jnp.concatenate([fired_l, fired_nl.reshape(-1)])


def _count_tiles(n_own: int, n_rows: int, tile_size: int) -> int:
    """The fewest tiles of one size, each of at most `tile_size` elements if it can."""
    least = min(n_own, -(-n_own * n_rows // tile_size))
    return next(n for n in range(least, n_own + 1) if n_own % n == 0)
