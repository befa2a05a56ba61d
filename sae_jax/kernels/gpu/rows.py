"""Products with chosen rows of a matrix on a GPU (Triton), which gathers each row.

    decode            out_bd = sum_k values_bk w_ld[indices_bk]
    sampled_product   out_bk = x_bd . w_ld[indices_bk]

A program has one row of the result, and reads the rows of w of a few places k at once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sae_jax.kernels.shapes import Ref, declare

PLACES = 16  # k read at once
COLUMNS = 256  # of a row of w, read at once


def decode(
    values_bk: jax.Array,
    indices_bk: jax.Array,
    w_ld: jax.Array,
    *,
    interpret: Any = False,
) -> jax.Array:
    """As `reference.decode`."""
    n_rows, width = values_bk.shape[0], w_ld.shape[1]
    tile = _fit_tile(indices_bk, w_ld)
    return pl.pallas_call(
        functools.partial(_decode, tile),
        grid=(n_rows, pl.cdiv(width, tile[1])),
        out_shape=declare((n_rows, width), jnp.float32, values_bk, indices_bk, w_ld),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(values_bk, indices_bk, w_ld)


def sampled_product(
    x_bd: jax.Array, w_ld: jax.Array, indices_bk: jax.Array, *, interpret: Any = False
) -> jax.Array:
    """As `reference.sampled_product`."""
    n_rows, k = indices_bk.shape
    tile = _fit_tile(indices_bk, w_ld)
    return pl.pallas_call(
        functools.partial(_sampled_product, tile),
        grid=(n_rows, pl.cdiv(k, tile[0])),
        out_shape=declare((n_rows, k), jnp.float32, x_bd, w_ld, indices_bk),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(x_bd, w_ld, indices_bk)


def _fit_tile(indices_bk: jax.Array, w_ld: jax.Array) -> tuple[int, int]:
    sizes = ((PLACES, indices_bk.shape[1]), (COLUMNS, w_ld.shape[1]))
    places, columns = (min(most, pl.next_power_of_2(n)) for most, n in sizes)
    return places, columns


def _decode(
    tile: tuple[int, int], values_ref: Ref, indices_ref: Ref, w_ref: Ref, out_ref: Ref
) -> None:
    row = pl.program_id(0)
    k, width = indices_ref.shape[1], w_ref.shape[1]
    columns = pl.program_id(1) * tile[1] + jnp.arange(tile[1], dtype=jnp.int32)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        places = i * tile[0] + jnp.arange(tile[0], dtype=jnp.int32)
        values = plgpu.load(values_ref.at[row, places], mask=places < k, other=0)
        chosen = _load_chosen(indices_ref, w_ref, row, places, columns)
        return total + jnp.sum(values.astype(jnp.float32)[:, None] * chosen, axis=0)

    zeros = jnp.zeros(tile[1], jnp.float32)
    total = lax.fori_loop(0, pl.cdiv(k, tile[0]), add, zeros)
    plgpu.store(out_ref.at[row, columns], total, mask=columns < width)


def _sampled_product(
    tile: tuple[int, int], x_ref: Ref, w_ref: Ref, indices_ref: Ref, out_ref: Ref
) -> None:
    row = pl.program_id(0)
    k, width = indices_ref.shape[1], w_ref.shape[1]
    places = pl.program_id(1) * tile[0] + jnp.arange(tile[0], dtype=jnp.int32)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        columns = i * tile[1] + jnp.arange(tile[1], dtype=jnp.int32)
        x = plgpu.load(x_ref.at[row, columns], mask=columns < width, other=0)
        chosen = _load_chosen(indices_ref, w_ref, row, places, columns)
        return total + jnp.sum(x.astype(jnp.float32)[None] * chosen, axis=1)

    zeros = jnp.zeros(tile[0], jnp.float32)
    total = lax.fori_loop(0, pl.cdiv(width, tile[1]), add, zeros)
    plgpu.store(out_ref.at[row, places], total, mask=places < k)


def _load_chosen(
    indices_ref: Ref, w_ref: Ref, row: jax.Array, places: jax.Array, columns: jax.Array
) -> jax.Array:
    """w[indices[row, places], columns] in float32, zero past either end."""
    is_place, is_column = places < indices_ref.shape[1], columns < w_ref.shape[1]
    latents = plgpu.load(indices_ref.at[row, places], mask=is_place, other=0)
    chosen = plgpu.load(
        w_ref.at[latents[:, None], columns[None]],
        mask=is_place[:, None] & is_column[None],
        other=0,
    )
    return chosen.astype(jnp.float32)
