"""Training runs: resume is exact, faults stop the run with a clear line."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import synthetic
import test_stream
from pods import read_metrics
from synthetic import Killed, KillAt

from sae_jax import files, header, loop, processes, resume, run, writers
from sae_jax.checkpoint import Checkpoints
from sae_jax.config import (
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    SaeConfig,
    TrainConfig,
)
from sae_jax.exits import Preempted
from sae_jax.loader import StoreFeed
from sae_jax.mesh import make_mesh
from sae_jax.store import open_store

text_file = test_stream.text_file

ONE = MeshConfig(1, 1)


@pytest.fixture(scope="module")
def undisturbed(planted_store, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    config = synthetic.make_config(planted_store, mesh=ONE)
    return workdir, jax.device_get(loop.train(config, workdir))


def test_a_run_leaves_its_folder(undisturbed):
    workdir, _ = undisturbed
    assert {path.name for path in workdir.iterdir()} == {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
    }
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert rows[-1]["rows"] == 24 * 64
    assert run.read_config(workdir).sae.d_model == 16
    kept = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert kept == ["16", "24"]


def test_a_run_tells_which_share_of_its_time_it_waits_for_batches(
    planted_store, tmp_path, monkeypatch
):
    """By a clock that only loading and writing move on."""
    clock, batches = SimpleNamespace(now=0.0), StoreFeed.batches

    def load_slowly(self, *steps):
        for batch in batches(self, *steps):
            clock.now += 3
            yield batch

    class Slow(writers.MemoryWriter):
        def write(self, step, scalars):
            clock.now += 1
            super().write(step, scalars)

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(StoreFeed, "batches", load_slowly)
    config = synthetic.make_config(planted_store, mesh=ONE, log_every_steps=4)
    writer = Slow()
    loop.train(dataclasses.replace(config, rows=16 * 64), tmp_path, writer)
    first, *others = writer.rows
    assert "loading_share" not in first and "rows_per_second" not in first
    # Step 8 and the last are looked at before another batch is asked for.
    assert [row["step"] for row in others] == [8, 12, 16]
    seconds = np.array([1 + 3 * 3, 1 + 5 * 3, 1 + 3 * 3])
    assert [row["loading_share"] for row in others] == list((seconds - 1) / seconds)
    assert [row["rows_per_second"] for row in others] == list(4 * 64 / seconds)


def test_a_run_tells_what_it_is_and_what_else_is_set(planted_store, tmp_path, capsys):
    start = dict(mesh=ONE, rows=64, dead_after_rows=10**6)
    sae = SaeConfig(n_latents=128, k=3, prefixes=(32, 128), aux_coefficient=0)
    annealing = dict(k_start=4, k_anneal_rows=64)
    config = synthetic.make_config(planted_store, **start, **annealing, sae=sae)
    config.data.microbatch_rows = 32
    loop.train(config, tmp_path)
    first, _, further = capsys.readouterr().err.splitlines()[:3]
    assert first.startswith("train: topk, 128 latents, k 3, resid_post.3 of ")
    n_rows = open_store(planted_store).rows("train")
    assert f"from step 0 to 1 of 64 rows each, {64 / n_rows:.3g} epochs" in first
    assert first.endswith("100.00% of the 3 largest expected by sorting")
    assert further == (
        "train: sae.aux_coefficient = 0.0, sae.prefixes = (32, 128), "
        "optimizer.learning_rate = 0.003, data.microbatch_rows = 32, "
        "dead_after_rows = 1000000, k_start = 4, k_anneal_rows = 64"
    )


def test_a_penalised_run_names_its_penalty(planted_store):
    penalty = dict(sparsity_coefficient=0.5, target_l0=4.0)
    sae = SaeConfig(architecture="jumprelu", n_latents=128, **penalty)
    config = TrainConfig(sae, data=DataConfig(store=str(planted_store), lanes=4))
    setup = synthetic.make_setup(config, make_mesh(ONE), open_store(planted_store))
    feed = StoreFeed(config.data, setup.mesh, 0)
    text = header.describe(config, setup, feed, 7)
    assert "jumprelu, 128 latents, sparsity_coefficient 0.5, target_l0 4, " in text
    first, mixing = text.splitlines()
    assert "from step 7 to " in first and "a batch of 2,048 rows" in mixing


@pytest.mark.parametrize("step", [1, 8, 13])
def test_a_stopped_run_goes_on_to_the_same_bits(
    step, undisturbed, planted_store, tmp_path
):
    workdir, expected = undisturbed
    config = synthetic.make_config(planted_store, mesh=ONE)
    with pytest.raises(Killed):
        loop.train(config, tmp_path / "run", KillAt(step))
    final = jax.device_get(loop.train(config, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, final, expected)
    assert read_metrics(tmp_path / "run") == read_metrics(workdir)


def test_a_run_on_two_stores_goes_on_to_the_same_bits(planted_store, tmp_path):
    other = synthetic.write_store(tmp_path / "other", train_shards=3)
    data = dict(batch_rows=64, lanes=4, weights=(3, 1))
    data = DataConfig(store=f"{planted_store}, {other}", **data)
    config = synthetic.make_config(data=data, mesh=ONE)
    expected = jax.device_get(loop.train(config, tmp_path / "whole"))
    with pytest.raises(Killed):
        loop.train(config, tmp_path / "run", KillAt(13))
    final = jax.device_get(loop.train(config, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, final, expected)


def test_a_run_goes_on_on_another_mesh_in_micro_batches(
    undisturbed, planted_store, tmp_path
):
    workdir, _ = undisturbed
    config = synthetic.make_config(planted_store, mesh=ONE)
    with pytest.raises(Killed):
        loop.train(config, tmp_path / "run", KillAt(17))
    data = dataclasses.replace(config.data, microbatch_rows=16)
    config = dataclasses.replace(config, mesh=MeshConfig(2, 4), data=data)
    loop.train(config, tmp_path / "run")
    for name in ("loss", "nmse"):
        np.testing.assert_allclose(
            [row[name] for row in read_metrics(tmp_path / "run")],
            [row[name] for row in read_metrics(workdir)],
            rtol=1e-5,
        )


def test_a_run_goes_on_with_what_may_change(undisturbed, planted_store, tmp_path):
    workdir, expected = undisturbed
    config = synthetic.make_config(planted_store, mesh=ONE)
    with pytest.raises(Killed):
        loop.train(config, tmp_path / "run", KillAt(17))
    shutil.copytree(planted_store, tmp_path / "moved")
    data = dataclasses.replace(config.data, store=str(tmp_path / "moved"))
    sae = dataclasses.replace(config.sae, exchange="tree", capacity_factor=2.0)
    changes = dict(sae=sae, data=data, log_every_steps=2, checkpoint_every_steps=4)
    config = dataclasses.replace(config, **changes, checkpoints_kept=2)
    final = jax.device_get(loop.train(config, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, final, expected)
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"20", "24"}


def test_a_finished_run_is_left_as_it_is(undisturbed, planted_store):
    workdir, expected = undisturbed
    before = read_metrics(workdir)
    config = synthetic.make_config(planted_store, mesh=ONE)
    final = jax.device_get(loop.train(config, workdir))
    jax.tree.map(np.testing.assert_array_equal, final, expected)
    assert read_metrics(workdir) == before


def test_a_run_is_not_continued_with_another_config(undisturbed, planted_store):
    config = synthetic.make_config(planted_store, mesh=ONE, seed=5)
    with pytest.raises(ValueError, match="seed = 0, now 5 is asked: resume with"):
        loop.train(config, undisturbed[0])


def test_a_run_is_not_continued_on_another_store(undisturbed, tmp_path):
    other = synthetic.write_store(tmp_path / "store", train_shards=5)
    with pytest.raises(ValueError, match="trained on another store"):
        loop.train(synthetic.make_config(other, mesh=ONE), undisturbed[0])


def test_a_run_is_not_cut_shorter(undisturbed, planted_store):
    config = synthetic.make_config(planted_store, mesh=ONE, rows=10 * 64)
    with pytest.raises(ValueError, match="has done 24 steps, rows = 640 are 10"):
        loop.train(config, undisturbed[0])


def test_a_run_folder_has_one_writer(undisturbed, planted_store):
    config = synthetic.make_config(planted_store, mesh=ONE)
    with files.lock_folder(undisturbed[0]):
        with pytest.raises(ValueError, match="in use by another process"):
            loop.train(config, undisturbed[0])


def test_a_run_folder_is_taken_before_what_takes_long(
    text_file, tmp_path, monkeypatch
):
    """As packing a stream's text, for which the other processes would wait."""

    def refuse(folder):
        raise ValueError("not shared")

    config = test_stream.make_config(text_file, mesh=ONE)
    with monkeypatch.context() as patch:
        patch.setattr(resume, "check_shared", refuse)
        with pytest.raises(ValueError, match="not shared"):
            loop.train(config, tmp_path / "run")
    with files.lock_folder(tmp_path / "run"):
        with pytest.raises(ValueError, match="in use by another process"):
            loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "text").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(mesh=MeshConfig(data=16)), "mesh.data = 16"),
        (dict(data=DataConfig(batch_rows=64)), "data.store is not set"),
    ],
)
def test_a_bad_config_starts_nothing(change, message, planted_store, tmp_path):
    config = synthetic.make_config(planted_store, **change)
    with pytest.raises(ValueError, match=message):
        loop.train(config, tmp_path / "run")
    with pytest.raises(ValueError, match="lie in folders, at file://, gs:// or s3://"):
        loop.train(config, "hdfs://bucket/run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(planted_store, tmp_path):
    config = synthetic.make_config(
        planted_store,
        mesh=ONE,
        optimizer=OptimizerConfig(learning_rate=1e38),
        checkpoint_every_steps=1,
    )
    # The first loss is of good parameters; the update spoils them, and is not saved.
    message = r"^step 1: param_norm = (nan|inf); last good checkpoint: none yet$"
    with pytest.raises(loop.NonFiniteLoss, match=message):
        loop.train(config, tmp_path / "run")


def test_the_last_good_checkpoint_is_named(undisturbed, planted_store, tmp_path):
    workdir = tmp_path / "run"
    config = synthetic.make_config(planted_store, mesh=ONE)
    with pytest.raises(Killed):
        loop.train(config, workdir, KillAt(12))
    checkpoints = Checkpoints(workdir)
    step = checkpoints.latest_step
    setup = checkpoints.meta(step).setup(make_mesh(ONE))
    state = checkpoints.restore(step, setup)
    spoilt = {name: value * np.nan for name, value in state.params.items()}
    checkpoints.save(step + 1, state._replace(params=spoilt), setup)
    checkpoints.close()
    message = rf"nmse = nan.*last good checkpoint: .*checkpoints/{step + 1}$"
    with pytest.raises(loop.NonFiniteLoss, match=message):
        loop.train(config, workdir)


def test_a_run_can_be_made_longer(undisturbed, planted_store, tmp_path):
    workdir, expected = undisturbed
    config = synthetic.make_config(planted_store, mesh=ONE, rows=10 * 64)
    loop.train(config, tmp_path / "run")
    config = synthetic.make_config(planted_store, mesh=ONE)
    final = jax.device_get(loop.train(config, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, final, expected)
    assert read_metrics(tmp_path / "run") == read_metrics(workdir)


def test_steps_to_profile_are_checked_before_the_run(planted_store, tmp_path):
    config = synthetic.make_config(planted_store, mesh=ONE)
    with pytest.raises(ValueError, match="profile_steps = 30,40: .* has 24 steps"):
        loop.train(config, tmp_path / "run", profile_steps=(30, 40))
    assert not (tmp_path / "run").exists()


def test_profile_leaves_a_trace(planted_store, tmp_path):
    config = synthetic.make_config(planted_store, mesh=ONE, rows=6 * 64)
    loop.train(config, tmp_path / "run", profile_steps=(3, 5))
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


_CHILD = """
import os
os.environ["NPROC"] = "32"
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
import synthetic
from sae_jax import loop
from sae_jax.config import MeshConfig
loop.train(synthetic.make_config({store!r}, mesh=MeshConfig(*{shape})), {workdir!r})
"""


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_kill_9_then_resume_gives_the_same_bits(shape, planted_store, tmp_path):
    config = synthetic.make_config(planted_store, mesh=MeshConfig(*shape))
    expected = jax.device_get(loop.train(config, tmp_path / "undisturbed"))
    workdir = tmp_path / "run"
    code = _CHILD.format(store=str(planted_store), workdir=str(workdir), shape=shape)
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    child = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not _has_reached(workdir / "metrics.jsonl", 10):
        assert child.poll() is None, child.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    final = jax.device_get(loop.train(config, workdir))
    jax.tree.map(np.testing.assert_array_equal, final, expected)


@pytest.mark.parametrize(
    "number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Preempted)]
)
def test_a_signal_stops_a_run_after_saving(
    number, error, undisturbed, planted_store, tmp_path
):
    class Signal(KillAt):
        def write(self, step, scalars):
            if step == self.step:
                signal.raise_signal(number)

    before = signal.getsignal(number)
    config = synthetic.make_config(planted_store, mesh=ONE)
    with pytest.raises(error, match="after step 12 of 24, which is saved"):
        loop.train(config, tmp_path / "run", Signal(11))
    assert signal.getsignal(number) == before
    assert run.load(tmp_path / "run", weights="raw").n_latents == 128
    final = jax.device_get(loop.train(config, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, final, undisturbed[1])


def _has_reached(path, step):
    if not path.exists():
        return False
    return any(row["step"] >= step for row in writers.read_json_lines(path))


def test_a_run_notes_what_it_does(planted_store, tmp_path, monkeypatch):
    """For the other processes: steps, with how many are done, and saves."""
    noted = []
    monkeypatch.setattr(processes, "note", lambda *said: noted.append(said))
    config = synthetic.make_config(planted_store, mesh=ONE, rows=3 * 64)
    loop.train(dataclasses.replace(config, checkpoint_every_steps=2), tmp_path)
    assert noted[-5:] == [
        ("step 1", 0),
        ("step 2", 1),
        ("saving step 2", 2),
        ("step 3", 2),
        ("saving step 3", 3),
    ]


def test_config_json_is_whole(undisturbed):
    values = json.loads((undisturbed[0] / "config.json").read_text())
    assert values["sae"]["k"] == 3
