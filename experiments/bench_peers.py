"""A training step against those of other libraries, each in a process of its own.

    python experiments/bench_peers.py --venv=build/peers

makes that environment and installs the peers with pip, unless it is there (a few
minutes, and 2 GB with a CPU build of torch; see BUILD.md for that). Same rows, shapes,
K, squared error and Adam for all; AuxK off; as many threads as cores. In each round
every contender is started once and does three steps, of which the last two count.
`times_ours` is in relation to the exact choice. What cannot be installed or run stays
in the table, with the reason. What each does beside is said in `peer_step.py`.

On 2 CPU cores, 8,192 rows of width 768, 32,768 latents, K = 32, float32 (Python 3.11,
torch 2.13.0, --repeats=2, about 8 minutes):

| contender | seconds | over ours, bucketed |
|---|---|---|
| sae_jax exact (0.1.0) | 3.10 | 1.08 |
| sae_jax bucketed (0.1.0) | 2.86 | 1.00 |
| sparsify (1.3.3) | 4.46 | 1.56 |
| dictionary_learning (0.1.0) | 17.39 | 6.07 |
| sae_lens (6.54.12) | 25.23 | 8.81 |
| sae_lens sparse (6.54.12) | 11.56 | 4.04 |

The plain encoder matmul alone takes 2.7 s there (`bench_step.py`): 2.4 times the speed
of sparsify, which we aimed at, is out of reach of any step that computes it.
"""

import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

from absl import flags
from peer_step import CONTENDERS
from timing import Figures, Shape, n_cores, start

TORCH = "torch==2.13.0"
PEERS = ("eai-sparsify==1.3.3", "dictionary-learning==0.1.0", "sae-lens==6.54.12")
OURS = "sae_jax exact"
VENV = flags.DEFINE_string("venv", "build/peers", "an environment that has the peers")


def measure(shape: Shape, repeats: int) -> Iterator[Figures]:
    """One row for each contender."""
    python = _prepare(Path(VENV.value))
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    versions: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for _ in range(repeats):
        for name in CONTENDERS:
            if name in reasons:
                continue
            try:
                result = _run(name, python, shape)
            except subprocess.CalledProcessError as error:
                reasons[name] = _reason(error)
            else:
                seconds[name] += result["seconds"]
                versions[name] = result["versions"]
    medians = {name: statistics.median(s) for name, s in seconds.items() if s}
    for name in CONTENDERS:
        is_measured = name in medians and OURS in medians
        yield {
            "contender": name,
            "versions": versions.get(name),
            "seconds": medians.get(name),
            "times_ours": medians[name] / medians[OURS] if is_measured else None,
            "failed": reasons.get(name),
        }


def _prepare(folder: Path) -> str:
    """The environment's Python; what pip could not install is missing there."""
    python = str(folder.absolute() / "bin" / "python")
    if not folder.exists():
        venv.create(folder, with_pip=True)
        pip = [python, "-m", "pip"]
        for peer in PEERS:
            subprocess.run([*pip, "install", TORCH, peer], stdout=sys.stderr)
        # Beside a CPU build of torch it breaks transformers; no step uses it.
        subprocess.run([*pip, "uninstall", "-y", "torchvision"], stdout=sys.stderr)
    return python


def _run(name: str, python: str, shape: Shape) -> Figures:
    if name.startswith("sae_jax"):
        python = sys.executable
    script = str(Path(__file__).with_name("peer_step.py"))
    threads = dict.fromkeys(("NPROC", "OMP_NUM_THREADS"), str(n_cores()))
    result = subprocess.run(
        [python, script, name, json.dumps(dataclasses.asdict(shape))],
        env=os.environ | threads,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # without a terminal, which some library waits for
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


def _reason(error: subprocess.CalledProcessError) -> str:
    if error.returncode < 0:
        return f"killed by signal {-error.returncode}"
    lines = error.stderr.strip().splitlines() or ["without a word"]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return (raised or lines)[-1][:200]


if __name__ == "__main__":
    start(measure)
