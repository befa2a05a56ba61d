"""Reconstruction from dead latents alone, be they few or many.

    z    = ReLU(the K largest of x w_enc^T + bias among a row's dead latents)
    part = z w_dec

K is AuxK's k_aux: hundreds of slots, for which gathering rows of w costs more than
dense products with the dead latents, gathered once. How many are dead only the device
knows, so loops run over as many tiles of latents as there are: the host never waits,
and where none is dead nothing is done.

Chosen are the values that reach the row's K-th largest, which is found by counting
(`topk.threshold`): over latent shards only counts move. Where equal values would make
more than K, the lowest latents win.

The pre-activations of some rows are held, never those of a batch: the fewer rows the
more latents are dead, in two sizes. The backward pass computes them again, and adds to
the gradients that the weights bring with them, in place.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from sae_jax.matmul import matmul
from sae_jax.topk.threshold import as_bits, find_largest

_TILE_SIZE = 2**23  # elements of the pre-activations that are held: 32 MiB in float32
_TILE_LATENTS = 512
_FEW = 8  # at most 1 / this of the latents are dead: rows are taken many at a time


class Weights(NamedTuple):
    """A latent shard's own."""

    w_enc_ld: jax.Array
    bias_l: jax.Array
    w_dec_ld: jax.Array


class _Dead(NamedTuple):
    """Which latents of a shard are dead, and for how many of them there is room."""

    latents_n: jax.Array  # in rising order, then L/S; whole tiles
    n_tiles: jax.Array  # that hold any
    capacity: int


class _Cut(NamedTuple):
    """Which values are chosen of each row: those above `least_b`, and some equal."""

    least_b: jax.Array  # the K-th largest of all shards, 0 where fewer are positive
    n_equal_b: jax.Array  # how many equal to it this shard may keep


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def reconstruct(
    x_bd: jax.Array,
    weights: Weights,
    is_dead_l: jax.Array,
    k: int,
    axis: str,
    dtype: DTypeLike,
) -> tuple[jax.Array, Weights]:
    """A shard's part [B, D], and the weights, to be used instead of those that came.

    Inside `jax.shard_map`; all must vary over the same mesh axes, and is_dead_l is the
    same on all shards of the data axis. `axis` is that of the latents.

    The weights pass through, so that in the backward pass the gradients of whatever
    else uses them arrive here and grow. Rows are data: they get no gradient.
    """
    return _forward(x_bd, weights, is_dead_l, k, axis, dtype)[0]


def _forward(
    x_bd: jax.Array,
    weights: Weights,
    is_dead_l: jax.Array,
    k: int,
    axis: str,
    dtype: DTypeLike,
) -> tuple[tuple[jax.Array, Weights], Any]:
    n_rows = x_bd.shape[0]
    n_dead = lax.psum(jnp.sum(is_dead_l, dtype=jnp.int32), axis)
    has_choice = n_dead > k

    def add(dead: _Dead, rows: int, i: jax.Array, done: Any) -> Any:
        start = jnp.minimum(i * rows, n_rows - rows)
        x_td = lax.dynamic_slice_in_dim(x_bd, start, rows)
        z_ntl = _project(dead, x_td, weights, dtype)
        cut = _find_cut(dead, z_ntl, k, has_choice, axis)
        z_ntl = _drop_equals(dead, z_ntl, cut)
        part_td = _decode(dead, z_ntl, cut, weights.w_dec_ld, dtype)
        return jax.tree.map(
            lambda all, some: lax.dynamic_update_slice_in_dim(all, some, start, 0),
            done,
            (part_td, cut),
        )

    zeros_b = jnp.full_like(x_bd, 0, shape=(n_rows,), dtype=_sum_dtype(x_bd))
    part_bd = jnp.full_like(x_bd, 0, dtype=_sum_dtype(x_bd))
    none = part_bd, _Cut(zeros_b, zeros_b.astype(jnp.int32))
    part_bd, cut = _for_rows(add, none, n_rows, is_dead_l, axis)
    return (part_bd, weights), (x_bd, weights, is_dead_l, cut)


