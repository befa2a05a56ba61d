"""Runs of several processes on this machine, by the command `sae-jax train`."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import synthetic
from launching import find_port

import sae_jax
from sae_jax import writers
from sae_jax.checkpoint import Checkpoints
from sae_jax.config import MeshConfig, to_json
from sae_jax.mesh import make_mesh

CONFIG = """
from sae_jax import config

def get_config():
    return config.from_json(config.TrainConfig, {text!r}, "a test")
"""
_RUN = "from sae_jax.cli import run; run()"
TRAIN = (sys.executable, "-c", _RUN, "train")
_LIMIT_SECS = 280  # less than the suite's own


class Pod:
    """Processes of one run; as a context manager it leaves none behind."""

    def __init__(
        self,
        workdir: Path,
        data: Path,
        n_processes: int,
        devices_each: int,
        *arguments: str,
        module: str = "synthetic",
        rows: int = 24 * 64,
        missing: tuple[int, ...] = (),
        own_arguments: tuple[str, ...] = (),
        code: str = "",
    ):
        """The config is `make_config(data)` of the module. `missing` are not started;
        the last one has `own_arguments` as well. All begin with `code`."""
        config = workdir.parent / f"{workdir.name}.py"
        made = importlib.import_module(module).make_config(str(data), rows=rows)
        write_config(config, made)
        self.workdir, self.n_processes = workdir, n_processes
        common = [
            *(sys.executable, "-c", f"{code}\n{_RUN}", "train"),
            f"--config={config}",
            f"--workdir={workdir}",
            f"--cpu_devices={devices_each}",
            "--multihost",
            f"--coordinator=127.0.0.1:{find_port()}",
            f"--n_processes={n_processes}",
            *arguments,
        ]
        self._logs = [
            open(f"{workdir}.{i}.log", "w+b") for i in range(n_processes)
        ]
        self._processes = {
            i: subprocess.Popen(
                [
                    *common,
                    f"--process={i}",
                    *(own_arguments if i == n_processes - 1 else ()),
                ],
                stdout=self._logs[i],
                stderr=subprocess.STDOUT,
                env=os.environ | make_environ(),
            )
            for i in range(n_processes)
            if i not in missing
        }

    def __enter__(self) -> "Pod":
        return self

    def __exit__(self, *_: object) -> None:
        for i, process in self._processes.items():
            if process.poll() is None:
                for pid in (*self._find_children(i), process.pid):
                    _kill(pid, 9)
                process.wait()
        for log in self._logs:
            log.close()

    def wait(self) -> list[int]:
        """The exit codes."""
        end = time.monotonic() + _LIMIT_SECS
        codes = []
        for i, process in self._processes.items():
            try:
                codes.append(process.wait(max(0, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"process {i} hangs: {self.tell(i)}") from None
        return codes

    def wait_for_step(self, step: int) -> None:
        """Until the metrics of this step are written."""
        metrics, end = self.workdir / "metrics.jsonl", time.monotonic() + _LIMIT_SECS
        while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
            codes = {i: p.poll() for i, p in self._processes.items()}
            over = [i for i, code in codes.items() if code is not None]
            assert not over, f"{codes}: {self.tell(over[0])}"
            assert time.monotonic() < end, self.tell(0)
            time.sleep(0.01)

    def send(self, process: int, number: int) -> None:
        """Sends a signal to what computes, not to what waits for it."""
        (child,) = self._find_children(process)
        _kill(child, number)

    def tell(self, process: int) -> str:
        """What the process has printed."""
        return Path(self._logs[process].name).read_text(errors="replace")

    def last_line(self, process: int) -> str:
        lines = [line for line in self.tell(process).splitlines() if "sae-jax" in line]
        return lines[-1] if lines else self.tell(process)[-500:]

    def _find_children(self, process: int) -> list[int]:
        parent = self._processes[process].pid
        path = Path(f"/proc/{parent}/task/{parent}/children")
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def make_environ() -> dict[str, str]:
    """Of processes that compute as tests do."""
    folders = os.path.dirname(__file__), os.path.dirname(sae_jax.__path__[0])
    return {
        "PYTHONPATH": os.pathsep.join(folders),
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    }


def write_config(path, config):
    """A file for --config."""
    path.write_text(CONFIG.format(text=to_json(config)))


def read_metrics(workdir):
    """The rows, less what is another in every life."""
    return synthetic.drop_times(writers.read_json_lines(workdir / "metrics.jsonl"))


def read_state(workdir, step, shape=(1, 1)):
    """Everything in a checkpoint, on a mesh of this process."""
    checkpoints = Checkpoints(workdir, is_read_only=True)
    setup = checkpoints.meta(step).setup(make_mesh(MeshConfig(*shape)))
    state = checkpoints.restore(step, setup)
    checkpoints.close()
    return state


def leaves(state, name):
    """The arrays of one part of a state."""
    return jax.tree.leaves(jax.device_get(getattr(state, name)))


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
