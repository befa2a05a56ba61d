"""Reading a source window by window, ahead of its use, and giving it step by step.

There are two buffers, each of a window: one that steps are taken from, one that is
being read into. Fresh pages would cost as much as the read. A window stays in its
buffer in the order of its chunks, and each step gathers its rows.
"""

import dataclasses
import queue
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import NamedTuple

import grain
import ml_dtypes
import numpy as np

from sae_jax.loader.order import Order
from sae_jax.loader.sources import Source

_BUFFERS = 2


class Rows(NamedTuple):
    """Rows as the store has them, [lanes, n, D], and for int8 their scales."""

    rows_vnd: np.ndarray  # int8, or bfloat16 seen as uint16, as NumPy moves it slowly
    scales_vn: np.ndarray | None


class Windows:
    """The windows of some lanes of a source, counted from the start of training."""

    def __init__(self, source: Source, order: Order, lanes: Sequence[int]):
        self.order = order
        self._source, self._lanes = source, lanes
        self._free: queue.SimpleQueue[_Buffer | None] = queue.SimpleQueue()
        n_rows = len(lanes) * order.most_rounds * order.rows_per_chunk
        width, is_int8 = source.store.width(source.site), source.store.dtype == "int8"
        for _ in range(_BUFFERS):
            self._free.put(
                _Buffer(
                    np.empty((n_rows, width), np.int8 if is_int8 else np.uint16),
                    np.empty(n_rows, np.float32) if is_int8 else None,
                )
            )

    def steps(
        self, lane_rows: int, start: int, stop: int
    ) -> Generator[Rows, None, None]:
        """The next `lane_rows` rows of each lane, for steps `start` to `stop`."""
        if start >= stop:
            return
        window = self.order.window_of(start * lane_rows)
        last = self.order.window_of(stop * lane_rows - 1)
        begin = self.order.rounds(window).start * self.order.rows_per_chunk
        at, missing = start * lane_rows - begin, lane_rows
        parts: list[Rows] = []
        with closing(self._read_ahead(window, last + 1)) as reads:
            for read in reads:
                while at < read.n_rows and start < stop:
                    n = min(missing, read.n_rows - at)
                    parts.append(read.take(at, at + n))
                    at, missing = at + n, missing - n
                    if not missing:
                        yield join(parts)
                        parts, missing, start = [], lane_rows, start + 1
                at = 0
                self._free.put(read.buffer)

    def __len__(self) -> int:
        return 2**62  # training goes round the store as often as it likes

    def __getitem__(self, window: int) -> "_Window":
        buffer = self._free.get()
        if buffer is None:
            raise RuntimeError("the loader was closed")
        order, chunk_rows = self.order, self.order.rows_per_chunk
        n_rows = len(order.rounds(window)) * chunk_rows
        rows_vn = np.stack([
            i * n_rows + order.rows(window, lane) for i, lane in enumerate(self._lanes)
        ])
        ranges = [
            (chunk * chunk_rows, chunk_rows)
            for lane in self._lanes
            for chunk in order.chunks(window, lane)
        ]
        rows_nd, scales_n = buffer.rows_nd[: rows_vn.size], None
        if buffer.scales_n is not None:
            scales_n = buffer.scales_n[: rows_vn.size]
        if rows_nd.dtype == np.uint16:
            rows_nd = rows_nd.view(ml_dtypes.bfloat16)
        store, site = self._source.store, self._source.site
        store.read_stored(site, ranges, rows_nd, scales_n)
        return _Window(buffer, rows_vn)

    def _read_ahead(
        self, start: int, stop: int
    ) -> Generator["_Window", None, None]:
        """Windows `start` to `stop`, each read by a thread while the last is used."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        elements = grain.MapDataset.source(self)[start:stop].to_iter_dataset(options)
        iterator = iter(elements)
        try:
            yield from iterator
        finally:
            self._free.put(None)  # a thread that waits for a buffer must not for ever
            iterator.close()


def join(parts: Sequence[Rows], axis: int = 1) -> Rows:
    """The rows of all parts, one after the other along an axis."""
    if len(parts) == 1:
        return parts[0]
    rows, scales = zip(*parts, strict=True)
    joined = None if scales[0] is None else np.concatenate(scales, axis)
    return Rows(np.concatenate(rows, axis), joined)


def buffer_bytes(source: Source, order: Order, n_lanes: int) -> int:
    """Bytes that `Windows` of so many lanes hold."""
    width = source.store.width(source.site)
    row_bytes = width + 4 if source.store.dtype == "int8" else 2 * width
    return _BUFFERS * n_lanes * order.most_rounds * order.rows_per_chunk * row_bytes


@dataclasses.dataclass(frozen=True)
class _Buffer:
    rows_nd: np.ndarray
    scales_n: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class _Window:
    """A window in a buffer, and where there the next row of each lane is."""

    buffer: _Buffer
    rows_vn: np.ndarray

    @property
    def n_rows(self) -> int:
        return self.rows_vn.shape[1]

    def take(self, start: int, stop: int) -> Rows:
        """Copies of the rows `start` to `stop` of every lane's stream."""
        rows_vn, scales_n = self.rows_vn[:, start:stop], self.buffer.scales_n
        rows_nd = self.buffer.rows_nd
        taken_vnd = np.empty((*rows_vn.shape, rows_nd.shape[1]), rows_nd.dtype)
        # Any other mode would check first, and copy once more.
        np.take(rows_nd, rows_vn, axis=0, out=taken_vnd, mode="clip")
        return Rows(taken_vnd, None if scales_n is None else np.take(scales_n, rows_vn))
