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
from launching import LAUNCH, find_port
from pods import TRAIN, leaves, read_metrics, read_state, write_config


_START = r"\btrain: .*, from step (\d+) to "


class Launched:
    """A run of two processes of two devices each, or one of these, as of a host."""

    def __init__(
        self, folder: Path, store: Path, n_steps: int, place: tuple[str, ...] = ()
    ):
        """`place` is what train is told of one that is started alone."""
        folder.mkdir(exist_ok=True)
        config = synthetic.make_config(store, rows=n_steps * 64)
        write_config(folder / "c.py", config)
        self.workdir = folder / "run"
        host = "".join(place[-1:])
        self._out, self._err = folder / f"out{host}", folder / f"err{host}"
        paths = os.pathsep.join(filter(None, sys.path))
        with open(self._out, "w") as out, open(self._err, "w") as err:
            self._launcher = subprocess.Popen(
                [
                    *(sys.executable, LAUNCH / "local.py"),
                    *("--name=launcher", f"--n_processes={1 if place else 2}"),
                    *("--max_restarts=5", f"--program={shlex.join(TRAIN)}", "--"),
                    *("--config=c.py", f"--workdir={self.workdir}"),
                    *("--cpu_devices=2", "--peer_timeout_secs=5", *place),
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
        """All that was printed."""
        return self._out.read_text() + self._err.read_text()

    @property
    def lines(self) -> list[str]:
        """What the launcher itself told."""
        lines = self._err.read_text().splitlines()
        return [line for line in lines if line.startswith("launcher: ")]

    def wait_for(self, is_so) -> None:
        end = time.monotonic() + 280
        while not is_so():
            assert self._launcher.poll() is None, self.said
            assert time.monotonic() < end, self.said
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
        (trainer,) = parents.keys() - parents.values()
        os.kill(trainer, signal.SIGKILL)

    def finish(self) -> None:
        status = self._launcher.wait(timeout=240)
        assert status == 0, self.said


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

    assert_same_bits(run, tmp_path, planted_store, n_steps)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hosts_that_each_start_their_own_end_with_the_same_bits(
    planted_store, tmp_path
):
    """As launch/tpu_vm.py leaves them: a lost process is started while others live."""
    n_steps, address = 48, f"--coordinator=127.0.0.1:{find_port()}"
    shared = ("--multihost", address, "--n_processes=2")
    hosts = [
        Launched(tmp_path / "run", planted_store, n_steps, (*shared, f"--process={i}"))
        for i in range(2)
    ]
    hosts[0].wait_for(lambda: hosts[0].n_steps() >= 20)
    hosts[1].kill(1)
    for host in hosts:
        host.finish()
    assert hosts[0].starts[0] == 0 and hosts[0].starts[-1] >= 16
    assert "process 0 died of SIGKILL (137); restart" in hosts[1].lines[0]
    assert "process 0 lost another process or its bucket (76)" in hosts[0].lines[0]
    assert_same_bits(hosts[0], tmp_path, planted_store, n_steps)


def assert_same_bits(
    run: Launched, folder: Path, store: Path, n_steps: int
) -> None:
    """As an undisturbed run has."""
    undisturbed = Launched(folder / "undisturbed", store, n_steps)
    undisturbed.finish()
    assert undisturbed.starts == [0] and not undisturbed.lines
    folders = (run.workdir, undisturbed.workdir)
    metrics, expected = map(read_metrics, folders)
    assert metrics == expected and len(metrics) == n_steps
    states = [read_state(folder, n_steps, (1, 4)) for folder in folders]
    for name in ("params", "ema", "optimizer", "counters"):
        for one, other in zip(*(leaves(state, name) for state in states), strict=True):
            np.testing.assert_array_equal(one, other)
