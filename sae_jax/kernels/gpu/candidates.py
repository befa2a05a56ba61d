"""Encoder product and first stage of choosing K in one GPU kernel (Triton).

    pre = x w^T + bias;  per bucket (latent mod n_buckets) the `kept` largest

(Samaga et al. 2025, arXiv 2506.04165.) A program has a tile of rows and a tile of
buckets. It walks over the chunks of n_buckets latents, each of which has one latent a
bucket, and merges a chunk's pre-activations into the best so far. Both stay in
registers, so only candidates reach memory; the more levels are kept, the fewer buckets
a program can hold.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sae_jax.kernels.best import Best, insert
from sae_jax.kernels.shapes import (
    Ref,
    Refused,
    check_candidates,
    declare,
    product_precision,
)

SMALLEST = 16  # side of a matrix product
BUCKETS_OF_KEPT = {1: 128, 2: 64, 3: 32, 4: 32}  # beside 128 rows, of 2-byte factors
STEP_BYTES = 128  # of a row, multiplied at a time


def bucket_candidates(
    x_bd: jax.Array,
    w_ld: jax.Array,
    bias_l: jax.Array,
    n_buckets: int,
    kept: int,
    *,
    row_tile: int = 128,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.bucket_candidates`, for n_buckets a power of two from 16."""
    check_candidates(x_bd, w_ld, bias_l, n_buckets, kept)
    if n_buckets < SMALLEST or n_buckets & (n_buckets - 1):
        raise Refused(
            f"n_buckets is {n_buckets}: choose a power of two, {SMALLEST} or more"
        )
    n_rows, columns = x_bd.shape[0], kept * n_buckets
    tile = (
        min(row_tile, max(pl.next_power_of_2(n_rows), SMALLEST)),
        min(BUCKETS_OF_KEPT[kept] * 2 // x_bd.dtype.itemsize, n_buckets),
    )
    values, indices = pl.pallas_call(
        functools.partial(_kernel, n_buckets, kept, tile),
        grid=(pl.cdiv(n_rows, tile[0]), n_buckets // tile[1]),
        out_shape=[
            declare((n_rows, columns), dtype, x_bd, w_ld, bias_l)
            for dtype in (jnp.float32, jnp.int32)
        ],
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
    )(x_bd, w_ld, bias_l.astype(jnp.float32))
    return values, indices


def _kernel(
    n_buckets: int,
    kept: int,
    tile: tuple[int, int],
    x_ref: Ref,
    w_ref: Ref,
    bias_ref: Ref,
    values_ref: Ref,
    indices_ref: Ref,
) -> None:
    n_rows, n_latents = x_ref.shape[0], w_ref.shape[0]
    rows = pl.program_id(0) * tile[0] + jnp.arange(tile[0], dtype=jnp.int32)
    buckets = pl.program_id(1) * tile[1] + jnp.arange(tile[1], dtype=jnp.int32)

    def merge(chunk: jax.Array, best: Best) -> Best:
        latents = chunk * n_buckets + buckets
        is_latent = latents < n_latents
        # What lies past the end is read at the end, and is no candidate.
        pre = _multiply(
            x_ref,
            jnp.minimum(rows, n_rows - 1),
            w_ref,
            jnp.minimum(latents, n_latents - 1),
        )
        bias = plgpu.load(bias_ref.at[latents], mask=is_latent, other=-jnp.inf)
        return insert(best, pre + bias[None], latents[None])

    empty = (jnp.full(tile, -jnp.inf, jnp.float32), jnp.zeros(tile, jnp.int32))
    best = lax.fori_loop(0, pl.cdiv(n_latents, n_buckets), merge, [empty] * kept)
    is_row = jnp.broadcast_to((rows < n_rows)[:, None], tile)
    for level, (values, indices) in enumerate(best):
        slot = (rows[:, None], level * n_buckets + buckets[None])
        plgpu.store(values_ref.at[slot], values, mask=is_row)
        plgpu.store(indices_ref.at[slot], indices, mask=is_row)


def _multiply(
    x_ref: Ref, rows: jax.Array, w_ref: Ref, latents: jax.Array
) -> jax.Array:
    """x[rows] w[latents]^T, a slice of D at a time."""
    width = x_ref.shape[1]
    step = STEP_BYTES // x_ref.dtype.itemsize

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        columns = i * step + jnp.arange(step, dtype=jnp.int32)
        return total + lax.dot_general(
            _load(x_ref, rows, columns),
            _load(w_ref, latents, columns),
            (((1,), (1,)), ((), ())),
            precision=product_precision(x_ref.dtype),
            preferred_element_type=jnp.float32,
        )

    zeros = jnp.zeros((rows.size, latents.size), jnp.float32)
    return lax.fori_loop(0, pl.cdiv(width, step), add, zeros)


def _load(ref: Ref, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """ref[rows, columns], zero past the last column."""
    width = ref.shape[1]
    tile = ref.at[rows[:, None], columns[None]]
    if width % columns.size == 0:
        return plgpu.load(tile)
    is_column = jnp.broadcast_to((columns < width)[None], (rows.size, columns.size))
    return plgpu.load(tile, mask=is_column, other=0)
