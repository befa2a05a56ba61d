"""What a training step holds beside state and gradients, as the dictionary grows.

    python experiments/bench_memory.py

The compiled step's temporaries, less two float32 buffers [L, D]: every trainer of this
SAE holds the gradients of its encoder and decoder. What is left should not grow with L;
`dense` is what one [B, L] of float32 would take. Compiled for every L, which takes a
few seconds each; up to --run_up_to latents a step is also run, in a process of its own:
`added` is the most that it held beyond what the process, with the state and the
compiled program, held before, and so counts gradients too; `peak` is all together.
Resident memory on a CPU, the allocator's on an accelerator; all in MiB.

On 2 CPU cores, 8,192 rows of width 768, K = 32, AuxK off (Python 3.11, jax 0.10.2):

| latents | temporaries | less gradients | [B, L] | state | added | peak |
|---|---|---|---|---|---|---|
| 32,768 | 250 | 58 | 1,024 | 769 | 250 | 1,619 |
| 65,536 | 420 | 36 | 2,048 | 1,537 | 428 | 2,579 |
| 131,072 | 804 | 36 | 4,096 | 3,075 | | |
| 262,144 | 1,574 | 38 | 8,192 | 6,149 | | |
"""

import concurrent.futures
import multiprocessing
import re
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import flags
from timing import Figures, Shape, compile_step, make_rows, make_setup, start

from sae_jax import state as states
from sae_jax.step import make_step

LATENTS = (32_768, 65_536, 131_072, 262_144)
MIB = 2**20
RUN_UP_TO = flags.DEFINE_integer("run_up_to", 65_536, "most latents that are run")


def measure(shape: Shape, repeats: int) -> Iterator[Figures]:
    """One row; memory is the same in every round."""
    del repeats
    analysis = compile_step(shape).memory_analysis()
    temporaries = analysis.temp_size_in_bytes / MIB
    gradients = 2 * 4 * shape.latents * shape.d_model / MIB
    leaves = jax.tree.leaves(states.abstract(make_setup(shape)))
    peak, added = None, None
    if shape.latents <= RUN_UP_TO.value:
        peak, added = _run_alone(shape)
    yield {
        "latents": shape.latents,
        "temporaries": temporaries,
        "less_gradients": temporaries - gradients,
        "dense": 4 * shape.rows * shape.latents / MIB,
        "gradients": gradients,
        "state": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / MIB,
        "added": added,
        "peak": peak,
    }


def _run_alone(shape: Shape) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_run, shape).result()


def _run(shape: Shape) -> tuple[float, float]:
    """The peak of a second step, and how much more that is than before it."""
    setup = make_setup(shape)
    rows_bd = make_rows(shape)
    step = make_step(setup)
    state, _ = step(states.create(setup, rows_bd), rows_bd)
    jax.block_until_ready(state)
    time.sleep(1)  # what a step held is given back a moment after its end
    before = _held()
    jax.block_until_ready(step(state, rows_bd))
    peak = _peak()
    return peak, peak - before


def _held() -> float:
    """MiB, and from here on the process's peak is counted anew."""
    statistics = jax.devices()[0].memory_stats()
    if statistics:
        return statistics["bytes_in_use"] / MIB
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _peak() -> float:
    statistics = jax.devices()[0].memory_stats()
    return statistics["peak_bytes_in_use"] / MIB if statistics else _resident("VmHWM")


def _resident(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{name}:\s*(\d+) kB", status)[0]) / 1024


if __name__ == "__main__":
    start(measure, latents=LATENTS)
