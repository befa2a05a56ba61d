"""The gradients of a reconstruction from dead latents alone, be they few or many.

    z    = ReLU(the K largest of x w_enc^T + bias among a row's dead latents)
    part = z w_dec, over all latent shards
    loss = scale * sum (part - target)^2

K is AuxK's k_aux: hundreds of slots, for which gathering rows of w costs more than
dense products with the dead latents, gathered once. How many are dead only the device
knows, so loops run over as many tiles of latents as there are: the host never waits,
and where none is dead nothing is done.

Chosen are the values that reach the row's K-th largest, which is found by counting
(`topk.threshold`): over latent shards only counts move. Where equal values would make
more than K, the lowest latents win.

The pre-activations of some rows are held, never those of a batch: the fewer rows the
more latents are dead, in two sizes. While they are held everything is done with them,
forward and backward: five products, the gradients added in place to those that came.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from sae_jax.matmul import matmul
from sae_jax.topk.merge import share
from sae_jax.topk.threshold import as_bits, count_reaching, find_largest

_TILE_SIZE = 2**23  # elements of the pre-activations that are held: 32 MiB in float32
_LEAST_ROWS = 128  # with fewer, gathering dead latents takes as long as products
_TILE_LATENTS = 512
_FEW = 8  # at most 1 / this of the latents are dead: rows are taken many at a time


class Weights(NamedTuple):
    """A latent shard's own."""

    w_enc_ld: jax.Array
    bias_l: jax.Array
    w_dec_ld: jax.Array


class Gradients(NamedTuple):
    """Of a shard's weights, and of what is added to all rows alike."""

    w_enc_ld: jax.Array
    bias_l: jax.Array
    w_dec_ld: jax.Array
    shift_d: jax.Array


class _Dead(NamedTuple):
    """Which latents of a shard are dead, and for how many of them there is room."""

    latents_n: jax.Array  # in rising order, then L/S; whole tiles
    n_tiles: jax.Array  # that hold any
    capacity: int


def add_gradients(
    gradients: Gradients,
    x_bd: jax.Array,
    target_bd: jax.Array,
    weights: Weights,
    is_dead_l: jax.Array,
    scale: jax.Array,
    k: int,
    axis: str,
    dtype: DTypeLike,
) -> tuple[Gradients, jax.Array]:
    """The gradients with those of the loss added, and its sum, not scaled.

    Inside `jax.shard_map`, where varying axes are not checked; `axis` is that of the
    latents. All rows are a data shard's own; so are the results. Rows that are not
    finite, or whose error is not, are left out.
    """
    n_rows = x_bd.shape[0]
    has_choice = lax.psum(jnp.sum(is_dead_l, dtype=jnp.int32), axis) > k

    def add(dead: _Dead, rows: int, i: jax.Array, done: Any) -> Any:
        gradients, total = done
        start = jnp.minimum(i * rows, n_rows - rows)
        x_td, target_td = (
            lax.dynamic_slice_in_dim(rows_bd, start, rows)
            for rows_bd in (x_bd, target_bd)
        )
        z_ntl = _project(dead, x_td, weights, dtype)
        least_t, z_ntl = _choose(dead, z_ntl, k, has_choice, axis)
        part_td = _decode(dead, z_ntl, least_t, weights.w_dec_ld, dtype)
        error_td = lax.psum(part_td, axis) - target_td
        square_t = jnp.sum(jnp.square(error_td), axis=1)
        # The last tile reaches back to rows that have been counted.
        is_new_t = start + lax.iota(jnp.int32, rows) >= i * rows
        is_left_out_t = ~(is_new_t & jnp.isfinite(square_t + jnp.sum(x_td, axis=1)))
        total += jnp.sum(jnp.where(is_left_out_t, 0, square_t))
        x_td, g_td = (
            jnp.where(is_left_out_t[:, None], 0, rows_td)
            for rows_td in (x_td, 2 * scale * error_td)
        )
        least_t = jnp.where(is_left_out_t, jnp.nan, least_t)  # which nothing reaches
        gradients = _add_products(
            dead, z_ntl, least_t, x_td, g_td, weights, gradients, dtype
        )
        return gradients, total

    total = jnp.zeros((), _sum_dtype(x_bd))
    return _for_rows(add, (gradients, total), n_rows, is_dead_l, axis)


