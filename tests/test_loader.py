"""The loader: which rows come, in which order, whatever number of processes asks."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from numbered_stores import make_blocks, row_ids, write_store

from sae_jax import loader
from sae_jax.config import DataConfig, MeshConfig
from sae_jax.loader.windows import Windows
from sae_jax.mesh import DATA, batch_sharding, make_mesh, single_device_mesh

SITE = "resid_post.0"
N_CHUNKS = 28  # whole ones
ROWS = {"train": N_CHUNKS * 16 + 8, "heldout": 3 * 16 + 8}
# An epoch of a lane has 7 chunks, which are windows of 2, 2 and 3: 32, 32 and 48 rows,
# of which steps take 12 each.
DATA_CONFIG = DataConfig(batch_rows=48, lanes=4, window_chunks=3)
EPOCH_ROWS = N_CHUNKS * 16
STEPS = 3 * EPOCH_ROWS // 48 + 5


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store"), ROWS)


def batches_of(store, start_step, n_steps, seed=0, mesh=None, data=DATA_CONFIG):
    sources = loader.find_sources(data, [store])
    mesh = mesh or single_device_mesh()
    return loader.train_batches(sources, data, mesh, seed, start_step, n_steps)


def load(*args, **kwargs):
    return [np.asarray(batch) for batch in batches_of(*args, **kwargs)]


def load_lanes(store, lanes, start, stop, data=DATA_CONFIG):
    """The rows [lanes, b, D] of each step, in a process that has these lanes."""
    sources = loader.find_sources(data, [store])
    steps = loader.load_rows(sources, data, lanes, 0, start, stop)
    return [rows.rows_vnd.view(ml_dtypes.bfloat16) for rows in steps]


def test_every_row_comes_once_an_epoch(store):
    """Which is a whole number of neither windows nor steps."""
    lanes = np.concatenate(load_lanes(store, range(4), 0, STEPS), axis=1)
    epochs = row_ids(lanes)[:, : 3 * EPOCH_ROWS // 4].reshape(4, 3, -1)
    for epoch in range(3):
        assert sorted(epochs[:, epoch].ravel()) == [*range(EPOCH_ROWS)]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_batches_are_the_same_for_any_number_of_processes(store, n):
    """The same bits, each process starting where it likes, within a window or not."""
    whole = load(store, 0, STEPS)
    for start in (0, 1, 7, 10, 30):
        parts = [
            load_lanes(store, range(p * 4 // n, (p + 1) * 4 // n), start, STEPS)
            for p in range(n)
        ]
        for expected, *shares in zip(whole[start:], *parts, strict=True):
            assert np.concatenate(shares).tobytes() == expected.tobytes()


def test_epochs_and_seeds_differ(store):
    first, second = load(store, 0, 9), load(store, 28, 9)
    other = load(store, 0, 9, seed=1)
    rows = [set(row_ids(np.concatenate(b))) for b in (first, second, other)]
    assert rows[0] != rows[1] and rows[0] != rows[2]


@pytest.mark.parametrize("step", [1, 9, 10, 29, 9_999_999])
def test_a_step_is_the_same_from_any_start(store, step):
    before = max(0, step - 7)
    *_, expected = load(store, before, step - before + 1)
    (batch,) = load(store, step, 1)
    assert batch.tobytes() == expected.tobytes()


def test_n_steps_are_given(store):
    for start, n in ((0, 0), (0, 1), (3, 3), (5, 30)):
        assert len(load(store, start, n)) == n


@pytest.mark.parametrize("batch_rows", [4, 44, 448])
def test_batches_of_any_size(store, batch_rows):
    """Of some windows, or of many to a window, or of what divides nothing."""
    data = DataConfig(batch_rows=batch_rows, lanes=4, window_chunks=2)
    n_steps = 2 * EPOCH_ROWS // batch_rows
    lanes = np.concatenate(load_lanes(store, range(4), 0, n_steps, data), axis=1)
    rows = row_ids(lanes)[:, : EPOCH_ROWS // 4]
    assert sorted(rows.ravel()) == [*range(EPOCH_ROWS)]


def test_a_window_mixes_its_chunks(store):
    """Rows of a step come from more chunks than lanes, and not in their order."""
    for batch in load(store, 0, STEPS):
        lanes = row_ids(batch).reshape(4, 12)
        assert all(len(set(rows // 16)) > 1 for rows in lanes)
        assert all(np.any(np.diff(rows) < 0) for rows in lanes)


@pytest.mark.parametrize("n_data", [1, 2, 8])
def test_batches_are_placed_over_the_mesh(store, n_data):
    mesh = make_mesh(MeshConfig(data=n_data, latent=8 // n_data))
    batches = batches_of(store, 2, 3, mesh=mesh)
    for batch, expected in zip(batches, load(store, 2, 3), strict=True):
        assert isinstance(batch, jax.Array) and batch.dtype == jax.numpy.bfloat16
        assert batch.sharding == batch_sharding(mesh) and mesh.shape[DATA] == n_data
        assert batch.addressable_shards[0].data.shape == (48 // n_data, 4)
        assert np.asarray(batch).tobytes() == expected.tobytes()


def test_batches_outlive_the_buffers(store):
    kept = list(batches_of(store, 0, STEPS))
    again = load(store, 0, STEPS)
    assert all(np.asarray(a).tobytes() == b.tobytes() for a, b in zip(kept, again))


def test_two_windows_are_held_and_no_more(store):
    """A third buffer is never asked for: the reader waits until one is free."""
    (source,) = loader.find_sources(DATA_CONFIG, [store])
    (order,) = loader.find_orders([source], DATA_CONFIG, 0)
    windows = Windows(source, order, range(4))
    first, second = windows[0], windows[1]
    assert windows._free.empty()
    assert not np.shares_memory(first.buffer.rows_nd, second.buffer.rows_nd)


def test_a_loader_that_is_closed_early_leaves_no_thread_waiting(store):
    batches = batches_of(store, 0, STEPS)
    next(batches)
    batches.close()
    assert not list(batches)


def test_only_batches_that_are_soon_read_are_measured(store, monkeypatch):
    feed = loader.StoreFeed(DATA_CONFIG, single_device_mesh(), 0, [store])
    expected, measured = feed.describe().split("; measured: ")
    assert " sequences (" in measured and " documents (" in measured
    monkeypatch.setattr(loader.feed, "_MOST_MEASURED_ROWS", 47)
    monkeypatch.setattr(loader.feed, "measure_mixing", None)
    assert feed.describe() == expected


def test_sampled_rows_are_distinct_train_rows(store):
    rows = loader.sample_rows(store, None, 100, seed=3)
    assert rows.dtype == np.float32 and rows.shape == (100, 4)
    assert len(set(row_ids(rows))) == 100 and row_ids(rows).max() < ROWS["train"]
    assert len(set(row_ids(rows) // 16)) > 20
    np.testing.assert_array_equal(rows, loader.sample_rows(store, None, 100, seed=3))
    assert not np.array_equal(rows, loader.sample_rows(store, None, 100, seed=4))
    everything = row_ids(loader.sample_rows(store, None, 10**6, seed=0))
    assert sorted(everything) == [*range(EPOCH_ROWS)]


def test_a_sample_of_few_chunks_has_all_its_rows(store, monkeypatch):
    monkeypatch.setattr(loader.sources, "_SAMPLE_CHUNKS", 1)
    for n_rows in (1, 16, 100, 447):
        assert len(loader.sample_rows(store, None, n_rows, seed=0)) == n_rows


@pytest.mark.parametrize(
    "n_processes, settings, message",
    [
        (
            1,
            {"batch_rows": 58, "lanes": 29},
            "28 train chunks for data.lanes = 29: lower data.lanes to at most 28",
        ),
        (3, {}, "data.lanes = 4 is not a multiple of the 3 processes"),
        (1, {"batch_rows": 452}, "has 448 train rows in whole chunks, .* the 452 of"),
    ],
)
def test_what_cannot_be_loaded_is_refused(store, n_processes, settings, message):
    data = DataConfig(**{"batch_rows": 48, "lanes": 4, "window_chunks": 3} | settings)
    sources = loader.find_sources(data, [store])
    with pytest.raises(ValueError, match=message) as error:
        loader.check_loader(sources, data, n_processes)
    assert "\n" not in str(error.value)
    loader.check_loader(loader.find_sources(DATA_CONFIG, [store]), DATA_CONFIG, 2)
    assert loader.n_loading_processes(make_mesh(MeshConfig(data=8)), 48) == 1


def test_windows_that_do_not_fit_in_memory_are_refused(store, monkeypatch):
    monkeypatch.setattr(loader.batches, "_available_memory", lambda: 2000)
    message = "data.window_chunks = 3, .* take .* GB .*: set data.window_chunks = 1, "
    with pytest.raises(ValueError, match=message):
        load(store, 0, 1)


def test_the_memory_of_windows_of_own_lanes_and_order_is_asked_for(store, monkeypatch):
    data = DataConfig(batch_rows=48, lanes=4, window_chunks=3)
    needed = 2 * (2 * 3 * 16) * (2 * 4)  # buffers of two lanes, bytes of a row
    needed += 2 * 8 * N_CHUNKS  # two permutations
    monkeypatch.setattr(loader.batches, "_available_memory", lambda: needed)
    assert len(load_lanes(store, range(2), 0, 1, data)) == 1
    with pytest.raises(ValueError, match="set data.window_chunks = 1, "):
        load_lanes(store, range(4), 0, 1, data)
    monkeypatch.setattr(loader.batches, "_available_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match="set data.window_chunks = 2, "):
        load_lanes(store, range(2), 0, 1, data)


def place_processes(processes):
    """A mesh [data, latent] of devices of these processes."""
    devices = np.array(processes, object)
    for place, process in np.ndenumerate(devices):
        devices[place] = SimpleNamespace(process_index=process)
    return SimpleNamespace(devices=devices, shape={DATA: len(devices)})


@pytest.mark.parametrize(
    "processes, n_lanes, expected",
    [
        ([[0], [0], [1], [1]], 4, [[0, 1], [2, 3]]),
        ([[0], [1], [0], [1]], 4, [[0, 2], [1, 3]]),
        ([[0], [0], [1], [1]], 2, [[0], [1]]),
        ([[0], [0], [1], [1]], 6, [[0, 1, 2], [3, 4, 5]]),
        ([[0, 1], [0, 1]], 4, [[0, 1, 2, 3], [0, 1, 2, 3]]),
    ],
)
def test_a_process_has_the_lanes_of_its_devices(
    monkeypatch, processes, n_lanes, expected
):
    mesh = place_processes(processes)
    for process, lanes in enumerate(expected):
        monkeypatch.setattr(jax, "process_index", lambda: process)
        assert loader.find_lanes(mesh, 48, n_lanes) == lanes


def test_lanes_and_places_that_no_process_has_whole_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    for n_lanes in (1, 3):
        with pytest.raises(ValueError, match="mesh.data = 4, or choose another mesh"):
            loader.find_lanes(place_processes([[0], [0], [1], [1]]), 48, n_lanes)
    with pytest.raises(ValueError, match="divides over 2 processes unevenly"):
        loader.find_lanes(place_processes([[0], [0], [1]]), 48, 3)


def test_a_batch_that_the_mesh_does_not_divide_is_refused(store):
    data = DataConfig(batch_rows=12, lanes=4, window_chunks=3)
    message = "data.batch_rows = 12 does not divide by mesh.data = 8"
    with pytest.raises(ValueError, match=message):
        next(batches_of(store, 0, 1, mesh=make_mesh(MeshConfig(data=8)), data=data))


_PROCESS = """
import sys
import jax
port, path, tests = sys.argv[1:4]
n, process = map(int, sys.argv[4:])
sys.path.insert(0, tests)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4 // n)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", n, process)
from jax.experimental import multihost_utils
from sae_jax import loader
from sae_jax.config import MeshConfig
from sae_jax.mesh import make_mesh
from sae_jax.store import open_store
import test_loader
store = open_store(path)
n_steps = test_loader.STEPS
for n_data in (1, 2, 4):
    mesh = make_mesh(MeshConfig(data=n_data, latent=4 // n_data))
    n_parts = min(n_data, n)
    part, n_lanes = process * n_parts // n, 4 // n_parts
    ours = range(part * n_lanes, (part + 1) * n_lanes)
    assert loader.find_lanes(mesh, 48, 4) == [*ours]
    assert loader.n_loading_processes(mesh, 48) == n_parts
    expected = test_loader.load_lanes(store, range(4), 5, n_steps)
    batches = test_loader.batches_of(store, 5, n_steps - 5, mesh=mesh)
    for batch, whole in zip(batches, expected, strict=True):
        rows = multihost_utils.process_allgather(batch, tiled=True)
        assert rows.tobytes() == whole.tobytes()
jax.distributed.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_processes_load_the_rows_of_one(store, n):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    tests = str(Path(__file__).parent)
    command = [sys.executable, "-c", _PROCESS, str(port), store.path, tests, str(n)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen([*command, str(process)], env=environment)
        for process in range(n)
    ]
    try:
        assert [process.wait(240) for process in processes] == [0] * n
    finally:
        for process in processes:
            process.kill()


def test_a_damaged_shard_stops_training_by_name(tmp_path):
    store = write_store(tmp_path, ROWS)
    file = tmp_path / "acts" / SITE / "c/2/0/0"
    contents = bytearray(file.read_bytes())
    contents[7] ^= 1
    file.write_bytes(contents)
    with pytest.raises(ValueError, match="damaged shard") as error:
        load(store, 0, STEPS)
    assert str(file) in str(error.value)


def test_the_rows_of_the_fixture_tell_their_index():
    blocks = make_blocks({"train": 70_000}, {SITE: 4})
    rows = np.concatenate([acts[SITE] for _, acts, *_ in blocks])
    np.testing.assert_array_equal(row_ids(rows), np.arange(70_000))
