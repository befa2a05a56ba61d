"""The local launcher with the real `sae-jax train`: killed processes change nothing."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import synthetic
from launching import LAUNCH
from pods import leaves, read_metrics, read_state

from sae_jax.config import to_json

CONFIG = """
from sae_jax import config

def get_config():
    return config.from_json(config.TrainConfig, {text!r}, "a test")
"""
_START = r" train: .*, from step (\d+) to "
TRAIN = [sys.executable, "-c", "from sae_jax.cli import run; run()", "train"]


class Launched:
    """A run of two processes of two devices each."""

    def __init__(self, folder: Path, store: Path, n_steps: int):
        folder.mkdir()
        config = synthetic.make_config(store, rows=n_steps * 64)
        (folder / "c.py").write_text(CONFIG.format(text=to_json(config)))
        self.workdir = folder / "run"
        self._out, self._err = folder / "out", folder / "err"
        paths = os.pathsep.join(filter(None, sys.path))
        with open(self._out, "w") as out, open(self._err, "w") as err:
            self._launcher = subprocess.Popen(
                [
                    *(sys.executable, LAUNCH / "local.py", "--n_processes=2"),
                    *("--max_restarts=5", f"--program={shlex.join(TRAIN)}", "--"),
                    *("--config=c.py", f"--workdir={self.workdir}"),
                    *("--cpu_devices=2", "--peer_timeout_secs=5"),
                ],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": paths},
                stdout=out,
                stderr=err,
            )

    @property
    def starts(self) -> list[int]:
        """The step from which each attempt went on."""
        return [int(step) for step in re.findall(_START, self.said)]

    @property
    def said(self) -> str:
        """What the processes printed."""
        return self._out.read_text()

    @property
    def lines(self) -> list[str]:
        """What the launcher itself told."""
        return self._err.read_text().splitlines()

    def wait_for(self, is_so) -> None:
        end = time.monotonic() + 280
        while not is_so():
            assert self._launcher.poll() is None, self._out.read_text()
            assert time.monotonic() < end, self._out.read_text()
            time.sleep(0.01)

    def n_steps(self) -> int:
        path = self.workdir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def kill(self, number: int) -> None:
        """The process that trains, which its own parent only waits for."""
        parents = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_text().split("\0")
                parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if {f"--process={number}", f"--workdir={self.workdir}"} <= set(words):
                parents[int(path.name)] = int(parent)
        (trainer,) = [one for one, parent in parents.items() if parent in parents]
        os.kill(trainer, signal.SIGKILL)

    def finish(self) -> None:
        status = self._launcher.wait(timeout=240)
        assert status == 0, self._out.read_text() + self._err.read_text()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "n_steps, n_kills", [(48, 2), pytest.param(200, 5, marks=pytest.mark.slow)]
)
def test_killed_at_random_a_run_ends_with_the_same_bits(
    planted_store, tmp_path, n_steps, n_kills
):
    rng = np.random.default_rng(n_kills)
    run = Launched(tmp_path / "killed", planted_store, n_steps)
    victims = rng.integers(2, size=n_kills)
    for i, victim in enumerate(victims):
        run.wait_for(lambda n=i + 1: len(run.starts) == n)
        moment = run.starts[-1] + rng.integers(1, n_steps // (n_kills + 1))
        run.wait_for(lambda step=moment: run.n_steps() >= step)
        run.kill(victim)
    run.finish()
    assert len(run.lines) == n_kills
    for line, victim, start in zip(run.lines, victims, run.starts[1:], strict=True):
        assert f"process {victim} died of SIGKILL (137); restart" in line
        where = f" from checkpoint {start}" if start else " from the beginning"
        assert line.removesuffix(", newly saved").endswith(where)
    assert "[Gloo] Rank" not in run.said

    undisturbed = Launched(tmp_path / "undisturbed", planted_store, n_steps)
    undisturbed.finish()
    assert undisturbed.starts == [0] and not undisturbed.lines
    folders = (run.workdir, undisturbed.workdir)
    metrics, expected = map(read_metrics, folders)
    assert metrics == expected and len(metrics) == n_steps
    states = [read_state(folder, n_steps, (1, 4)) for folder in folders]
    for name in ("params", "ema", "optimizer", "counters"):
        for one, other in zip(*(leaves(state, name) for state in states), strict=True):
            np.testing.assert_array_equal(one, other)