def _backward(k: int, axis: str, dtype: DTypeLike, saved: Any, g: Any) -> tuple:
    del k  # The cuts are known.
    x_bd, weights, is_dead_l, cut = saved
    g_bd, g_weights = g
    n_rows = x_bd.shape[0]

    def add(dead: _Dead, rows: int, i: jax.Array, g_weights: Weights) -> Weights:
        start = jnp.minimum(i * rows, n_rows - rows)
        x_td, g_td, own = jax.tree.map(
            lambda all: lax.dynamic_slice_in_dim(all, start, rows), (x_bd, g_bd, cut)
        )
        # The last tile reaches back to rows that have been counted.
        is_new_t = start + lax.iota(jnp.int32, rows) >= i * rows
        g_td = jnp.where(is_new_t[:, None], g_td, 0)
        z_ntl = _drop_equals(dead, _project(dead, x_td, weights, dtype), own)
        return _add_gradients(dead, z_ntl, own, x_td, g_td, weights, g_weights, dtype)

    g_weights = _for_rows(add, g_weights, n_rows, is_dead_l, axis)
    return None, g_weights, None


reconstruct.defvjp(_forward, _backward)


def _for_rows(
    add: Any, carry: Any, n_rows: int, is_dead_l: jax.Array, axis: str
) -> Any:
    """add(dead, rows, i, carry) over tiles of rows, at the least capacity."""
    n_own = is_dead_l.shape[0]
    n_dead = jnp.sum(is_dead_l, dtype=jnp.int32)
    # Row tiles count together over all shards, so they must have the same size.
    most = lax.pmax(n_dead, axis)
    n_tiles = -(-n_dead // _TILE_LATENTS)
    least = 0
    for capacity in sorted({_whole_tiles(-(-n_own // _FEW)), _whole_tiles(n_own)}):
        (latents_n,) = jnp.nonzero(is_dead_l, size=capacity, fill_value=n_own)
        dead = _Dead(latents_n.astype(jnp.int32), n_tiles, capacity)
        rows = min(n_rows, max(1, _TILE_SIZE // capacity))
        fits = (most > least) & (most <= capacity)
        n_row_tiles = jnp.where(fits, -(-n_rows // rows), 0)
        on_tile = functools.partial(add, dead, rows)
        carry = lax.fori_loop(0, n_row_tiles, on_tile, carry)
        least = capacity
    return carry


def _project(
    dead: _Dead, x_td: jax.Array, weights: Weights, dtype: DTypeLike
) -> jax.Array:
    """ReLU of the pre-activations, by tiles of latents: [tiles, rows, latents]."""

    def fill(i: jax.Array, z_ntl: jax.Array) -> jax.Array:
        latents = _tile(dead, i)
        pre_tl = matmul(x_td, _gather(weights.w_enc_ld, latents).T, dtype)
        bias_l = weights.bias_l.at[latents].get(mode="fill", fill_value=-jnp.inf)
        z_tl = jax.nn.relu(pre_tl + bias_l)
        return lax.dynamic_update_index_in_dim(z_ntl, z_tl, i, 0)

    shape = (dead.capacity // _TILE_LATENTS, x_td.shape[0], _TILE_LATENTS)
    zeros = jnp.full_like(x_td, 0, shape=shape, dtype=_sum_dtype(x_td))
    return lax.fori_loop(0, dead.n_tiles, fill, zeros)


def _find_cut(
    dead: _Dead, z_ntl: jax.Array, k: int, has_choice: jax.Array, axis: str
) -> _Cut:
    def count(is_counted: Any) -> jax.Array:
        zeros_b = jnp.full_like(z_ntl, 0, shape=z_ntl.shape[1:2], dtype=jnp.int32)
        return lax.fori_loop(
            0,
            dead.n_tiles,
            lambda i, n_b: n_b + jnp.sum(is_counted(z_ntl[i]), 1, dtype=jnp.int32),
            zeros_b,
        )

    def is_reached(bits_b: jax.Array) -> jax.Array:
        n_b = count(lambda z_tl: as_bits(z_tl) >= bits_b[:, None])
        return lax.psum(n_b, axis) >= k

    zeros_b = jnp.zeros_like(as_bits(z_ntl[0, :, 0]))
    bits_b = find_largest(is_reached, zeros_b, has_choice)
    least_b = lax.bitcast_convert_type(bits_b, z_ntl.dtype)
    n_equal_b = count(lambda z_tl: z_tl == least_b[:, None])
    n_above_b = lax.psum(count(lambda z_tl: z_tl > least_b[:, None]), axis)
    all_equal_sb = lax.all_gather(n_equal_b, axis)
    is_before_s = jnp.arange(all_equal_sb.shape[0]) < lax.axis_index(axis)
    n_before_b = is_before_s.astype(jnp.int32) @ all_equal_sb
    n_left_b = jnp.maximum(k - n_above_b - n_before_b, 0)
    return _Cut(least_b, jnp.minimum(n_equal_b, n_left_b))


def _drop_equals(dead: _Dead, z_ntl: jax.Array, cut: _Cut) -> jax.Array:
    """Zeros where a value equal to the least is one too many; seldom any."""

    def drop(i: jax.Array, carry: tuple) -> tuple:
        z_ntl, n_seen_b = carry
        is_equal_tl = z_ntl[i] == cut.least_b[:, None]
        rank_tl = n_seen_b[:, None] + jnp.cumsum(is_equal_tl, axis=1, dtype=jnp.int32)
        is_too_many = is_equal_tl & (rank_tl > cut.n_equal_b[:, None])
        z_tl = jnp.where(is_too_many, 0, z_ntl[i])
        return lax.dynamic_update_index_in_dim(z_ntl, z_tl, i, 0), rank_tl[:, -1]

    def count(i: jax.Array, n_b: jax.Array) -> jax.Array:
        return n_b + jnp.sum(z_ntl[i] == cut.least_b[:, None], 1, dtype=jnp.int32)

    zeros_b = jnp.zeros_like(cut.n_equal_b)
    n_equal_b = lax.fori_loop(0, dead.n_tiles, count, zeros_b)
    is_needed = jnp.any((n_equal_b > cut.n_equal_b) & (cut.least_b > 0))
    n_passes = jnp.where(is_needed, dead.n_tiles, 0)
    return lax.fori_loop(0, n_passes, drop, (z_ntl, zeros_b))[0]


def _decode(
    dead: _Dead, z_ntl: jax.Array, cut: _Cut, w_dec_ld: jax.Array, dtype: DTypeLike
) -> jax.Array:
    def add(i: jax.Array, part_td: jax.Array) -> jax.Array:
        w_ld = _gather(w_dec_ld, _tile(dead, i))
        return part_td + matmul(_chosen(z_ntl[i], cut), w_ld, dtype)

    shape = (z_ntl.shape[1], w_dec_ld.shape[1])
    zeros_td = jnp.full_like(z_ntl, 0, shape=shape)
    return lax.fori_loop(0, dead.n_tiles, add, zeros_td)


def _add_gradients(
    dead: _Dead,
    z_ntl: jax.Array,
    cut: _Cut,
    x_td: jax.Array,
    g_td: jax.Array,
    weights: Weights,
    g_weights: Weights,
    dtype: DTypeLike,
) -> Weights:
    def add(i: jax.Array, g_weights: Weights) -> Weights:
        latents = _tile(dead, i)
        z_tl = _chosen(z_ntl[i], cut)
        g_z_tl = matmul(g_td, _gather(weights.w_dec_ld, latents).T, dtype)
        g_z_tl = jnp.where(z_tl > 0, g_z_tl, 0)
        own = Weights(
            matmul(g_z_tl.T, x_td, dtype),
            jnp.sum(g_z_tl, axis=0),
            matmul(z_tl.T, g_td, dtype),
        )
        return jax.tree.map(
            lambda all, some: all.at[latents].add(some.astype(all.dtype), mode="drop"),
            g_weights,
            own,
        )

    return lax.fori_loop(0, dead.n_tiles, add, g_weights)


def _chosen(z_tl: jax.Array, cut: _Cut) -> jax.Array:
    return jnp.where(z_tl >= cut.least_b[:, None], z_tl, 0)


def _tile(dead: _Dead, i: jax.Array) -> jax.Array:
    return lax.dynamic_slice_in_dim(dead.latents_n, i * _TILE_LATENTS, _TILE_LATENTS)


def _gather(w_ld: jax.Array, latents: jax.Array) -> jax.Array:
    return w_ld.at[latents].get(mode="fill", fill_value=0)


def _whole_tiles(n: int) -> int:
    return -(-n // _TILE_LATENTS) * _TILE_LATENTS


def _sum_dtype(array: jax.Array) -> jnp.dtype:
    return jnp.promote_types(array.dtype, jnp.float32)
