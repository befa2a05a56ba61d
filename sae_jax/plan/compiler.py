"""The real step, compiled ahead of time for devices that need not be there.

For a TPU topology by libtpu, which comes with the extra `tpu`; for `cpu:N` by the CPU's
compiler. In a process of its own, which this file is the program of: it has the number
of devices and the platform set before JAX starts, and a compiler that crashes takes
nothing with it. The step is never run.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from sae_jax import mesh as meshes
from sae_jax import state as states
from sae_jax.config import TrainConfig, from_json, to_json
from sae_jax.normalize import Normalization
from sae_jax.plan import program
from sae_jax.plan.topology import Topology
from sae_jax.state import Setup
from sae_jax.step import make_step

_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
_SIZES = re.compile(r"([\d.]+)([KMGT]?)\)? exceeds available \w+ \(([\d.]+)([KMGT]?)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a device."""

    compiler: str  # with its version
    seconds: float
    peak_bytes: int
    fits: bool
    argument_bytes: int | None = None  # state and rows; None where it does not fit
    flops: float | None = None  # what is in a loop counted once
    moved: tuple[dict[str, Any], ...] = ()  # `program.Moved`, and its bytes


def why_not(topology: Topology) -> str | None:
    """Why there is no compiler for this topology here, or None."""
    if topology.platform == "gpu":
        return "no compiler for GPUs works without one"
    if topology.platform == "tpu":
        if topology.chip.name == "v4":
            return "libtpu's topologies of v4 cannot be meshed by JAX"
        if importlib.util.find_spec("libtpu") is None:
            return "libtpu is not installed: pip install 'sae_jax[tpu]'"
    return None


def compile_step(
    config: TrainConfig, topology: Topology, shape: tuple[int, int]
) -> Compiled:
    """The step on a (data, latent) mesh of this shape.

    Raises:
        ValueError: the compiler fails for another reason than memory; one line.
    """
    asked = {
        "config": to_json(config),
        "platform": topology.platform,
        "chip": topology.chip.name,
        "torus": topology.shape,
        "n_devices": topology.n_devices,
        "shape": shape,
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(asked),
        # No cloud's metadata is asked what TPU this is, and no TPU is there to lock.
        env=os.environ
        | {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
            "NPROC": str(max(int(os.environ.get("NPROC", 1)), topology.n_devices)),
        },
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ValueError(f"compiling for {topology.name} failed: {lines[-1]}")
    return Compiled(**json.loads(done.stdout.splitlines()[-1]))


def compile_on(config: TrainConfig, mesh: Mesh) -> Compiled:
    """The step on a mesh of devices that this process has, or that are described."""
    platform = mesh.devices.flat[0].platform
    begin = time.monotonic()
    lowered = _lower(config, mesh)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if _OUT_OF_MEMORY not in str(error):
            raise
        seconds = time.monotonic() - begin
        return Compiled(_name(platform), seconds, _needed(str(error)), fits=False)
    memory = compiled.memory_analysis()
    if platform == "tpu":
        peak_bytes = memory.peak_memory_in_bytes
    else:  # of a CPU that counts no arguments
        own = memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak_bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes + own
    return Compiled(
        _name(platform),
        time.monotonic() - begin,
        peak_bytes,
        True,
        memory.argument_size_in_bytes,
        (compiled.cost_analysis() or {}).get("flops"),
        tuple(
            dataclasses.asdict(one) | {"n_bytes": one.n_bytes}
            for one in program.moved(compiled.as_text())
        ),
    )


def _lower(config: TrainConfig, mesh: Mesh) -> Any:
    normalization = Normalization(config.sae.normalization)
    setup = Setup(config, normalization, mesh, "none", "none")
    rows_bd = jax.ShapeDtypeStruct(
        (config.data.batch_rows, config.sae.d_model),
        "bfloat16",  # as stores and streams give them
        sharding=meshes.batch_sharding(mesh),
    )
    step: Any = make_step(setup)
    return step.lower(states.abstract(setup), rows_bd)


def _name(platform: str) -> str:
    name = "libtpu" if platform == "tpu" else "jaxlib"
    return f"{name} {importlib.metadata.version(name)}"


def _needed(error: str) -> int:
    """The bytes that a program wants, from the compiler's refusal; 0 if not told."""
    match = _SIZES.search(error)
    return int(float(match[1]) * _UNITS[match[2]]) if match else 0


def _answer(asked: dict[str, Any]) -> Compiled:
    """In the process of its own, before JAX has started."""
    jax.config.update("jax_platforms", "cpu")
    if asked["platform"] == "cpu":
        jax.config.update("jax_num_cpu_devices", asked["n_devices"])
    config = from_json(TrainConfig, asked["config"], "the config")
    n_data, n_latent = asked["shape"]
    devices = _devices(asked)[: n_data * n_latent]
    return compile_on(config, meshes.mesh_of((n_data, n_latent), devices))


def _devices(asked: dict[str, Any]) -> list[Any]:
    if asked["platform"] == "cpu":
        return jax.devices()
    torus = asked["torus"]
    bounds = [1, 1, 1] if max(torus) == 1 else [2, 2, 1]
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{asked['chip']}:{'x'.join(map(str, torus))}",
        chips_per_host_bounds=bounds,
    ).devices


if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(_answer(json.load(sys.stdin)))))
