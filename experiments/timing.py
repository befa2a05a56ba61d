"""Shapes, clocks and reports: what the benchmarks here share.

A figure is the median over rounds; in every round each contender runs once, so that all
see the same machine. What a benchmark prints is a table, and as its last line one JSON
object with every figure, the command and the versions.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from runs import print_header, print_row

from sae_jax import state as states
from sae_jax.config import DataConfig, MeshConfig, SaeConfig, TrainConfig
from sae_jax.mesh import batch_sharding, make_mesh
from sae_jax.normalize import Normalization
from sae_jax.state import Setup
from sae_jax.step import make_step

Figures = dict[str, Any]

_LONG = 100_000  # steps: in no benchmark does a latent die, or a schedule end


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of one step; `dtype` is that of the rows and of the factors of matmuls."""

    rows: int
    d_model: int
    latents: int
    k: int
    dtype: str


_SHAPES = {
    "cpu": Shape(rows=8192, d_model=768, latents=32_768, k=32, dtype="float32"),
    "gpu": Shape(rows=65_536, d_model=4096, latents=131_072, k=64, dtype="bfloat16"),
}


def start(
    measure: Callable[[Shape, int], Iterable[Figures]], **shapes: tuple[int, ...]
) -> None:
    """The main of a benchmark: flags, a table of what `measure` yields, one JSON line.

    `measure(shape, repeats)` is asked about every shape that the flags name; a flag
    that is not given has the values in `shapes`, or else the platform's.
    """
    for field in dataclasses.fields(Shape):
        flags.DEFINE_list(field.name, None, "of a step; one or more, with commas")
    repeats = flags.DEFINE_integer("repeats", 5, "rounds", lower_bound=1)

    def main(argv: list[str]) -> None:
        del argv
        logging.set_verbosity(logging.WARNING)
        # Whatever it was: with more threads than cores a device thrashes.
        os.environ["NPROC"] = str(n_cores())
        # The processes of a benchmark share one accelerator.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        results: list[Figures] = []
        for shape in _shapes(shapes):
            for figures in measure(shape, repeats.value):
                if not results:
                    print_header(list(figures))
                print_row([_cell(value) for value in figures.values()])
                results.append(dataclasses.asdict(shape) | figures)
        figures = {"repeats": repeats.value, "results": results}
        print(json.dumps(describe_setting() | figures))

    app.run(main)


def medians(
    contenders: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, float]:
    """Seconds of each contender, which has run once before, to compile."""
    for run in contenders.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def make_setup(
    shape: Shape, mesh_shape: tuple[int, int] = (1, 1), **sae: Any
) -> Setup:
    """A run of this shape that needs no store; AuxK is off unless given."""
    config = TrainConfig(
        sae=SaeConfig(
            d_model=shape.d_model,
            n_latents=shape.latents,
            k=shape.k,
            compute_dtype=shape.dtype,
            **({"aux_coefficient": 0.0} | sae),
        ),
        data=DataConfig(batch_rows=shape.rows, lanes=1),
        rows=2 * _LONG * shape.rows,
        dead_after_rows=_LONG * shape.rows,
    )
    mesh = make_mesh(MeshConfig(*mesh_shape))
    return Setup(config, Normalization(config.sae.normalization), mesh, "none", "none")


def make_rows(shape: Shape) -> jax.Array:
    """One batch of normal rows, the same in every process."""
    size = (shape.rows, shape.d_model)
    rows_bd = np.random.default_rng(0).standard_normal(size, np.float32)
    return jnp.asarray(rows_bd, shape.dtype)


def compile_step(
    shape: Shape, mesh_shape: tuple[int, int] = (1, 1), **sae: Any
) -> Any:
    """The step's `jax.stages.Compiled`, for a state that is not made."""
    setup = make_setup(shape, mesh_shape, **sae)
    rows_bd = jax.ShapeDtypeStruct(
        (shape.rows, shape.d_model), shape.dtype, sharding=batch_sharding(setup.mesh)
    )
    step: Any = make_step(setup)
    return step.lower(states.abstract(setup), rows_bd).compile()


def plain_matmuls(
    x_bd: jax.Array, w_ld: jax.Array
) -> dict[str, Callable[[], jax.Array]]:
    """The encoder alone, by either layout of its weights; [B, L] is written."""
    multiply_ld = jax.jit(lambda x_bd, w_ld: x_bd @ w_ld.T)
    multiply_dl = jax.jit(lambda x_bd, w_dl: x_bd @ w_dl)
    w_ld = jnp.copy(w_ld).astype(x_bd.dtype)
    w_dl = jnp.copy(w_ld.T)
    return {
        "x @ w_ld.T": lambda: multiply_ld(x_bd, w_ld),
        "x @ w_dl": lambda: multiply_dl(x_bd, w_dl),
    }


def n_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def _shapes(chosen: Mapping[str, tuple[int, ...]]) -> Iterable[Shape]:
    default = _SHAPES.get(jax.default_backend(), _SHAPES["gpu"])
    axes = []
    for field in dataclasses.fields(Shape):
        given = flags.FLAGS[field.name].value
        axes.append(
            [type(getattr(default, field.name))(value) for value in given]
            if given
            else chosen.get(field.name, (getattr(default, field.name),))
        )
    return itertools.starmap(Shape, itertools.product(*axes))


def describe_setting() -> Figures:
    """What ran, on what and with which versions: how each report begins."""
    name = Path(sys.argv[0]).name
    return {
        "benchmark": name,
        "command": shlex.join(["python", f"experiments/{name}", *sys.argv[1:]]),
        "device": jax.devices()[0].device_kind,
        "cores": n_cores(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "sae_jax")},
    }


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
