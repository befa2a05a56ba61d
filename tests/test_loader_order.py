"""The order of rows: every one once an epoch, the same from any start."""

import dataclasses
import itertools

import numpy as np
import pytest

from sae_jax import loader
from sae_jax.loader import Order

SIZES = [  # chunks, lanes, chunks of a window
    *itertools.product((1, 2, 5, 12, 29), (1, 2, 4, 5), (1, 2, 3, 8, 100)),
    (64, 8, 3),
    (1000, 7, 13),
]
SIZES = [size for size in SIZES if size[0] >= size[1]]


def make_order(size, rows_per_chunk=1, seed=0, source=0):
    n_chunks, n_lanes, window_chunks = size
    return Order(n_chunks, rows_per_chunk, n_lanes, window_chunks, seed, source)


@pytest.mark.parametrize("size", SIZES)
def test_windows_follow_one_another_and_are_of_nearly_one_length(size):
    n_chunks, n_lanes, window_chunks = size
    order, stop = make_order(size, rows_per_chunk=4), 0
    for window in range(5 * order.windows_per_epoch):
        rounds = order.rounds(window)
        assert rounds.start == stop and len(rounds) > 0
        assert order.least_rounds <= len(rounds) <= order.most_rounds
        assert len(rounds) <= max(window_chunks, 2)
        for row in (4 * rounds.start, 4 * rounds.stop - 1):
            assert order.window_of(row) == window
        stop = rounds.stop
    assert stop == -(-5 * n_chunks // n_lanes)
    assert order.most_rounds - order.least_rounds <= 2


@pytest.mark.parametrize("size", SIZES)
def test_every_chunk_comes_once_an_epoch(size):
    n_chunks, n_lanes, _ = size
    order = make_order(size)
    stream = np.concatenate([
        np.array([order.chunks(window, lane) for lane in range(n_lanes)]).T.ravel()
        for window in range(3 * order.windows_per_epoch)
    ])
    epochs = stream[: 3 * n_chunks].reshape(3, n_chunks)
    assert all(sorted(epoch) == [*range(n_chunks)] for epoch in epochs)
    if n_chunks > 4:
        assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lane_rows", [1, 3, 8, 50])
def test_steps_are_the_windows_cut_up(size, lane_rows):
    order = make_order(size, rows_per_chunk=8)
    for lane in range(order.n_lanes):
        rows = []
        for window in range(2 * order.windows_per_epoch):
            chunks, places = order.chunks(window, lane), order.rows(window, lane)
            assert sorted(places) == [*range(8 * len(chunks))]
            rows += [8 * chunks[place // 8] + place % 8 for place in places]
        for step in range(len(rows) // lane_rows):
            expected = rows[step * lane_rows : (step + 1) * lane_rows]
            assert order.step_rows(step, lane_rows, lane).tolist() == expected


def test_every_row_comes_once_an_epoch_where_lanes_divide_the_chunks():
    order = make_order((28, 4, 3), rows_per_chunk=16)
    for epoch in range(2):
        steps = range(epoch * 28 * 16 // 32, (epoch + 1) * 28 * 16 // 32)
        rows = [order.step_rows(s, 8, lane) for s in steps for lane in range(4)]
        assert sorted(np.concatenate(rows)) == [*range(28 * 16)]


def test_seed_source_lane_and_epoch_each_change_the_order():
    orders = [
        make_order((29, 4, 3), 16, seed, source) for seed in (0, 1) for source in (0, 1)
    ]
    rows = [
        tuple(order.step_rows(step, 8, lane))
        for order in orders
        for lane in range(4)
        for step in (0, 14)
    ]
    assert len(set(rows)) == len(rows)


def test_a_step_far_from_the_start_costs_no_more():
    order = make_order((29, 4, 3), 16)
    rows = order.step_rows(10**12 + 7, 8, 3)
    assert len(set(rows)) == 8 and max(rows) < 29 * 16


def test_the_order_is_the_same_on_every_platform():
    """A resumed run reads on where it was, whatever machine it was on."""
    order = make_order((29, 4, 3), 16)
    assert order.chunks(4, 2) == [20, 5]
    assert order.step_rows(100, 4, 1).tolist() == [65, 153, 64, 78]


def test_lanes_windows_epochs_seeds_and_sources_have_orders_of_their_own():
    order = make_order((64, 2, 8), rows_per_chunk=16)
    again = order.windows_per_epoch
    for other in ({"seed": 1}, {"source": 1}):
        changed = dataclasses.replace(order, **other)
        assert changed.chunks(0, 0) != order.chunks(0, 0)
        assert not np.array_equal(changed.rows(0, 0), order.rows(0, 0))
    assert order.chunks(again, 0) != order.chunks(0, 0)
    for window, lane in ((0, 1), (1, 0), (again, 0)):
        assert not np.array_equal(order.rows(window, lane), order.rows(0, 0))


def test_two_epochs_of_each_source_are_kept(monkeypatch):
    """However many sources are read in turns, no permutation is made twice."""
    made, permute = [], loader.order._permute

    def note(*args):
        made.append(args)
        return permute(*args)

    monkeypatch.setattr(loader.order, "_permute", note)
    orders = [make_order((29, 4, 3), source=source) for source in range(9)]
    for window in range(3 * orders[0].windows_per_epoch):
        for order in orders:
            for lane in range(4):
                order.chunks(window, lane)
    assert len(made) == len(set(made)) == 9 * 4  # the last window meets epoch 3
    assert all(order._permute_chunks.cache_info().currsize == 2 for order in orders)
    assert orders[0].kept_bytes == 2 * np.arange(29).nbytes
