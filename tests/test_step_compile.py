"""The training step of 16.8 M latents compiles for a pod, and holds and moves little.

Compiled ahead of time by libtpu for whole topologies, without a TPU, in a process of
their own: this file is that process's program too. Read from the compiled program are
the shapes of all its arrays, what it moves between chips, and the memory of a chip.

A matrix of parameters has 2**35 elements, more than an int32 counts. A data shard has
B = 8 D rows: even in bfloat16 [B, L/S] takes more than all that a chip should hold
beside its state, four times 4 D L/S bytes against three.
"""

import collections
import importlib.util
import json
import os
import re
import subprocess
import sys
import time

import jax
import pytest
from collectives import Moved, arrays_moved
from jax.experimental import topologies
from jax.sharding import AxisType

from sae_jax import state as states
from sae_jax.config import DataConfig, SaeConfig, TrainConfig
from sae_jax.mesh import DATA, LATENT, batch_sharding
from sae_jax.normalize import Normalization
from sae_jax.saes.topk import plan_choice
from sae_jax.state import Setup
from sae_jax.step import make_step

ROWS, WIDTH, LATENTS, K = 16_384, 2048, 2**24, 32  # rows of a data shard
MESHES = {"v5e:8x16": (1, 128), "v5p:4x4x8": (4, 32)}
HBM_BYTES = {"v5e:8x16": 15.75 * 2**30, "v5p:4x4x8": 95 * 2**30}
TILE = 8192 * 8192  # pre-activations that are held at once
# A tile in float32, and arrays of [B, D] and of the candidates [B, S K].
MOST_BESIDE_BYTES = 2**30
MOST_SMALL = 4 * WIDTH + 64  # floats that move beside what scales with B or L

assert LATENTS * WIDTH > 2**31 and ROWS >= 8 * WIDTH

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # minutes each, and more beside other tests
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed: pip install 'jax[tpu]'",
    ),
]


@pytest.fixture(scope="module", params=MESHES)
def compiled(request):
    """The topology, and what its process tells of the compiled step."""
    done = subprocess.run(
        [sys.executable, __file__, request.param],
        # No cloud's metadata is asked what TPU this is, and no TPU is there to lock.
        env=os.environ
        | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"},
        stdout=subprocess.PIPE,
        check=True,
    )
    told = json.loads(done.stdout)
    print({name: told[name] for name in told if name not in ("shapes", "moved")})
    return request.param, told


def test_platform_is_that_of_the_mesh(compiled):
    _, told = compiled
    assert told["compute_dtype"] == "bfloat16"
    assert told["tile_rows"] * told["tile_latents"] == TILE


def test_nothing_of_rows_by_latents_is_held(compiled):
    topology, told = compiled
    n_data, n_latent = MESHES[topology]
    own = LATENTS // n_latent
    large = {tuple(shape) for shape in told["shapes"] if _size(shape) > TILE}
    # Parameters and gradients; a data shard's part of averages and moments.
    assert large == {(own, WIDTH), (own // n_data, WIDTH)}


def test_memory_is_that_of_parameters(compiled):
    topology, told = compiled
    n_data, n_latent = MESHES[topology]
    own_bytes = 4 * WIDTH * LATENTS // n_latent
    # Encoder and decoder; averages and two moments, which data shards share.
    state_bytes = (2 + 6 / n_data) * own_bytes
    assert state_bytes < told["argument_bytes"] < 1.02 * state_bytes
    # Their gradients, and both rounded to bfloat16.
    beside = told["peak_bytes"] - told["argument_bytes"] - 3 * own_bytes
    # And dead latents' pre-activations, of 128 rows, in some steps of their making.
    assert beside < MOST_BESIDE_BYTES + 6 * 4 * 128 * LATENTS // MESHES[topology][1]
    assert told["peak_bytes"] < HBM_BYTES[topology]


def test_traffic_is_what_the_design_allows(compiled):
    topology, told = compiled
    n_data, n_latent = MESHES[topology]
    own = LATENTS // n_latent
    moved = [Moved(*array) for array in told["moved"]]
    allowed = [Moved("all-reduce", "f32", ROWS * WIDTH, False)]
    allowed += [Moved("all-gather", "f32", ROWS * n_latent * K, False)]
    if n_data > 1:
        for is_auxks in (False, True):
            allowed += [Moved("all-reduce", "f32", own * WIDTH, is_auxks)] * 2
            allowed += [Moved("all-reduce", "f32", own, is_auxks)]  # b_enc's
        # What each data shard has updated.
        allowed += [Moved("all-gather", "f32", own * WIDTH, False)] * 2
        allowed += [Moved("all-gather", "f32", own, False)]
        allowed += [Moved("all-reduce", "s32", own, False)]  # which fired
    beside = collections.Counter(moved) - collections.Counter(allowed)
    assert collections.Counter(moved) >= collections.Counter(allowed), moved
    beside = list(beside.elements())
    # A tile of rows at a time, AuxK counts, at most once for a row and shard, and adds
    # up its x̂.
    auxks = [array for array in beside if array.is_inside]
    counts = [array.elements for array in auxks if array.dtype == "s32"]
    sums = [array.elements for array in auxks if array.dtype == "f32"]
    assert 0 < max(counts) <= ROWS * n_latent // 8
    assert WIDTH < max(sums) <= ROWS * WIDTH // 8
    small = [array.elements for array in beside if array not in auxks]
    assert sum(small) <= MOST_SMALL, beside


def _size(shape):
    size = 1
    for n in shape:
        size *= n
    return size


def _compile(topology):
    """What is asked above, of the compiled step."""
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=topology
    ).devices
    mesh = jax.make_mesh(
        MESHES[topology], (DATA, LATENT), (AxisType.Auto,) * 2, devices=devices
    )
    rows = ROWS * mesh.shape[DATA]
    config = TrainConfig(
        sae=SaeConfig(
            d_model=WIDTH, n_latents=LATENTS, k=K, selection="bucketed"
        ),
        data=DataConfig(batch_rows=rows, lanes=1),
        rows=1000 * rows,
        dead_after_rows=100 * rows,
    )
    normalization = Normalization(config.sae.normalization)
    setup = Setup(config, normalization, mesh, "none", "none")
    state = states.abstract(setup)
    rows_bd = jax.ShapeDtypeStruct(
        (rows, WIDTH), "bfloat16", sharding=batch_sharding(mesh)
    )
    begin = time.monotonic()
    compiled = make_step(setup).lower(state, rows_bd).compile()
    choice = plan_choice(config.sae, mesh, K)
    memory, program = compiled.memory_analysis(), compiled.as_text()
    shapes = set(re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", program))
    return {
        "seconds": time.monotonic() - begin,
        "compute_dtype": setup.sae(state.params).dtype.name,
        "tile_rows": choice.tile_rows,
        "tile_latents": choice.tile_latents,
        "argument_bytes": memory.argument_size_in_bytes,
        # Counts arguments; `temp_size_in_bytes` is more than is ever held at once.
        "peak_bytes": memory.peak_memory_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "shapes": [[int(n) for n in dims.split(",")] for dims in sorted(shapes)],
        "moved": arrays_moved(program),
    }


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    print(json.dumps(_compile(sys.argv[1])))
