"""Products with chosen rows of a matrix on a TPU, which fetches each row from HBM.

    decode            out_bd = sum_k values_bk w_ld[indices_bk]
    sampled_product   out_bk = x_bd . w_ld[indices_bk]

Rows are handled in groups of 8, a vector register's height. A wave is the chosen rows
of w at a few places k for one group: one copy for each, into place k's [8, D]. The
next wave, of the next group too, is on its way while one is multiplied.

w is float32: a copy moves whole 32-bit words, and narrower rows share theirs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sae_jax.kernels.shapes import Ref, Refused, declare
from sae_jax.kernels.tpu.memory import LANES, SUBLANES, VMEM_LIMIT, round_up

GROUP = SUBLANES  # rows
WAVE = 8  # places k
SMEM_WORDS = 2**15  # for a tile's indices, of which SMEM holds two


def decode(
    values_bk: jax.Array,
    indices_bk: jax.Array,
    w_ld: jax.Array,
    *,
    row_tile: int = 128,
    interpret: Any = False,
) -> jax.Array:
    """As `reference.decode`, for float32 w."""
    n_rows, wave = indices_bk.shape[0], min(WAVE, indices_bk.shape[1])
    out_bd = _call(
        _add_rows,
        _pad(values_bk, wave),
        _pad(indices_bk, wave),
        w_ld,
        w_ld.shape[1],
        row_tile,
        interpret,
    )
    return out_bd[:n_rows]


def sampled_product(
    x_bd: jax.Array,
    w_ld: jax.Array,
    indices_bk: jax.Array,
    *,
    row_tile: int = 128,
    interpret: Any = False,
) -> jax.Array:
    """As `reference.sampled_product`, for float32 w."""
    n_rows, k = indices_bk.shape
    indices_bk = _pad(indices_bk, min(WAVE, k))
    out_bk = _call(
        _place_products,
        _pad(x_bd, 1),
        indices_bk,
        w_ld,
        indices_bk.shape[1],
        row_tile,
        interpret,
    )
    return out_bk[:n_rows, :k]


def _pad(array_bn: jax.Array, multiple: int) -> jax.Array:
    """Whole groups of rows, whole waves: what is added is zero and points to row 0."""
    n_rows, n = array_bn.shape
    return jnp.pad(array_bn, ((0, -n_rows % GROUP), (0, -n % multiple)))


def _call(
    multiply: Callable[..., None],
    own_bn: jax.Array,
    indices_bk: jax.Array,
    w_ld: jax.Array,
    n_columns: int,
    row_tile: int,
    interpret: Any,
) -> jax.Array:
    """`multiply` of each wave, into [B, n_columns]; `own_bn` is what the rows bring."""
    if w_ld.dtype != jnp.float32:
        raise Refused(f"the matrix is {w_ld.dtype}: cast it to float32")
    n_rows, k = indices_bk.shape
    fitting = SMEM_WORDS // round_up(k, LANES) // GROUP * GROUP
    rows = min(round_up(row_tile, GROUP), n_rows, max(fitting, GROUP))
    return pl.pallas_call(
        functools.partial(_kernel, multiply, n_rows),
        grid=(pl.cdiv(n_rows, rows),),
        in_specs=[
            pl.BlockSpec((rows, k), lambda i: (i, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec((rows, own_bn.shape[1]), lambda i: (i, 0)),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=pl.BlockSpec((rows, n_columns), lambda i: (i, 0)),
        out_shape=declare((n_rows, n_columns), jnp.float32, own_bn, indices_bk, w_ld),
        scratch_shapes=[
            pltpu.VMEM((2, min(WAVE, k), GROUP, w_ld.shape[1]), jnp.float32),
            pltpu.SemaphoreType.DMA((2,)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret,
    )(indices_bk, own_bn.astype(jnp.float32), w_ld)


def _kernel(
    multiply: Callable[..., None],
    n_rows: int,
    indices_ref: Ref,
    own_ref: Ref,
    w_ref: Ref,
    out_ref: Ref,
    chosen_ref: Ref,
    semaphores: Ref,
) -> None:
    n_tile, k = indices_ref.shape
    wave = chosen_ref.shape[1]
    waves_of_group = k // wave
    n_own = jnp.minimum(n_tile, n_rows - pl.program_id(0) * n_tile)
    n_waves = lax.div(n_own, GROUP) * waves_of_group

    def place(number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first row and the first k of a wave."""
        row = lax.div(number, waves_of_group) * GROUP
        return row, lax.rem(number, waves_of_group) * wave

    def each_copy(number: jax.Array, act: Callable[[Any], None]) -> None:
        (first_row, first_k), slot = place(number), lax.rem(number, 2)

        @pl.loop(0, GROUP)
        def _(row: jax.Array) -> None:
            for i in range(wave):
                latent = indices_ref[first_row + row, first_k + i]
                copy = pltpu.make_async_copy(
                    w_ref.at[pl.ds(latent, 1)],
                    chosen_ref.at[slot, i, pl.ds(row, 1)],
                    semaphores.at[slot],
                )
                act(copy)

    out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)
    each_copy(jnp.int32(0), lambda copy: copy.start())

    @pl.loop(0, n_waves)
    def _(number: jax.Array) -> None:
        pl.when(number + 1 < n_waves)(
            lambda: each_copy(number + 1, lambda copy: copy.start())
        )
        each_copy(number, lambda copy: copy.wait())
        row, first_k = place(number)
        rows = pl.ds(pl.multiple_of(row, GROUP), GROUP)
        multiply(own_ref, chosen_ref.at[lax.rem(number, 2)], out_ref, rows, first_k)


def _add_rows(
    values_ref: Ref, chosen_ref: Ref, out_ref: Ref, rows: Any, first_k: jax.Array
) -> None:
    """To each row, its values at the wave's places times what they chose."""
    values = values_ref[rows, :]
    places = lax.broadcasted_iota(jnp.int32, values.shape, 1)
    total = out_ref[rows, :]
    for i in range(chosen_ref.shape[0]):
        # The column first_k + i, which no register can be indexed by.
        of_place = jnp.where(places == first_k + i, values, 0)
        total += jnp.sum(of_place, axis=1, keepdims=True) * chosen_ref[i]
    out_ref[rows, :] = total


def _place_products(
    x_ref: Ref, chosen_ref: Ref, out_ref: Ref, rows: Any, first_k: jax.Array
) -> None:
    """In each row, at the wave's places, its products with what they chose."""
    x = x_ref[rows, :]
    products = out_ref[rows, :]
    places = lax.broadcasted_iota(jnp.int32, products.shape, 1)
    for i in range(chosen_ref.shape[0]):
        product = jnp.sum(x * chosen_ref[i], axis=1, keepdims=True)
        products = jnp.where(places == first_k + i, product, products)
    out_ref[rows, :] = products