def _for_rows(
    add: Any, carry: Any, n_rows: int, is_dead_l: jax.Array, axis: str
) -> Any:
    """add(dead, rows, i, carry) over tiles of rows, at the least capacity."""
    n_own = is_dead_l.shape[0]
    n_dead = jnp.sum(is_dead_l, dtype=jnp.int32)
    # Row tiles are added up over all shards, so they must have the same size.
    most = lax.pmax(n_dead, axis)
    n_tiles = -(-n_dead // _TILE_LATENTS)
    least = 0
    for capacity in sorted({_whole_tiles(-(-n_own // _FEW)), _whole_tiles(n_own)}):
        (latents_n,) = jnp.nonzero(is_dead_l, size=capacity, fill_value=n_own)
        dead = _Dead(latents_n.astype(jnp.int32), n_tiles, capacity)
        rows = min(n_rows, max(_LEAST_ROWS, _TILE_SIZE // capacity))
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
    zeros = jnp.zeros(shape, _sum_dtype(x_td))
    return lax.fori_loop(0, dead.n_tiles, fill, zeros)


def _choose(
    dead: _Dead, z_ntl: jax.Array, k: int, has_choice: jax.Array, axis: str
) -> tuple[jax.Array, jax.Array]:
    """The K-th largest of each row over all shards, 0 where fewer are positive.

    And z, in which values equal to it are 0 where they would make more than K.
    """

    def count(on_tile: Any, *shape: int) -> jax.Array:
        return lax.fori_loop(
            0,
            dead.n_tiles,
            lambda i, n: n + on_tile(as_bits(z_ntl[i])),
            jnp.zeros((*shape, z_ntl.shape[1]), jnp.int32),
        )

    def are_reached(bits_pt: jax.Array) -> jax.Array:
        n_pt = count(lambda bits_tl: count_reaching(bits_tl, bits_pt), len(bits_pt))
        return lax.psum(n_pt, axis) >= k

    zeros_t = jnp.zeros_like(as_bits(z_ntl[0, :, 0]))
    bits_t = find_largest(are_reached, zeros_t, has_choice)
    least_t = lax.bitcast_convert_type(bits_t, z_ntl.dtype)
    # Those above it, and with those equal to it.
    both_pt = jnp.stack([bits_t + 1, bits_t])
    n_above_t, n_reached_t = count(lambda bits: count_reaching(bits, both_pt), 2)
    n_equal_t = n_reached_t - n_above_t
    n_kept_t = share(n_equal_t, k - lax.psum(n_above_t, axis), axis)
    has_too_many = jnp.any((n_equal_t > n_kept_t) & (least_t > 0))

    def drop(i: jax.Array, done: tuple) -> tuple:
        z_ntl, n_seen_t = done
        is_equal_tl = z_ntl[i] == least_t[:, None]
        rank_tl = n_seen_t[:, None] + jnp.cumsum(is_equal_tl, axis=1, dtype=jnp.int32)
        is_too_many_tl = is_equal_tl & (rank_tl > n_kept_t[:, None])
        z_tl = jnp.where(is_too_many_tl, 0, z_ntl[i])
        return lax.dynamic_update_index_in_dim(z_ntl, z_tl, i, 0), rank_tl[:, -1]

    n_passes = jnp.where(has_too_many, dead.n_tiles, 0)
    z_ntl, _ = lax.fori_loop(0, n_passes, drop, (z_ntl, jnp.zeros_like(n_equal_t)))
    return least_t, z_ntl


def _decode(
    dead: _Dead,
    z_ntl: jax.Array,
    least_t: jax.Array,
    w_dec_ld: jax.Array,
    dtype: DTypeLike,
) -> jax.Array:
    def add(i: jax.Array, part_td: jax.Array) -> jax.Array:
        w_td = _gather(w_dec_ld, _tile(dead, i))
        return part_td + matmul(_reaching(z_ntl[i], least_t), w_td, dtype)

    zeros_td = jnp.zeros((z_ntl.shape[1], w_dec_ld.shape[1]), z_ntl.dtype)
    return lax.fori_loop(0, dead.n_tiles, add, zeros_td)


def _add_products(
    dead: _Dead,
    z_ntl: jax.Array,
    least_t: jax.Array,
    x_td: jax.Array,
    g_td: jax.Array,
    weights: Weights,
    gradients: Gradients,
    dtype: DTypeLike,
) -> Gradients:
    def add(i: jax.Array, gradients: Gradients) -> Gradients:
        latents = _tile(dead, i)
        z_tl = _reaching(z_ntl[i], least_t)
        g_z_tl = matmul(g_td, _gather(weights.w_dec_ld, latents).T, dtype)
        g_z_tl = jnp.where(z_tl > 0, g_z_tl, 0)
        g_bias_l = jnp.sum(g_z_tl, axis=0)
        own = matmul(g_z_tl.T, x_td, dtype), g_bias_l, matmul(z_tl.T, g_td, dtype)
        w_enc_ld, bias_l, w_dec_ld = (
            old.at[latents].add(more.astype(old.dtype), mode="drop")
            for old, more in zip(gradients, own)
        )
        shift_d = gradients.shift_d + g_bias_l @ _gather(weights.w_enc_ld, latents)
        return Gradients(w_enc_ld, bias_l, w_dec_ld, shift_d)

    return lax.fori_loop(0, dead.n_tiles, add, gradients)


def _reaching(z_tl: jax.Array, least_t: jax.Array) -> jax.Array:
    return jnp.where(z_tl >= least_t[:, None], z_tl, 0)


def _tile(dead: _Dead, i: jax.Array) -> jax.Array:
    return lax.dynamic_slice_in_dim(dead.latents_n, i * _TILE_LATENTS, _TILE_LATENTS)


def _gather(w_ld: jax.Array, latents: jax.Array) -> jax.Array:
    return w_ld.at[latents].get(mode="fill", fill_value=0)


def _whole_tiles(n: int) -> int:
    return -(-n // _TILE_LATENTS) * _TILE_LATENTS


def _sum_dtype(array: jax.Array) -> jnp.dtype:
    return jnp.promote_types(array.dtype, jnp.float32)
