"""Every kernel compiles for its platform, at the shapes of a real run, and in a step.

The TPU's are compiled ahead of time by libtpu, without a TPU, in a process of their
own: this file is that process's program too. Mosaic refuses much that interprets well:
more VMEM than there is, copies that are not aligned. The GPU's are lowered to Triton,
which refuses arrays that are no power of two; compiling them would take a GPU.
"""

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import lax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax import kernels, state, step
from sae_jax.config import DataConfig, SaeConfig, TrainConfig
from sae_jax.mesh import batch_sharding
from sae_jax.normalize import Normalization

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
ROWS, WIDTH, LATENTS, K = 8192, 2048, 2**18, 64
ENTRIES = ROWS * K  # of a code
# Beside arguments and results: casts of x and g, never [B, L] nor a copy of w.
MOST_TEMP_BYTES = 2**28

pytestmark = pytest.mark.slow
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'jax[tpu]'",
)

# Later versions lower for a GPU only where no mesh of CPU devices is in the way.
needs_jax_10 = pytest.mark.skipif(
    jax.__version_info__ >= (0, 11), reason="takes a GPU from jax 0.11 on"
)


@needs_libtpu
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_kernels_compile_for_a_tpu(topology):
    done = subprocess.run(
        [sys.executable, __file__, topology],
        # No cloud's metadata is asked what TPU this is.
        env=os.environ | {"TPU_SKIP_MDS_QUERY": "1"},
        stdout=subprocess.PIPE,
        check=True,
    )
    compiled = json.loads(done.stdout)
    assert len(compiled) > 12
    assert {name for name, fault in compiled.items() if fault} == set(), compiled


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_lower_for_cuda(dtype):
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="cuda")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    for name, kernel, arguments in _calls("gpu", dtype):
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(kernel).trace(*arguments)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "triton" in text, name


@needs_jax_10
def test_kernels_of_shards_lower_for_cuda():
    devices = jax.devices()[:4]
    for name, kernel, arguments in _sharded_calls("gpu", devices):
        traced = jax.jit(kernel).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "triton" in text, name


@needs_jax_10
@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
def test_a_step_with_kernels_lowers_for_cuda(monkeypatch, shape):
    found = kernels.find("gpu")
    monkeypatch.setattr(kernels, "find", lambda platform: found)
    devices = np.reshape(jax.devices()[: math.prod(shape)], shape)
    setup, rows_bd = _run(Mesh(devices, ("data", "latent")))
    traced = step.make_step(setup).trace(state.abstract(setup), rows_bd)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Candidates, decode and its two gradients, and the encoder's two.
    assert text.count("custom_call @__gpu$xla.gpu.triton(") == 6


@needs_libtpu
def test_a_step_with_kernels_compiles_for_a_tpu():
    subprocess.run(
        [sys.executable, __file__, "step"],
        env=os.environ | {"TPU_SKIP_MDS_QUERY": "1"},
        check=True,
    )


def _run(mesh):
    """A run with kernels, and the rows of one of its steps."""
    sae = SaeConfig(
        d_model=768,
        n_latents=2**16,
        k=32,
        k_aux=256,
        selection="bucketed",
        kernels=True,
        compute_dtype="bfloat16",
    )
    config = TrainConfig(sae=sae, data=DataConfig(batch_rows=ROWS))
    setup = state.Setup(config, Normalization(), mesh, "resid_post.0", "0")
    sharding = batch_sharding(mesh)
    return setup, jax.ShapeDtypeStruct((ROWS, 768), "float32", sharding=sharding)


def _calls(platform, dtype):
    """Names, functions of arrays, and arguments: real shapes, and odd ones."""
    own = kernels.find(platform)
    for rows, width, latents, n_buckets, kept in [
        (ROWS, WIDTH, LATENTS, 1024, 2),
        (ROWS, WIDTH, LATENTS, 4096, 1),
        (ROWS, 4096, LATENTS, 1024, 4),
        (ROWS, 768, 3 * 2**13, 512, 3),
        (13, 70, 100, 128, 1),
    ]:
        name = f"candidates [{rows}, {width}], L {latents}, {kept} of {n_buckets}"
        chosen = functools.partial(
            own.bucket_candidates, n_buckets=n_buckets, kept=kept
        )
        x, w = _array(rows, width, dtype), _array(latents, width, dtype)
        yield f"{name}, {dtype}", chosen, (x, w, _array(latents))
    for rows, width, latents, k in [
        (ROWS, WIDTH, LATENTS, K),
        (ROWS, 4096, LATENTS, 512),
        (13, 70, 100, 9),
        (1, 768, 25000, 1),
    ]:
        shape = f"[{rows}, {width}], L {latents}, K {k}, {dtype}"
        x = _array(rows, width, dtype)
        # A TPU copies rows of float32 alone.
        w = _array(latents, width, "float32" if platform == "tpu" else dtype)
        values, indices = _array(rows, k), _array(rows, k, "int32")
        yield f"decode {shape}", own.decode, (values, indices, w)
        yield f"sampled product {shape}", own.sampled_product, (x, w, indices)
        values, of_row = _array(rows * k), _array(rows * k, "int32")
        starts = _array(latents + 1, "int32")
        yield f"segments {shape}", own.segment_outer, (values, of_row, starts, x)


