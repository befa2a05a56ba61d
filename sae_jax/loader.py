"""Batches of rows in the order of training, from a store to the device mesh.

The rows of step s depend on the seed and s alone, for any number of processes. Let
there be C train chunks of R rows, V lanes, W chunks in a window, B rows in a batch:

* Epoch e has a permutation of the C chunks, and lane v takes every V-th of them from
  the v-th on, W at a time: a window. An epoch has C // (V W) windows a lane, so up to
  V W - 1 chunks, other ones each time, sit an epoch out.
* The W R rows of a window are permuted. Each step takes the next B / V of every lane.

So step s reads window s (B / V) // (W R), counted from the start of training, of all
lanes. Process p of P loads the lanes p, p + P, ... A loader's state is the step.

Host memory: V W R D 2 bytes for a window of all lanes (134 MB at V = W = 8, R = D =
1024), divided by P, times six: three windows read ahead, one in use, and the buffer of
each of two reading threads.
"""

import functools
import threading
from collections.abc import Iterator, Sequence

import grain
import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from sae_jax.config import DataConfig
from sae_jax.mesh import DATA, batch_sharding
from sae_jax.store import Store

_THREADS = 2
_WAITING = 3
_SAMPLE_CHUNKS = 64
# Streams of random numbers that must not meet.
_EPOCH, _WINDOW, _SAMPLE = range(3)


