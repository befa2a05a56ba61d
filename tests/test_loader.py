"""The loader: which rows come, in which order, whatever number of processes asks."""

import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_store import make_manifest, make_shard, row_ids, write_store

from sae_jax import loader
from sae_jax.config import DataConfig, MeshConfig
from sae_jax.mesh import DATA, batch_sharding, make_mesh, single_device_mesh

SITE = "resid_post.0"
N_CHUNKS = 29  # whole ones; not a multiple of the chunks of all lanes' windows
ROWS = {"train": N_CHUNKS * 16 + 8, "heldout": 3 * 16 + 8}
DATA_CONFIG = DataConfig(batch_rows=32, lanes=4, window_chunks=3)
STEPS = loader.steps_per_window(16, DATA_CONFIG)
EPOCH = STEPS * (N_CHUNKS // 12)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store"), ROWS)


def load(store, start_step, n_steps, seed=0, mesh=None):
    mesh = mesh or single_device_mesh()
    batches = loader.train_batches(
        store, None, DATA_CONFIG, mesh, seed, start_step, n_steps
    )
    return [np.asarray(batch) for batch in batches]


def load_lanes(store, lanes, n_steps, seed=0):
    """The batches of a process that has these lanes."""
    windows = loader.Windows(store, SITE, DATA_CONFIG, seed, lanes)
    parts = (windows[g] for g in range(-(-n_steps // STEPS)))
    return list(itertools.islice(itertools.chain.from_iterable(parts), n_steps))


def test_an_epoch_visits_a_row_at_most_once_and_only_train_rows(store):
    batches = load(store, 0, EPOCH)
    assert all(batch.shape == (32, 4) for batch in batches)
    rows = row_ids(np.concatenate(batches))
    assert len(set(rows)) == len(rows) == 24 * 16
    assert set(rows) <= set(range(N_CHUNKS * 16))


def test_lanes_are_disjoint(store):
    lanes = [
        set(row_ids(np.concatenate(load_lanes(store, [lane], EPOCH))))
        for lane in range(4)
    ]
    assert all(len(rows) == 6 * 16 for rows in lanes)
    assert len(set.union(*lanes)) == 24 * 16


def test_epochs_and_seeds_differ(store):
    first, second = load(store, 0, EPOCH), load(store, EPOCH, EPOCH)
    other = load(store, 0, EPOCH, seed=1)
    rows = [set(row_ids(np.concatenate(b))) for b in (first, second, other)]
    assert all(len(r) == 24 * 16 for r in rows)
    assert rows[0] != rows[1] and rows[0] != rows[2]
    assert len(rows[0] | rows[1]) > 26 * 16  # chunks that sat out come later


@pytest.mark.parametrize("step", [1, STEPS - 1, STEPS, EPOCH + 5, 1000 * EPOCH + 7])
def test_a_step_is_the_same_from_any_start(store, step):
    before = max(0, step - 7)
    *_, expected = load(store, before, step - before + 1)
    (batch,) = load(store, step, 1)
    assert batch.tobytes() == expected.tobytes()


def test_n_steps_are_given(store):
    for start, n in ((0, 0), (0, 1), (3, STEPS), (STEPS, 2 * STEPS + 1)):
        assert len(load(store, start, n)) == n


def test_steps_are_the_same_rows_for_any_number_of_processes(store):
    n_steps = EPOCH + 5
    alone = load_lanes(store, range(4), n_steps)
    for n in (2, 4):
        parts = [load_lanes(store, range(p, 4, n), n_steps) for p in range(n)]
        for step, whole in enumerate(alone):
            rows = np.concatenate([row_ids(part[step]) for part in parts])
            assert all(len(part[step]) == 32 // n for part in parts)
            assert sorted(rows) == sorted(row_ids(whole))


def test_a_window_mixes_its_chunks(store):
    """Rows of a step come from more chunks than lanes, and not in their order."""
    for batch in load(store, 0, EPOCH):
        lanes = row_ids(batch).reshape(4, 8)
        assert all(len(set(rows // 16)) > 1 for rows in lanes)
        assert all(np.any(np.diff(rows) < 0) for rows in lanes)


def test_every_row_of_a_window_is_given(store):
    windows = loader.Windows(store, SITE, DATA_CONFIG, 0, range(4))
    rows = np.sort(row_ids(windows[0]).ravel())
    assert np.all(rows[::16] % 16 == 0) and len(set(rows)) == 4 * 3 * 16


@pytest.mark.parametrize("n_data", [1, 2, 8])
def test_batches_are_placed_over_the_mesh(store, n_data):
    mesh = make_mesh(MeshConfig(data=n_data, latent=8 // n_data))
    batches = loader.train_batches(store, SITE, DATA_CONFIG, mesh, 0, 2, 3)
    for batch, expected in zip(batches, load(store, 2, 3), strict=True):
        assert isinstance(batch, jax.Array) and batch.dtype == jax.numpy.bfloat16
        assert batch.sharding == batch_sharding(mesh) and mesh.shape[DATA] == n_data
        assert batch.addressable_shards[0].data.shape == (32 // n_data, 4)
        assert np.asarray(batch).tobytes() == expected.tobytes()


def test_batches_outlive_the_buffers(store):
    kept = list(loader.train_batches(store, SITE, DATA_CONFIG, single_device_mesh(),
                                     0, 0, 3 * EPOCH))
    rows = row_ids(np.concatenate([np.asarray(b) for b in kept[:EPOCH]]))
    assert len(set(rows)) == 24 * 16


def test_sampled_rows_are_distinct_train_rows(store):
    rows = loader.sample_rows(store, None, 100, seed=3)
    assert rows.dtype == np.float32 and rows.shape == (100, 4)
    assert len(set(row_ids(rows))) == 100 and row_ids(rows).max() < ROWS["train"]
    assert len(set(row_ids(rows) // 16)) > 20
    np.testing.assert_array_equal(rows, loader.sample_rows(store, None, 100, seed=3))
    assert not np.array_equal(rows, loader.sample_rows(store, None, 100, seed=4))
    everything = row_ids(loader.sample_rows(store, None, 10**6, seed=0))
    assert sorted(everything) == [*range(ROWS["train"])]


@pytest.mark.parametrize(
    "n_chunks, n_processes, settings, message",
    [
        (3, 1, {}, "3 train chunks for data.lanes = 4: lower data.lanes to at most 3"),
        (11, 1, {}, "window_chunks to at most 2"),
        (12, 3, {}, "data.lanes = 4 is not a multiple of the 3 processes"),
        (12, 1, {"batch_rows": 20}, "= 48 rows is not a multiple of .*rows to 16"),
        (12, 1, {"batch_rows": 256}, "= 48 rows is less than .*most 192, or raise"),
    ],
)
def test_what_cannot_be_loaded_is_refused(n_chunks, n_processes, settings, message):
    data = DataConfig(**{"batch_rows": 32, "lanes": 4, "window_chunks": 3} | settings)
    with pytest.raises(ValueError, match=message) as error:
        loader.check_loader(n_chunks, 16, data, n_processes)
    assert "\n" not in str(error.value)
    loader.check_loader(12, 16, DATA_CONFIG, 2)
    assert loader.n_loading_processes(make_mesh(MeshConfig(data=8)), 32) == 1


def test_a_batch_that_the_mesh_does_not_divide_is_refused(store):
    data = DataConfig(batch_rows=12, lanes=4, window_chunks=3)
    mesh = make_mesh(MeshConfig(data=8))
    with pytest.raises(ValueError, match="12 rows does not divide by mesh.data = 8"):
        next(loader.train_batches(store, None, data, mesh, 0, 0, 1))


_TWO_PROCESSES = """
import sys
import jax
port, process, path, tests = sys.argv[1:]
sys.path.insert(0, tests)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
from jax.experimental import multihost_utils
from sae_jax import loader
from sae_jax.config import MeshConfig
from sae_jax.mesh import make_mesh
from sae_jax.store import open_store
import test_loader
store = open_store(path)
expected = test_loader.load_lanes(store, range(4), test_loader.EPOCH + 5)
for n_data in (1, 2, 4):
    mesh = make_mesh(MeshConfig(data=n_data, latent=4 // n_data))
    ours = int(process) if n_data > 1 else 0
    assert loader._find_process(mesh, 32) == (ours, min(n_data, 2))
    assert loader.n_loading_processes(mesh, 32) == min(n_data, 2)
    batches = loader.train_batches(
        store, None, test_loader.DATA_CONFIG, mesh, 0, 0, len(expected)
    )
    for batch, whole in zip(batches, expected, strict=True):
        rows = test_loader.row_ids(multihost_utils.process_allgather(batch, tiled=True))
        assert batch.shape == whole.shape and len(set(rows)) == 32
        assert set(rows) == set(test_loader.row_ids(whole))
jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes_load_the_rows_of_one(store):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", _TWO_PROCESSES, str(port)]
    arguments = [str(store.path), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen([*command, str(process), *arguments], env=environment)
        for process in range(2)
    ]
    try:
        assert [process.wait(240) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()


def test_a_damaged_shard_stops_training_by_name(tmp_path):
    store = write_store(tmp_path, ROWS)
    file = tmp_path / "acts" / SITE / "c" / "2" / "0"
    contents = bytearray(file.read_bytes())
    contents[7] ^= 1
    file.write_bytes(contents)
    with pytest.raises(ValueError, match="damaged shard") as error:
        load(store, 0, 2 * EPOCH)
    assert str(file) in str(error.value)


def test_the_rows_of_the_fixture_tell_their_index():
    manifest = make_manifest({"train": 70_000}, {SITE: 4}, per_shard=65_536)
    shard = make_shard(manifest, 1)
    np.testing.assert_array_equal(
        row_ids(shard.acts[SITE]), 65_536 + np.arange(70_000 - 65_536)
    )
