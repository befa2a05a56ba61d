"""The analytic model against libtpu, and steps of 16.8 M latents for whole pods.

No point here is one that the model was made with. `compile_step` has a process of its
own for each, and needs no TPU.
"""

import dataclasses
import importlib.util

import pytest

from sae_jax.config import (
    DataConfig,
    OptimizerConfig,
    SaeConfig,
    TrainConfig,
)
from sae_jax.plan import memory, parse
from sae_jax.plan.compiler import compile_step
from sae_jax.plan.step import Step

AGREEMENT = 0.1
# Topology, mesh, rows, rows of a micro-batch, most of the gradient's norm, and the SAE.
POINTS = {
    "v5e, AuxK": (
        "tpu:v5e-4",
        (1, 4),
        16_384,
        None,
        None,
        dict(n_latents=786_432, d_model=768, k=48),
    ),
    "v6e, two data shards": (
        "tpu:v6e-4",
        (2, 2),
        8192,
        None,
        None,
        dict(n_latents=262_144, d_model=2048, k=64),
    ),
    "v5p, four data shards, clipped": (
        "tpu:v5p-16",
        (4, 2),
        32_768,
        None,
        1.0,
        dict(n_latents=196_608, d_model=3072, k=48, aux_coefficient=0.0),
    ),
    "v6e, micro-batches": (
        "tpu:v6e-8",
        (1, 8),
        65_536,
        16_384,
        None,
        dict(n_latents=1_048_576, d_model=1536, k=32),
    ),
    "tpu7x, Multi-TopK": (
        "tpu:tpu7x-8",
        (1, 8),
        32_768,
        None,
        None,
        dict(n_latents=2_097_152, d_model=1024, k=64, multi_topk=True),
    ),
    "v5e, exact": (
        "tpu:v5e-8",
        (1, 8),
        8192,
        None,
        None,
        dict(n_latents=524_288, d_model=768, k=32, selection="exact"),
    ),
}
# The worked example of docs/plan.md; on v6e without AuxK, for it is the smaller pod.
PODS = {
    "v5p": (
        "tpu:v5p-256",
        (1, 128),
        131_072,
        dict(n_latents=2**24, d_model=12_288, k=128),
    ),
    "v6e": (
        "tpu:v6e-256",
        (1, 256),
        16_384,
        dict(n_latents=2**24, d_model=12_288, k=128, aux_coefficient=0.0),
    ),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed: pip install 'jax[tpu]'",
    ),
]


def make_config(rows, microbatch_rows, clip_norm, sae):
    return TrainConfig(
        sae=SaeConfig(**{"selection": "bucketed"} | sae),
        data=DataConfig(batch_rows=rows, microbatch_rows=microbatch_rows, lanes=1),
        optimizer=OptimizerConfig(clip_norm=clip_norm),
        rows=1000 * rows,
        dead_after_rows=100 * rows,
    )


def check_agreement(config, topology, mesh_shape):
    step = Step(config, *mesh_shape, "tpu")
    compiled = compile_step(config, parse(topology), mesh_shape)
    ratio = memory.peak(step) / compiled.peak_bytes
    print(
        f"{topology} {mesh_shape}: model / {compiled.compiler} = {ratio:.3f} of "
        f"{compiled.peak_bytes / 2**30:.2f} GiB, compiled in {compiled.seconds:.0f} s"
    )
    assert compiled.fits
    assert abs(sum(memory.state(step).values()) / compiled.argument_bytes - 1) < 0.01
    assert abs(ratio - 1) < AGREEMENT


@pytest.mark.parametrize("point", POINTS)
def test_the_model_agrees_with_the_compiler(point):
    topology, mesh_shape, *settings = POINTS[point]
    check_agreement(make_config(*settings), topology, mesh_shape)


@pytest.mark.parametrize("pod", PODS)
def test_a_step_of_16_m_latents_compiles_for_a_pod(pod):
    topology, mesh_shape, rows, sae = PODS[pod]
    check_agreement(make_config(rows, None, None, sae), topology, mesh_shape)


def test_an_exact_choice_of_many_compiles():
    """libtpu aborts if a gather gets into the scatter of what was chosen for again."""
    sae = dict(n_latents=65_536, d_model=512, k=128, selection="exact")
    config = make_config(4096, None, None, sae | {"aux_coefficient": 0.0})
    assert Step(config, 1, 4, "tpu").choice.n_buckets == 512
    assert compile_step(config, parse("tpu:v5p-8"), (1, 4)).fits


def test_what_does_not_fit_is_an_answer():
    config = make_config(8192, None, None, dict(n_latents=2**20, d_model=4096, k=32))
    compiled = compile_step(config, parse("tpu:v5e-4"), (1, 4))
    assert not compiled.fits
    step = Step(config, 1, 4, "tpu")
    assert abs(memory.peak(step) / compiled.peak_bytes - 1) < AGREEMENT
    more = dataclasses.replace(step, n_latent=16)
    assert memory.peak(more) < parse("tpu:v5e-16").chip.hbm_bytes
