"""Encoder product and first stage of choosing K in one TPU kernel.

    pre = x w^T + bias;  per bucket (latent mod n_buckets) the `kept` largest

(Samaga et al. 2025, arXiv 2506.04165.) For a tile of rows the best of each bucket stay
in VMEM, as the output block that every tile of latents revisits. A tile's
pre-activations are merged into them while they lie in VMEM, so only candidates reach
HBM. Lanes are buckets: 128 columns of the tile meet the 128 buckets that their latents
belong to, and no value moves between lanes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sae_jax.kernels.best import insert
from sae_jax.kernels.shapes import (
    Ref,
    Refused,
    check_candidates,
    declare,
    product_precision,
)
from sae_jax.kernels.tpu.memory import LANES, VMEM_LIMIT, round_up

VMEM_BUDGET = VMEM_LIMIT * 7 // 8  # the compiler spills into the rest
STEP_BYTES = 1024  # of a row, multiplied at a time
GROUP_ROWS = 16  # merged at a time: their best fit in registers


def bucket_candidates(
    x_bd: jax.Array,
    w_ld: jax.Array,
    bias_l: jax.Array,
    n_buckets: int,
    kept: int,
    *,
    row_tile: int = 1024,
    latent_tile: int = 1024,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """As `reference.bucket_candidates`, for n_buckets a multiple of 128.

    Tiles are halved until they fit in VMEM. w is read from HBM once a row tile.
    """
    check_candidates(x_bd, w_ld, bias_l, n_buckets, kept)
    if n_buckets % LANES:
        raise Refused(f"n_buckets is {n_buckets}: choose a multiple of {LANES}")
    (n_rows, width), n_latents = x_bd.shape, w_ld.shape[0]
    columns = kept * n_buckets
    rows, latents = _fit_tiles(
        round_up(min(row_tile, n_rows), GROUP_ROWS),
        round_up(min(latent_tile, n_latents), LANES),
        width * x_bd.dtype.itemsize,
        n_buckets,
        kept,
    )
    n_tiles = pl.cdiv(n_latents, latents)
    # Past the last latent w is undefined: -inf, or NaN, is never a candidate.
    bias_1l = jnp.pad(
        bias_l.astype(jnp.float32)[None],
        ((0, 0), (0, n_tiles * latents - n_latents)),
        constant_values=-jnp.inf,
    )
    # Read and written once a row tile: a second buffer would hide next to nothing.
    once = pl.Buffered(1)
    best = pl.BlockSpec((rows, columns), lambda i, j: (i, 0), pipeline_mode=once)
    values, indices = pl.pallas_call(
        functools.partial(_kernel, n_buckets, kept),
        grid=(pl.cdiv(n_rows, rows), n_tiles),
        in_specs=[
            pl.BlockSpec((rows, width), lambda i, j: (i, 0), pipeline_mode=once),
            pl.BlockSpec((latents, width), lambda i, j: (j, 0)),
            pl.BlockSpec((1, latents), lambda i, j: (0, j)),
        ],
        out_specs=[best, best],
        out_shape=[
            declare((n_rows, columns), dtype, x_bd, w_ld, bias_l)
            for dtype in (jnp.float32, jnp.int32)
        ],
        scratch_shapes=[pltpu.VMEM((rows, latents), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        interpret=interpret,
    )(x_bd, w_ld, bias_1l)
    return values, indices


def _kernel(
    n_buckets: int,
    kept: int,
    x_ref: Ref,
    w_ref: Ref,
    bias_ref: Ref,
    values_ref: Ref,
    indices_ref: Ref,
    pre_ref: Ref,
) -> None:
    n_rows, n_latents = pre_ref.shape
    first = pl.program_id(1) * n_latents

    @pl.when(first == 0)
    def _() -> None:
        values_ref[...] = jnp.full(values_ref.shape, -jnp.inf, jnp.float32)
        indices_ref[...] = jnp.zeros(indices_ref.shape, jnp.int32)

    _multiply(x_ref, w_ref, pre_ref)

    @pl.loop(0, n_rows // GROUP_ROWS)
    def _(group: jax.Array) -> None:
        rows = pl.ds(pl.multiple_of(group * GROUP_ROWS, GROUP_ROWS), GROUP_ROWS)
        n_own = min(n_latents, n_buckets)  # buckets that the tile's latents are in
        for bucket in range(0, n_own, LANES):
            own = lax.rem(first, jnp.int32(n_buckets)) + bucket
            slots = [
                (rows, pl.ds(pl.multiple_of(level * n_buckets + own, LANES), LANES))
                for level in range(kept)
            ]
            best = [(values_ref[slot], indices_ref[slot]) for slot in slots]
            for column in range(bucket, n_latents, n_own):
                lanes = pl.ds(column, LANES)
                pre = pre_ref[rows, lanes] + bias_ref[:, lanes]
                lane = lax.broadcasted_iota(jnp.int32, pre.shape, 1)
                best = insert(best, pre, first + column + lane)
            for slot, (value, index) in zip(slots, best):
                values_ref[slot] = value
                indices_ref[slot] = index


def _multiply(x_ref: Ref, w_ref: Ref, pre_ref: Ref) -> None:
    """x w^T, a slice of D at a time: of the whole, the parts of float32 would spill."""
    width = x_ref.shape[1]
    step = STEP_BYTES // x_ref.dtype.itemsize
    pre_ref[...] = jnp.zeros(pre_ref.shape, jnp.float32)

    def add(columns: Any) -> None:
        pre_ref[...] += lax.dot_general(
            x_ref[:, columns],
            w_ref[:, columns],
            (((1,), (1,)), ((), ())),
            precision=product_precision(x_ref.dtype),
            preferred_element_type=jnp.float32,
        )

    if width >= step:
        pl.loop(0, width // step)(
            lambda i: add(pl.ds(pl.multiple_of(i * step, step), step))
        )
    if width % step:
        add(slice(width - width % step, width))


def _fit_tiles(
    rows: int, latents: int, row_bytes: int, n_buckets: int, kept: int
) -> tuple[int, int]:
    """The tile of at most these sizes that fits: the larger side is halved until then.

    Refused where the smallest does not.
    """
    while True:
        whole = _whole_buckets(latents, n_buckets)
        inputs = (rows + 2 * whole) * row_bytes  # a second tile of w is on its way
        if inputs + 4 * rows * whole + 8 * rows * kept * n_buckets <= VMEM_BUDGET:
            return rows, whole
        if rows > GROUP_ROWS and (rows >= whole or whole == LANES):
            rows = round_up(rows // 2, GROUP_ROWS)
        elif whole > LANES:
            latents = whole // 2
        else:
            raise Refused(
                f"the {kept} best of {n_buckets} buckets do not fit in VMEM beside "
                f"rows of {row_bytes} bytes: choose fewer buckets"
            )


def _whole_buckets(most: int, n_buckets: int) -> int:
    """A tile that holds each bucket equally often, or divides the buckets equally."""
    if n_buckets <= most:
        return most // n_buckets * n_buckets
    sizes = range(LANES, max(most, LANES) + 1, LANES)
    return max(size for size in sizes if n_buckets % size == 0)
