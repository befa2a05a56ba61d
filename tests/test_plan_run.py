"""The analytic model against what steps that are really run take of this machine.

A process of its own for each, whose memory is all that it has ever asked for: the most
that is resident during a step, less what was before there was a state.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sae_jax.config import to_json
from sae_jax.plan import memory
from sae_jax.plan.step import Step
from test_plan import AGREEMENT, make_config

_CHILD = """
import ctypes, json, sys
import jax, ml_dtypes, numpy as np
from sae_jax import config as configs, mesh as meshes, state as states
from sae_jax.normalize import Normalization
from sae_jax.step import make_step

jax.config.update("jax_num_cpu_devices", 8)

def resident(name):
    ctypes.CDLL(None).malloc_trim(0)
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines[name].split()[0]) * 1024

config = configs.from_json(configs.TrainConfig, sys.argv[1], "a test")
mesh = meshes.make_mesh(config.mesh)
setup = states.Setup(config, Normalization("none"), mesh, "none", "none")
shape, sharding = json.loads(sys.argv[2]), meshes.batch_sharding(mesh)
rows_bd = jax.ShapeDtypeStruct(shape, "bfloat16", sharding=sharding)
step = make_step(setup).lower(states.abstract(setup), rows_bd).compile()
before = resident("VmRSS")
rng = np.random.default_rng(0)
state = states.create(setup, rng.standard_normal((256, shape[1]), np.float32))
acts = rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
acts_bd = meshes.put(acts, sharding)
del acts
for _ in range(2):
    open("/proc/self/clear_refs", "w").write("5")  # the most begins anew
    state, _ = step(state, acts_bd)
    jax.block_until_ready(state)
print(resident("VmHWM") - before)
"""
POINTS = {
    "latents over devices": (
        (1, 4),
        4096,
        None,
        dict(n_latents=24_576, d_model=384, k=24),
    ),
    "micro-batches": (
        (2, 2),
        16_384,
        4096,
        dict(n_latents=32_768, d_model=192, k=32),
    ),
    "one device": ((1, 1), 8192, None, dict(n_latents=65_536, d_model=512, k=32)),
}


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="as Linux tells memory"
)
@pytest.mark.parametrize(
    "point",
    [
        "latents over devices",
        pytest.param("micro-batches", marks=pytest.mark.slow),
        pytest.param("one device", marks=pytest.mark.slow),
    ],
)
def test_the_model_agrees_with_a_run(point):
    mesh_shape, rows, part, sae = POINTS[point]
    config = make_config(rows, part, **sae, k_aux=sae["d_model"] // 2)
    mesh = dataclasses.replace(config.mesh, data=mesh_shape[0], latent=mesh_shape[1])
    config = dataclasses.replace(
        config,
        mesh=mesh,
        sae=dataclasses.replace(
            config.sae, subtract_b_dec=True, normalization="none"
        ),
    )
    shape = json.dumps((rows, sae["d_model"]))
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, to_json(config), shape],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    step = Step(config, *mesh_shape, "cpu")
    ratio = memory.peak(step) * mesh_shape[0] * mesh_shape[1] / int(done.stdout)
    print(f"{point}: {ratio:.3f} of {int(done.stdout) / 2**20:.0f} MiB")
    assert abs(ratio - 1) < AGREEMENT
