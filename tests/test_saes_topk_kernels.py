"""The TopK SAE with the kernels of each platform against itself without them.

The kernels are interpreted, for which `jax.shard_map` must not check what varies over
which mesh axis; with its checks on they lower, in `test_kernels_compile`.
"""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from compare import QUICK_TO_COMPILE, check_gradients, check_loss
from small_sae import (
    make_counters,
    make_params,
    make_rows,
    make_setup,
    place,
    random_dead,
)

from sae_jax import kernels
from sae_jax.mesh import batch_sharding
from sae_jax.saes import Sae

OWN = 2048  # so many that each latent shard has buckets
slow = pytest.mark.slow  # to compile
BUCKETED, EXACT, APPROX = ({"selection": s} for s in ("bucketed", "exact", "approx"))
CASES = [
    ("tpu", (1, 1), BUCKETED),
    ("gpu", (2, 4), BUCKETED | {"multi_topk": True}),
    pytest.param("tpu", (2, 4), BUCKETED | {"multi_topk": True}, marks=slow),
    pytest.param("tpu", (2, 4), EXACT | {"norm_weighted": True}, marks=slow),
    ("gpu", (2, 4), EXACT | {"norm_weighted": True}),
    pytest.param("gpu", (1, 1), APPROX | {"prefixes": (100, OWN)}, marks=slow),
]


@pytest.fixture
def interpreted(platform, monkeypatch):
    """The kernels of `platform`, interpreted; and how often each was called."""
    calls = {}

    def counted(name, kernel):
        def call(*args):
            calls[name] = calls.get(name, 0) + 1
            return kernel(*args)

        return call

    found = kernels.find(platform, interpret=True)
    found = kernels.Kernels(*map(counted, found._fields, found))
    monkeypatch.setattr(kernels, "find", lambda platform: found)
    on_shards = Sae.on_shards

    def unchecked(sae, on_shard, in_specs, out_specs, check_vma=True):
        return on_shards(sae, on_shard, in_specs, out_specs, check_vma=False)

    monkeypatch.setattr(Sae, "on_shards", unchecked)
    return calls


@pytest.fixture
def warnings(monkeypatch):
    """What is logged as a warning, as if nothing had been logged before."""
    lines = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *args: lines.append(text % args)
    )
    kernels.find.cache_clear()
    kernels._tell_plain.cache_clear()
    return lines


def _setup(mesh_shape, **sae):
    return make_setup(mesh_shape, n_latents=OWN * mesh_shape[1], **sae)


def _differentiate(setup, params):
    """What comes beside the loss, its metrics among it, and the gradients."""
    n_latents = setup.config.sae.n_latents

    @functools.partial(jax.jit, compiler_options=QUICK_TO_COMPILE)
    @functools.partial(jax.grad, has_aux=True)
    def differentiate(params, rows_bd, counters):
        return setup.sae(params).loss((rows_bd, rows_bd), counters)

    rows_bd = jax.device_put(np.float32(make_rows()), batch_sharding(setup.mesh))
    counters = make_counters(random_dead(99, n_latents))
    gradients, aux = differentiate(
        place(setup, params, np.float32), rows_bd, counters
    )
    return aux, gradients


@pytest.mark.parametrize(("platform", "mesh_shape", "sae"), CASES)
def test_losses_and_gradients_are_those_of_plain_jax(
    platform, mesh_shape, sae, request
):
    params = make_params(n_latents=OWN * mesh_shape[1])
    want, want_gradients = _differentiate(_setup(mesh_shape, **sae), params)
    calls = request.getfixturevalue("interpreted")
    got, gradients = _differentiate(_setup(mesh_shape, kernels=True, **sae), params)
    is_bucketed = sae["selection"] == "bucketed"
    assert calls.keys() == set(kernels.Kernels._fields[not is_bucketed :])
    assert got["metrics"].keys() == want["metrics"].keys()
    for name, value in want["metrics"].items():
        np.testing.assert_allclose(
            got["metrics"][name], value, rtol=1e-5, err_msg=name
        )
    np.testing.assert_array_equal(got["fired_l"], want["fired_l"])
    check_gradients(gradients, jax.tree.map(np.asarray, want_gradients), rtol=1e-5)


@pytest.mark.parametrize("platform", ["gpu", pytest.param("tpu", marks=slow)])
def test_codes_and_their_reconstructions_are_those_of_plain_jax(platform, request):
    def encode(setup):
        params = make_params(n_latents=4 * OWN)
        sae = setup.sae(place(setup, params, np.float32))
        # Not as many rows for each: `encode` is traced anew for each platform.
        rows_bd = make_rows(n_rows={"gpu": 13, "tpu": 14}[platform])
        code = sae.encode(jnp.float32(rows_bd))
        return code, sae.decode(code)

    want, want_recon_bd = encode(_setup((2, 4), selection="bucketed"))
    calls = request.getfixturevalue("interpreted")
    got, recon_bd = encode(_setup((2, 4), selection="bucketed", kernels=True))
    assert calls.keys() == {"bucket_candidates", "decode"}
    np.testing.assert_array_equal(got.indices, want.indices)
    np.testing.assert_allclose(got.values, want.values, rtol=1e-5)
    np.testing.assert_allclose(recon_bd, want_recon_bd, rtol=1e-5, atol=1e-5)


def test_a_platform_without_kernels_is_told_once_and_runs_plain_jax(x64, warnings):
    """The oracle's loss to 1e-10, in which float32 kernels have no part."""
    for mesh_shape in ((1, 1), (1, 8)):
        setup = make_setup(mesh_shape, kernels=True)
        check_loss(setup, make_params(), make_rows(), random_dead(12))
    assert len(warnings) == 1
    assert "sae.kernels" in warnings[0] and "'cpu'" in warnings[0]


@pytest.mark.parametrize("platform", ["gpu"])
def test_what_a_kernel_refuses_is_told_once_and_runs_plain_jax(
    x64, warnings, interpreted
):
    """Here float64; the oracle's loss to 1e-10."""
    for sae in ({"multi_topk": True}, {"prefixes": (8, 32)}):
        setup = make_setup((1, 1), kernels=True, **sae)
        check_loss(setup, make_params(), make_rows(), random_dead(12))
    assert sorted(line.split(":")[1].strip() for line in warnings) == sorted(
        kernels.Kernels._fields[1:]
    )
    assert all("float64" in line for line in warnings)


OFF = """
import os, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
from small_sae import *
from sae_jax import state
from sae_jax.step import make_step
setup = make_setup(selection="bucketed")
rows_bd = jax.ShapeDtypeStruct((B, D), jnp.float32)
make_step(setup).lower(state.abstract(setup), rows_bd)
held = [name for name in sys.modules if name.startswith("jax.experimental.pallas")]
held += [name for name in sys.modules if name.startswith("sae_jax.kernels.")]
assert held == ["sae_jax.kernels.shapes"], held
"""


def test_pallas_is_not_imported_unasked():
    subprocess.run(
        [sys.executable, "-c", OFF],
        check=True,
        cwd=os.path.dirname(__file__),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