def _sharded_calls(platform, devices):
    """The same inside `jax.shard_map` on a (2, 2) mesh, its checks on."""
    own = kernels.find(platform)
    mesh = Mesh(np.reshape(devices, (2, 2)), ("data", "latent"))
    rows, latents, both = P("data"), P("latent"), P(("data", "latent"))
    x = ([ROWS, WIDTH], "bfloat16", rows)
    w = ([LATENTS, WIDTH], "float32", latents)
    code = ([ROWS, K], "float32", rows), ([ROWS, K], "int32", rows)
    for name, kernel, arguments, out in [
        (
            "candidates",
            functools.partial(own.bucket_candidates, n_buckets=1024, kept=2),
            (x, (w[0], "bfloat16", latents), ([LATENTS], "float32", latents)),
            P("data", "latent"),
        ),
        (
            "decode",
            lambda *code_and_w: lax.psum(own.decode(*code_and_w), "latent"),
            (*code, w),
            rows,
        ),
        (
            "sampled product",
            lambda *x_w_indices: lax.psum(own.sampled_product(*x_w_indices), "latent"),
            (x, w, code[1]),
            rows,
        ),
        (
            "segments",
            lambda values, of_row, starts, g: lax.psum(
                own.segment_outer(values, of_row, starts[0], g), "data"
            ),
            (
                ([4 * ENTRIES], "float32", both),
                ([4 * ENTRIES], "int32", both),
                ([4, LATENTS // 2 + 1], "int32", both),
                x,
            ),
            latents,
        ),
    ]:
        mapped = jax.shard_map(
            kernel, mesh=mesh, in_specs=tuple(a[2] for a in arguments), out_specs=out
        )
        placed = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
            for shape, dtype, spec in arguments
        ]
        yield f"{name} of shards", mapped, placed


def _array(*shape_and_dtype):
    """An array that is only declared, float32 unless a dtype follows the shape."""
    *shape, last = shape_and_dtype
    if isinstance(last, str):
        return jax.ShapeDtypeStruct(shape, last)
    return jax.ShapeDtypeStruct((*shape, last), "float32")


def _compile_all(topology):
    """What went wrong with each kernel, or nothing."""
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=topology
    ).devices
    on_one = NamedSharding(Mesh(np.array(devices[:1]), ("x",)), P())
    faults = {}
    for dtype in ("bfloat16", "float32"):
        for name, kernel, arguments in _calls("tpu", dtype):
            placed = [
                jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on_one)
                for a in arguments
            ]
            faults[name] = _compile(kernel, placed)
    for name, kernel, placed in _sharded_calls("tpu", devices):
        faults[name] = _compile(kernel, placed)
    return faults


def _compile(kernel, arguments):
    try:
        compiled = jax.jit(kernel).lower(*arguments).compile()
    except Exception as error:  # whatever the compiler says, told with the others
        return f"{type(error).__name__}: {error}"[:1000]
    if "tpu_custom_call" not in compiled.as_text():
        return "no kernel in the program"
    temp_bytes = compiled.memory_analysis().temp_size_in_bytes
    if temp_bytes > MOST_TEMP_BYTES:
        return f"{temp_bytes} bytes of temporaries"
    return ""


def _compile_step(topology):
    """A step over four chips; an error where the compiler refuses it."""
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=topology
    ).devices
    mesh = Mesh(np.reshape(devices, (2, 2)), ("data", "latent"))
    setup, rows_bd = _run(mesh)
    # A state is described with a key that is on its devices: here on one that is there.
    on_cpu, _ = _run(Mesh(np.reshape(jax.devices(), (1, 1)), ("data", "latent")))
    placed = jax.tree.map(
        lambda leaf: leaf.update(sharding=NamedSharding(mesh, leaf.sharding.spec)),
        state.abstract(on_cpu),
    )
    state.abstract = lambda setup: placed
    compiled = step.make_step(setup).lower(placed, rows_bd).compile()
    # The rows' gradient is not asked for.
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 5


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    if sys.argv[1] == "step":
        _compile_step(TOPOLOGIES[0])
        sys.exit()
    print(json.dumps(_compile_all(sys.argv[1])))