def train_batches(
    store: Store,
    site: str | None,
    data: DataConfig,
    mesh: Mesh,
    seed: int,
    start_step: int,
    n_steps: int,
) -> Iterator[jax.Array]:
    """The batches [B, D] of steps `start_step` to `start_step + n_steps`.

    Each is bfloat16, its rows over the mesh's data axis. Raises ValueError as
    `check_loader` does.
    """
    process, n_processes = _find_process(mesh, data.batch_rows)
    rows_per_chunk = store.manifest.rows_per_chunk
    check_loader(len(store.chunks("train")), rows_per_chunk, data, n_processes)
    lanes = range(process, data.lanes, n_processes)
    windows = Windows(store, store.site(site), data, seed, lanes)
    steps = steps_per_window(rows_per_chunk, data)
    stop_step = start_step + n_steps
    step = start_step
    for batches in _read_ahead(windows, start_step // steps, -(-stop_step // steps)):
        for batch in batches[step % steps : step % steps + stop_step - step]:
            yield _place(batch, data.batch_rows, mesh)
            step += 1


def sample_rows(store: Store, site: str | None, n_rows: int, seed: int) -> np.ndarray:
    """Train rows spread over the store, float32 [n, D]; all there are if fewer.

    The rows come from at least 64 chunks, where there are so many.
    """
    rng = _make_rng(seed, _SAMPLE)
    rows_per_chunk = store.manifest.rows_per_chunk
    chunks = [
        (start + offset, min(rows_per_chunk, rows - offset))
        for start, rows in store.shards("train")
        for offset in range(0, rows, rows_per_chunk)
    ]
    n_rows = min(n_rows, store.rows("train"))
    # One more than needed by count, as one may be a part of a chunk.
    n_chunks = min(len(chunks), max(_SAMPLE_CHUNKS, n_rows // rows_per_chunk + 2))
    chosen = [chunks[i] for i in sorted(rng.permutation(len(chunks))[:n_chunks])]
    available = sum(n for _, n in chosen)
    rows = np.sort(rng.permutation(available)[:n_rows])
    sample, first = [], 0
    for chunk in chosen:
        inside = rows[(rows >= first) & (rows < first + chunk[1])] - first
        sample.append(store.read_ranges(store.site(site), [chunk])[inside])
        first += chunk[1]
    return np.concatenate(sample).astype(np.float32)


def check_loader(
    n_chunks: int, rows_per_chunk: int, data: DataConfig, n_processes: int
) -> None:
    """ValueError, one line, unless all lanes can be walked in whole steps."""
    rows_per_window = data.window_chunks * rows_per_chunk
    rows_per_lane = data.batch_rows // data.lanes
    if n_chunks < data.lanes:
        raise ValueError(
            f"the store has {n_chunks} train chunks for data.lanes = {data.lanes}: "
            f"lower data.lanes to at most {n_chunks}, or harvest more text"
        )
    if n_chunks < data.lanes * data.window_chunks:
        raise ValueError(
            f"the store has {n_chunks} train chunks, and data.lanes = {data.lanes} "
            f"times data.window_chunks = {data.window_chunks} are more: lower "
            f"data.window_chunks to at most {n_chunks // data.lanes}, or data.lanes"
        )
    window = f"a window of data.window_chunks * {rows_per_chunk} = {rows_per_window}"
    step = f"the data.batch_rows / data.lanes = {rows_per_lane} of a step"
    if rows_per_window < rows_per_lane:
        raise ValueError(
            f"{window} rows is less than {step}: lower data.batch_rows to at most "
            f"{rows_per_window * data.lanes}, or raise data.window_chunks"
        )
    if rows_per_window % rows_per_lane:
        fits = next(n for n in range(rows_per_lane, 0, -1) if not rows_per_window % n)
        raise ValueError(
            f"{window} rows is not a multiple of {step}: lower data.batch_rows to "
            f"{fits * data.lanes}"
        )
    if data.lanes % n_processes:
        raise ValueError(
            f"data.lanes = {data.lanes} is not a multiple of the {n_processes} "
            "processes that load: every process takes the same number of lanes"
        )


def n_loading_processes(mesh: Mesh, batch_rows: int) -> int:
    """How many groups of processes load different rows of each batch."""
    return _find_process(mesh, batch_rows)[1]


def steps_per_window(rows_per_chunk: int, data: DataConfig) -> int:
    return data.window_chunks * rows_per_chunk * data.lanes // data.batch_rows


class Windows:
    """Window g of the given lanes, as batches: [steps, lanes * B / V, D] bfloat16."""

    def __init__(
        self,
        store: Store,
        site: str,
        data: DataConfig,
        seed: int,
        lanes: Sequence[int],
    ):
        self._store, self._site, self._data = store, site, data
        self._seed, self._lanes = seed, lanes
        self._chunks = store.chunks("train")
        # Each thread reads into a buffer of its own, again and again: fresh pages
        # would cost as much as the read.
        self._buffers = threading.local()

    def __len__(self) -> int:
        return 2**62  # training goes round the store as often as it likes

    def __getitem__(self, g: int) -> np.ndarray:
        data, n_lanes = self._data, len(self._lanes)
        per_epoch = len(self._chunks) // (data.lanes * data.window_chunks)
        epoch, window = divmod(g, per_epoch)
        rows_nd = self._read(epoch, window)
        n_rows = len(rows_nd) // n_lanes
        # Which row goes to each [lane, step, place in the lane's part of the batch].
        rows = np.concatenate([
            i * n_rows + self._permute_rows(epoch, window, lane, n_rows)
            for i, lane in enumerate(self._lanes)
        ]).reshape(n_lanes, -1, data.batch_rows // data.lanes)
        # As uint16, because NumPy moves bfloat16 slowly.
        batches = np.take(rows_nd.view(np.uint16), rows.swapaxes(0, 1), axis=0)
        shape = (rows.shape[1], -1, rows_nd.shape[1])
        return batches.reshape(shape).view(rows_nd.dtype)

    def _read(self, epoch: int, window: int) -> np.ndarray:
        lanes, n = self._data.lanes, self._data.window_chunks
        order = _permute_chunks(self._seed, epoch, len(self._chunks))
        ranges = [
            self._chunks[chunk]
            for lane in self._lanes
            for chunk in order[lane::lanes][window * n : (window + 1) * n]
        ]
        if not hasattr(self._buffers, "rows_nd"):
            shape = (sum(n for _, n in ranges), self._store.width(self._site))
            self._buffers.rows_nd = np.empty(shape, ml_dtypes.bfloat16)
        return self._store.read_ranges(self._site, ranges, self._buffers.rows_nd)

    def _permute_rows(self, epoch: int, window: int, lane: int, n: int) -> np.ndarray:
        return _make_rng(self._seed, _WINDOW, epoch, window, lane).permutation(n)


def _read_ahead(windows: Windows, start: int, stop: int) -> Iterator[np.ndarray]:
    """Windows `start` to `stop`, in order, read by threads ahead of their use."""
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_WAITING)
    elements = grain.MapDataset.source(windows)[start:stop].to_iter_dataset(options)
    iterator = iter(elements)
    try:
        yield from iterator
    finally:
        iterator.close()


def _find_process(mesh: Mesh, batch_rows: int) -> tuple[int, int]:
    """(p, P): of P groups of processes that hold different rows, ours is the p-th.

    Processes that share rows, as when the latent axis crosses them, load the same.
    """
    n_data = mesh.shape[DATA]
    if batch_rows % n_data:
        raise ValueError(
            f"a batch of {batch_rows} rows does not divide by mesh.data = {n_data}"
        )
    held: dict[int, set[int]] = {}
    for (place, _), device in np.ndenumerate(mesh.devices):
        held.setdefault(device.process_index, set()).add(place)
    groups = sorted({tuple(sorted(places)) for places in held.values()})
    if len(groups) * len(groups[0]) != n_data:
        raise ValueError(
            f"mesh.data = {n_data} divides over {len(held)} processes unevenly: let "
            "one be a multiple of the other"
        )
    return groups.index(tuple(sorted(held[jax.process_index()]))), len(groups)


def _place(rows: np.ndarray, batch_rows: int, mesh: Mesh) -> jax.Array:
    shape = (batch_rows, rows.shape[1])
    return jax.make_array_from_process_local_data(batch_sharding(mesh), rows, shape)


@functools.lru_cache(maxsize=2)
def _permute_chunks(seed: int, epoch: int, n_chunks: int) -> np.ndarray:
    return _make_rng(seed, _EPOCH, epoch).permutation(n_chunks)


def _make_rng(seed: int, *stream: int) -> np.random.Generator:
    """The generator of one stream of a seed, the same on every platform."""
    sequence = np.random.SeedSequence(seed, spawn_key=stream)
    return np.random.Generator(np.random.Philox(sequence))
