"""Weight gradient of a sparse product on a TPU: sums over entries sorted by latent.

    out_ld[l] = sum over starts_l[l] <= n < starts_l[l + 1] of values_n[n] g[rows_n[n]]

No two tiles of the result share a latent, and each sum is taken in the order of its
entries: no atomics, the same bits every time. A slab of g's columns lies in VMEM, all
rows of it, so that an entry reads its row there. The entries pass through scalar
memory a chunk at a time, each on its way while the chunk before it is summed, in one
stream over all tiles of latents: a tile may own no entry, or all of them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sae_jax.kernels.shapes import Ref, Refused, declare
from sae_jax.kernels.tpu.memory import LANES, SUBLANES, VMEM_LIMIT, round_up

SLAB_BYTES = VMEM_LIMIT * 3 // 4  # of g's columns
CHUNK = 1024  # entries


def segment_outer(
    values_n: jax.Array,
    rows_n: jax.Array,
    starts_l: jax.Array,
    g_bd: jax.Array,
    *,
    latent_tile: int = 256,
    width_tile: int = 1024,
    interpret: Any = False,
) -> jax.Array:
    """As `reference.segment_outer`, for at most 86016 rows.

    The entries are read from HBM once a slab of g.
    """
    n_latents, (n_rows, width) = starts_l.shape[0] - 1, g_bd.shape
    tile = (
        round_up(min(latent_tile, n_latents), LANES),
        _fit_slab(n_rows, min(width_tile, round_up(width, LANES))),
    )
    bounds_2l = jnp.stack([starts_l[:-1], starts_l[1:]])
    return pl.pallas_call(
        functools.partial(_kernel, n_latents),
        grid=(pl.cdiv(width, tile[1]), pl.cdiv(n_latents, tile[0])),
        in_specs=[
            pl.BlockSpec((2, tile[0]), lambda d, j: (0, j), memory_space=pltpu.SMEM),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(memory_space=pl.ANY),
            pl.BlockSpec(
                (n_rows, tile[1]), lambda d, j: (0, d), pipeline_mode=pl.Buffered(1)
            ),
        ],
        out_specs=pl.BlockSpec(tile, lambda d, j: (j, d)),
        out_shape=declare(
            (n_latents, width), jnp.float32, values_n, rows_n, starts_l, g_bd
        ),
        scratch_shapes=[
            pltpu.SMEM((2, CHUNK), jnp.float32),
            pltpu.SMEM((2, CHUNK), jnp.int32),
            pltpu.SMEM((1,), jnp.int32),
            pltpu.SemaphoreType.DMA((2, 2)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        interpret=interpret,
    )(
        bounds_2l,
        _in_chunks(values_n.astype(jnp.float32)),
        _in_chunks(rows_n),
        g_bd.astype(jnp.float32),
    )


def _in_chunks(entries_n: jax.Array) -> jax.Array:
    padded = jnp.pad(entries_n, (0, -entries_n.shape[0] % CHUNK))
    return padded.reshape(-1, CHUNK)


def _fit_slab(n_rows: int, width_tile: int) -> int:
    """Columns of g that fit in VMEM, in whole lanes."""
    fitting = SLAB_BYTES // (4 * round_up(n_rows, SUBLANES)) // LANES * LANES
    if not fitting:
        raise Refused(
            f"{n_rows} rows do not fit in VMEM: pass at most {SLAB_BYTES // 4 // LANES}"
        )
    return min(width_tile, fitting)


def _kernel(
    n_latents: int,
    bounds_ref: Ref,
    values_hbm: Ref,
    rows_hbm: Ref,
    g_ref: Ref,
    out_ref: Ref,
    values_ref: Ref,
    rows_ref: Ref,
    now_ref: Ref,
    semaphores: Ref,
) -> None:
    first_latent = pl.program_id(1) * out_ref.shape[0]
    n_own = jnp.minimum(out_ref.shape[0], n_latents - first_latent)
    # lax.div: `//` also asks for signs.
    first_chunk = lax.div(bounds_ref[0, 0], CHUNK)
    end_chunk = lax.div(bounds_ref[1, n_own - 1] + CHUNK - 1, CHUNK)
    entries = _Stream(
        (values_hbm, rows_hbm), (values_ref, rows_ref), now_ref, semaphores
    )
    pl.when(pl.program_id(1) == 0)(lambda: entries.open(first_chunk))
    out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)

    @pl.loop(first_chunk, end_chunk)
    def _(chunk: jax.Array) -> None:
        entries.move_to(chunk)
        slot, first = lax.rem(chunk, 2), chunk * CHUNK

        def add_entry(entry: jax.Array, sum_1d: jax.Array) -> jax.Array:
            g_1d = g_ref[pl.ds(rows_ref[slot, entry], 1), :]
            return sum_1d + values_ref[slot, entry] * g_1d

        @pl.loop(0, n_own)
        def _(latent: jax.Array) -> None:
            begin = jnp.maximum(bounds_ref[0, latent] - first, 0)
            stop = jnp.minimum(bounds_ref[1, latent] - first, CHUNK)

            @pl.when(begin < stop)
            def _() -> None:
                own = pl.ds(latent, 1)
                out_ref[own, :] = lax.fori_loop(
                    begin, stop, add_entry, out_ref[own, :]
                )

    pl.when(pl.program_id(1) == pl.num_programs(1) - 1)(entries.close)


class _Stream(NamedTuple):
    """Chunks from HBM [chunks, CHUNK] into two slots, in order.

    The chunk after the one that `move_to` was last called with is always on its way.
    """

    sources: tuple[Ref, ...]
    slots: tuple[Ref, ...]  # each [2, CHUNK]
    now: Ref  # [1], the chunk last moved to
    semaphores: Ref  # [2, sources]

    def open(self, chunk: jax.Array) -> None:
        self.now[0] = chunk - 1
        self._start(chunk)

    def move_to(self, chunk: jax.Array) -> None:
        @pl.when(chunk > self.now[0])
        def _() -> None:
            self._wait(chunk)
            self.now[0] = chunk
            self._start(chunk + 1)

    def close(self) -> None:
        self._wait(self.now[0] + 1)

    def _start(self, chunk: jax.Array) -> None:
        self._each(chunk, lambda copy: copy.start())

    def _wait(self, chunk: jax.Array) -> None:
        self._each(chunk, lambda copy: copy.wait())

    def _each(self, chunk: jax.Array, act: Callable[[Any], None]) -> None:
        @pl.when(chunk < self.sources[0].shape[0])
        def _() -> None:
            slot = lax.rem(chunk, 2)
            for i, (source, slots) in enumerate(zip(self.sources, self.slots)):
                semaphore = self.semaphores.at[slot, i]
                act(
                    pltpu.make_async_copy(source.at[chunk], slots.at[slot], semaphore)
                )
