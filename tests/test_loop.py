"""Training runs: resume is exact, faults stop the run with a clear line."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import synthetic

from sae_jax import loop, run, writers
from sae_jax.checkpoint import Checkpoints
from sae_jax.config import MeshConfig, OptimizerConfig

ONE = MeshConfig(1, 1)


class _Killed(Exception):
    pass


class _KillAt(writers.MemoryWriter):
    """Ends the run when it is told the metrics of a step."""

    def __init__(self, step):
        super().__init__()
        self._step = step

    def write(self, step, scalars):
        if step == self._step:
            raise _Killed
        super().write(step, scalars)


@pytest.fixture(scope="module")
def undisturbed(planted_store, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    config = synthetic.make_config(planted_store, mesh=ONE)
    return workdir, jax.device_get(loop.train(config, workdir))


def _metrics(workdir):
    rows = writers.read_json_lines(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k != "rows_per_second"} for row in rows]


def test_a_run_leaves_its_folder(undisturbed):
    workdir, _ = undisturbed
    assert {path.name for path in workdir.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
    }
    rows = _metrics(workdir)
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert rows[-1]["rows"] == 24 * 64
    assert run.read_config(workdir).sae.d_model == 16
    kept = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert kept == ["16", "24"]


@pytest.mark.parametrize("step", [1, 8, 13])
def test_a_stopped_run_goes_on_to_the_same_bits(
    step, undisturbed, planted_store, tmp_path
):
    workdir, expected = undisturbed
    config = synthetic.make_config(planted_store, mesh=ONE)
    with pytest.raises(_Killed):
        loop.train(config, tmp_path / "run", _KillAt(step))
    final = jax.device_get(loop.train(config, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, final, expected)
    assert _metrics(tmp_path / "run") == _metrics(workdir)


def test_a_run_goes_on_on_another_mesh(undisturbed, planted_store, tmp_path):
    workdir, _ = undisturbed
    config = synthetic.make_config(planted_store, mesh=ONE)
    with pytest.raises(_Killed):
        loop.train(config, tmp_path / "run", _KillAt(17))
    config = synthetic.make_config(planted_store, mesh=MeshConfig(2, 4))
    loop.train(config, tmp_path / "run")
    for name in ("loss", "nmse"):
        np.testing.assert_allclose(
            [row[name] for row in _metrics(tmp_path / "run")],
            [row[name] for row in _metrics(workdir)],
            rtol=1e-5,
        )


def test_a_finished_run_is_left_as_it_is(undisturbed, planted_store):
    workdir, expected = undisturbed
    before = _metrics(workdir)
    config = synthetic.make_config(planted_store, mesh=ONE)
    final = jax.device_get(loop.train(config, workdir))
    jax.tree.map(np.testing.assert_array_equal, final, expected)
    assert _metrics(workdir) == before


def test_a_run_is_not_continued_with_another_config(undisturbed, planted_store):
    config = synthetic.make_config(planted_store, mesh=ONE, seed=5)
    with pytest.raises(ValueError, match="seed = 0, now 5 is asked: resume with"):
        loop.train(config, undisturbed[0])


def test_a_loss_that_is_not_finite_stops_the_run(planted_store, tmp_path):
    config = synthetic.make_config(
        planted_store,
        mesh=ONE,
        optimizer=OptimizerConfig(learning_rate=1e38),
        checkpoint_every_steps=1,
    )
    with pytest.raises(loop.NonFiniteLoss, match=r"step \d+: .*nmse = ") as caught:
        loop.train(config, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run")
    good = checkpoints.latest_step
    checkpoints.close()
    assert str(caught.value).endswith(f"checkpoints/{good}" if good else "none yet")
    assert len(str(caught.value).splitlines()) == 1


def test_a_run_can_be_made_longer(undisturbed, planted_store, tmp_path):
    workdir, expected = undisturbed
    config = synthetic.make_config(planted_store, mesh=ONE, rows=10 * 64)
    loop.train(config, tmp_path / "run")
    config = synthetic.make_config(planted_store, mesh=ONE)
    final = jax.device_get(loop.train(config, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, final, expected)
    assert _metrics(tmp_path / "run") == _metrics(workdir)


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
import synthetic
from sae_jax import loop
from sae_jax.config import MeshConfig
loop.train(synthetic.make_config({store!r}, mesh=MeshConfig(1, 1)), {workdir!r})
"""


def test_kill_9_then_resume_gives_the_same_bits(undisturbed, planted_store, tmp_path):
    _, expected = undisturbed
    workdir = tmp_path / "run"
    code = _CHILD.format(store=str(planted_store), workdir=str(workdir))
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
    config = synthetic.make_config(planted_store, mesh=ONE)
    final = jax.device_get(loop.train(config, workdir))
    jax.tree.map(np.testing.assert_array_equal, final, expected)


def _has_reached(path, step):
    if not path.exists():
        return False
    return any(row["step"] >= step for row in writers.read_json_lines(path))


def test_config_json_is_whole(undisturbed):
    values = json.loads((undisturbed[0] / "config.json").read_text())
    assert values["sae"]["k"] == 3
