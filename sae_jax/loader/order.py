"""The order of a source's rows: a function of (seed, step) and nothing else.

Let a source have C train chunks of R rows, V lanes and windows of W chunks. Epoch e has
a permutation of the C chunks. The epochs one after the other are one endless stream of
chunks, of which lane v takes every V-th from the v-th on: its chunk of round r is

    permutation of epoch e [i], where e, i = divmod(r V + v, C)

The rounds of epoch e are those from ceil(e C / V) up to ceil((e + 1) C / V). They are
cut as evenly as can be into windows of at most W (of two, where W = 1 and V does not
divide C), the same number in every epoch. A lane's rows of a window are permuted, and
its windows one after the other are the lane's stream of rows. Of that, each step takes
the next b = batch_rows / lanes, so a step may begin in one window and end in another,
and nothing has to divide anything: no row is left out of an epoch.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

# Streams of random numbers that must not meet.
_EPOCH, _WINDOW, SAMPLE, MEASURE = range(4)

_EPOCHS_KEPT = 2  # chunks of a window are of one epoch and, at its end, of the next


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of one source: C, R, V and W as above, and which source it is."""

    n_chunks: int
    rows_per_chunk: int
    n_lanes: int
    window_chunks: int
    seed: int
    source: int = 0

    @property
    def windows_per_epoch(self) -> int:
        n = -(-self.n_chunks // (self.n_lanes * self.window_chunks))
        return min(n, self.n_chunks // self.n_lanes)  # none without a round

    @property
    def most_rounds(self) -> int:
        """Rounds of the longest window."""
        return -(-self._first_round(1) // self.windows_per_epoch)

    @property
    def least_rounds(self) -> int:
        """Rounds of the shortest window."""
        return self.n_chunks // self.n_lanes // self.windows_per_epoch

    @property
    def kept_bytes(self) -> int:
        """Bytes of the permutations that are kept."""
        return _EPOCHS_KEPT * self.n_chunks * np.dtype(int).itemsize

    def rounds(self, window: int) -> range:
        """The rounds of a window, windows being counted from the start of training."""
        epoch, place = divmod(window, self.windows_per_epoch)
        first, stop = self._first_round(epoch), self._first_round(epoch + 1)
        n = self.windows_per_epoch
        length = stop - first
        return range(first + place * length // n, first + (place + 1) * length // n)

    def window_of(self, lane_row: int) -> int:
        """The window that holds this row of each lane's stream."""
        chunk_round = lane_row // self.rows_per_chunk
        epoch = chunk_round * self.n_lanes // self.n_chunks
        first, stop = self._first_round(epoch), self._first_round(epoch + 1)
        n = self.windows_per_epoch
        place = ((chunk_round - first + 1) * n - 1) // (stop - first)
        return epoch * n + place

    def chunks(self, window: int, lane: int) -> list[int]:
        """The chunk of the lane in each round of the window."""
        places = [
            divmod(r * self.n_lanes + lane, self.n_chunks) for r in self.rounds(window)
        ]
        return [int(self._permute_chunks(epoch)[i]) for epoch, i in places]

    def rows(self, window: int, lane: int) -> np.ndarray:
        """Places among the rows of those chunks, in the order of the lane's stream."""
        n = len(self.rounds(window)) * self.rows_per_chunk
        return make_rng(self.seed, _WINDOW, self.source, window, lane).permutation(n)

    def step_rows(self, step: int, lane_rows: int, lane: int) -> np.ndarray:
        """The lane's rows of a step; row i is row i % R of the chunk i // R."""
        at, stop = step * lane_rows, (step + 1) * lane_rows
        parts = []
        while at < stop:
            window = self.window_of(at)
            skip = at - self.rounds(window).start * self.rows_per_chunk
            places = self.rows(window, lane)[skip : skip + stop - at]
            rounds, inside = np.divmod(places, self.rows_per_chunk)
            chunks = np.asarray(self.chunks(window, lane))[rounds]
            parts.append(chunks * self.rows_per_chunk + inside)
            at += len(places)
        return np.concatenate(parts)

    def _first_round(self, epoch: int) -> int:
        return -(-epoch * self.n_chunks // self.n_lanes)

    @functools.cached_property
    def _permute_chunks(self) -> Callable[[int], np.ndarray]:
        """The chunks of an epoch; the last epochs are kept."""
        permute = functools.partial(_permute, self.n_chunks, self.seed, self.source)
        return functools.lru_cache(_EPOCHS_KEPT)(permute)


def make_rng(seed: int, *stream: int) -> np.random.Generator:
    """The generator of one stream of a seed, the same on every platform."""
    sequence = np.random.SeedSequence(seed, spawn_key=stream)
    return np.random.Generator(np.random.Philox(sequence))


def _permute(n_chunks: int, seed: int, source: int, epoch: int) -> np.ndarray:
    return make_rng(seed, _EPOCH, source, epoch).permutation(n_chunks)
