"""How well batches are mixed: distinct sequences and documents against a uniform draw.

Rows of a chunk follow one another in the text, so a batch that is drawn from few
chunks sees few sequences. A lane's b rows of a step are drawn from a window of W
chunks of R rows. None of a given r rows that lie together in a chunk is among them,
if the chunk is in the window, with the probability

    h(W R, r, b) = C(W R - r, b) / C(W R, b)

A chunk is in the window of some lane with probability q = V W / C. A sequence of T
rows lies in g = max(1, T / R) chunks, r = min(T, R) rows in each. So a batch has rows
of a sequence with probability 1 - (1 - q (1 - h(W R, r, b)))^g, and when B rows are
drawn uniformly of all C R, with probability 1 - h(C R, r, B)^g.

The window by default is the smallest for which the first is `TARGET` of the second for
g = 1 and r = R. For more or shorter pieces the two are nearer to one another, so this
holds for sequences and for documents of any length.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sae_jax.config import DataConfig
from sae_jax.loader.order import MEASURE, Order, make_rng
from sae_jax.loader.sources import Source

TARGET = 0.9


class Mixing(NamedTuple):
    """Distinct sequences and documents in a batch, by mean, and in a uniform draw."""

    batch_rows: int
    sequences: float
    uniform_sequences: float
    documents: float
    uniform_documents: float

    def __str__(self) -> str:
        return (
            f"{self.sequences:,.0f} sequences "
            f"({self.sequences / self.uniform_sequences:.1%}) and "
            f"{self.documents:,.0f} documents "
            f"({self.documents / self.uniform_documents:.1%})"
        )


def choose_window_chunks(sources: Sequence[Source], data: DataConfig) -> int:
    """`data.window_chunks`, or the smallest that mixes as well as `TARGET` says."""
    if data.window_chunks is not None:
        return data.window_chunks
    return max(_choose_for(source, data) for source in sources)


def expect_sequences(
    orders: Sequence[Order], data: DataConfig, lengths: Sequence[int]
) -> tuple[float, float]:
    """Distinct sequences expected in a batch, and in a uniform draw of each source.

    `lengths` are the rows of a sequence of each; as if no position were left out.
    """
    batch, uniform = 0.0, 0.0
    for order, length in zip(orders, lengths, strict=True):
        lane_rows = data.batch_rows // data.lanes
        n_sequences = order.n_chunks * order.rows_per_chunk / length
        ours, even = _chances(order, lane_rows, order.least_rounds, length)
        batch, uniform = batch + n_sequences * ours, uniform + n_sequences * even
    return batch, uniform


def describe_mixing(
    orders: Sequence[Order], data: DataConfig, lengths: Sequence[int]
) -> str:
    """One line for the start of training, from the sizes alone."""
    batch, uniform = expect_sequences(orders, data, lengths)
    windows = " and ".join(f"{order.most_rounds * order.n_lanes:,}" for order in orders)
    return (
        f"a batch of {data.batch_rows:,} rows is drawn from a window of {windows} "
        f"chunks and has some {batch:,.0f} sequences, {min(1, batch / uniform):.1%} of "
        "a uniform draw"
    )


def measure_mixing(
    sources: Sequence[Source],
    data: DataConfig,
    orders: Sequence[Order],
    steps: Sequence[int],
) -> Mixing:
    """Of the batches of these steps, by what the stores say of their rows."""
    found, lane_rows = [], data.batch_rows // data.lanes
    for step in steps:
        counts = np.zeros(4)
        for source, order in zip(sources, orders, strict=True):
            lanes = [
                order.step_rows(step, lane_rows, lane) for lane in range(order.n_lanes)
            ]
            rng = make_rng(order.seed, MEASURE, order.source, step)
            n_rows = order.n_chunks * order.rows_per_chunk
            n_drawn = min(n_rows, len(source.lanes) * lane_rows)
            even = rng.choice(n_rows, n_drawn, replace=False, shuffle=False)
            for i, rows in enumerate((np.concatenate(lanes), even)):
                counts[i::2] += _count(source, rows)
        found.append(counts)
    return Mixing(data.batch_rows, *np.mean(found, 0).tolist())


def choose_window(order: Order, data: DataConfig, length: int) -> int:
    """The smallest window, in chunks of each lane, that mixes runs of this length as
    `TARGET` says. The order's own window means nothing."""
    lane_rows = data.batch_rows // data.lanes
    rounds = order.n_chunks // order.n_lanes

    def is_mixed(n_windows: int) -> bool:
        ours, even = _chances(order, lane_rows, rounds // n_windows, length)
        return ours >= TARGET * even

    few, many = 1, rounds + 1  # one window, the whole source, is enough
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if is_mixed(middle) else (few, middle)
    return -(-order.n_chunks // (order.n_lanes * few))


def _choose_for(source: Source, data: DataConfig) -> int:
    chunk_rows = source.store.manifest.rows_per_chunk
    order = Order(source.n_chunks, chunk_rows, len(source.lanes), 1, seed=0)
    return choose_window(order, data, max(source.store.context_length, chunk_rows))


def _chances(
    order: Order, lane_rows: int, window_chunks: int, length: int
) -> tuple[float, float]:
    """That a batch, and a uniform draw, has rows of a run of this length."""
    n_chunks, chunk_rows, n_lanes = order.n_chunks, order.rows_per_chunk, order.n_lanes
    run, n_runs = min(length, chunk_rows), max(1.0, length / chunk_rows)
    share = min(1.0, n_lanes * window_chunks / n_chunks)
    hit = share * (1 - _miss(window_chunks * chunk_rows, run, lane_rows))
    even = 1 - _miss(n_chunks * chunk_rows, run, n_lanes * lane_rows)
    return _any_of(hit, n_runs), _any_of(even, n_runs)


def _any_of(chance: float, n: float) -> float:
    return 1.0 if chance >= 1 else -math.expm1(n * math.log1p(-chance))


def _miss(n_rows: int, run: int, drawn: int) -> float:
    """C(n_rows - run, drawn) / C(n_rows, drawn): none of `run` rows is drawn."""
    if drawn > n_rows - run:
        return 0.0
    return math.exp(np.log1p(-drawn / (n_rows - np.arange(run))).sum())


def _count(source: Source, rows: np.ndarray) -> tuple[int, int]:
    """How many sequences and documents these rows are of."""
    places = source.store.read_positions([(row, 1) for row in rows.tolist()])
    sequences, index = np.unique(places[:, 0], return_inverse=True)
    documents = source.store.read_documents(sequences)[index, places[:, 1]]
    return len(sequences), len(np.unique(documents))
