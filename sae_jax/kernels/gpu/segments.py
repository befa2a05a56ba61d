"""Weight gradient of a sparse product on a GPU (Triton): entries sorted by latent.

    out_ld[l] = sum over starts_l[l] <= n < starts_l[l + 1] of values_n[n] g[rows_n[n]]

A program has one latent and some columns, and sums its entries a few at a time, in
their order: no atomics, the same bits every time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sae_jax.kernels.shapes import Ref, declare

ENTRIES = 8  # read at once
COLUMNS = 512  # of a row of g, read at once


def segment_outer(
    values_n: jax.Array,
    rows_n: jax.Array,
    starts_l: jax.Array,
    g_bd: jax.Array,
    *,
    interpret: Any = False,
) -> jax.Array:
    """As `reference.segment_outer`."""
    n_latents, width = starts_l.shape[0] - 1, g_bd.shape[1]
    n_columns = min(COLUMNS, pl.next_power_of_2(width))
    return pl.pallas_call(
        functools.partial(_kernel, n_columns),
        grid=(n_latents, pl.cdiv(width, n_columns)),
        out_shape=declare(
            (n_latents, width), jnp.float32, values_n, rows_n, starts_l, g_bd
        ),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
    )(values_n, rows_n, starts_l, g_bd)


def _kernel(
    n_columns: int,
    values_ref: Ref,
    rows_ref: Ref,
    starts_ref: Ref,
    g_ref: Ref,
    out_ref: Ref,
) -> None:
    latent, width = pl.program_id(0), g_ref.shape[1]
    columns = pl.program_id(1) * n_columns + jnp.arange(n_columns, dtype=jnp.int32)
    is_column = columns < width
    start, end = starts_ref[latent], starts_ref[latent + 1]

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        entries = start + i * ENTRIES + jnp.arange(ENTRIES, dtype=jnp.int32)
        is_own = entries < end
        values = plgpu.load(values_ref.at[entries], mask=is_own, other=0)
        rows = plgpu.load(rows_ref.at[entries], mask=is_own, other=0)
        g = plgpu.load(
            g_ref.at[rows[:, None], columns[None]],
            mask=is_own[:, None] & is_column[None],
            other=0,
        )
        terms = values.astype(jnp.float32)[:, None] * g.astype(jnp.float32)
        return total + jnp.sum(terms, axis=0)

    n_reads = lax.div(end - start + ENTRIES - 1, ENTRIES)
    total = lax.fori_loop(0, n_reads, add, jnp.zeros(n_columns, jnp.float32))
    plgpu.store(out_ref.at[latent, columns], total, mask=is_column)
