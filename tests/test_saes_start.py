"""Parameters of every architecture at the start: names, values and placement."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from small_sae import D, L, make_rows, make_setup

from sae_jax import state as states
from sae_jax.saes import ARCHITECTURES

WEIGHTS = {"w_enc_ld", "w_dec_ld", "b_dec_d"}
FURTHER = {
    "topk": {"b_enc_l"},
    "batch_topk": {"b_enc_l", "threshold"},
    "relu": {"b_enc_l"},
    "relu_decoder_norm": {"b_enc_l"},
    "prolu": {"b_enc_l"},
    "gated": {"b_gate_l", "b_mag_l", "r_mag_l"},
    "jumprelu": {"b_enc_l", "threshold_l"},
}
THRESHOLD = 0.03

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def _sample() -> np.ndarray:
    return np.float32(2 + make_rows(5, 64))


@functools.cache
def _start(architecture, mesh_shape=(2, 4)):
    is_jumprelu = architecture == "jumprelu"
    fields = {"initial_threshold": THRESHOLD} if is_jumprelu else {}
    setup = make_setup(mesh_shape, architecture=architecture, **fields)
    return setup, states.create(setup, jnp.asarray(_sample())).params


@every_architecture
def test_parameters_start_where_the_recipe_says(architecture):
    setup, params = _start(architecture)
    assert params.keys() == WEIGHTS | FURTHER[architecture]
    assert {value.dtype for value in params.values()} == {jnp.dtype("float32")}
    for name in FURTHER[architecture]:
        want = np.float32(THRESHOLD if name == "threshold_l" else 0)
        np.testing.assert_array_equal(params[name], want, err_msg=name)
    is_free = architecture == "relu_decoder_norm"
    norm_l = np.linalg.norm(params["w_dec_ld"], axis=1)
    np.testing.assert_allclose(norm_l, 0.1 if is_free else 1, rtol=1e-6)
    np.testing.assert_array_equal(params["w_enc_ld"], params["w_dec_ld"])
    assert len(np.unique(np.round(params["w_dec_ld"], 5), axis=0)) == L
    median_d = 0 if is_free else oracle.geometric_median(np.float64(_sample()))
    np.testing.assert_allclose(params["b_dec_d"], median_d, rtol=1e-4)
    # Rows that a step keeps at unit norm must have it from the start.
    assert setup.unit_norm == (() if is_free else ("w_dec_ld",))


@every_architecture
def test_parameters_are_born_partitioned_over_latents(architecture):
    _, params = _start(architecture)
    n_own = L // 4
    shards = {"ld": (n_own, D), "l": (n_own,), "d": (D,), "threshold": ()}
    for name, value in params.items():
        shape = shards[name.rpartition("_")[2]]
        assert {s.data.shape for s in value.addressable_shards} == {shape}, name
        assert len(value.addressable_shards) == 8
    # A step gives up its arrays, so no two may be one.
    buffers = [
        shard.data.unsafe_buffer_pointer()
        for value in params.values()
        for shard in value.addressable_shards
    ]
    assert len(set(buffers)) == len(buffers)


@pytest.mark.parametrize(
    "architecture", ["topk", "batch_topk", "relu", "relu_decoder_norm", "jumprelu"]
)
def test_an_sae_without_an_encoder_bias_has_none(architecture):
    setup = make_setup((2, 4), architecture=architecture, use_b_enc=False)
    params = states.abstract(setup).params
    assert params.keys() == WEIGHTS | FURTHER[architecture] - {"b_enc_l"}


def test_norm_weighted_rows_are_free():
    assert make_setup((2, 4), norm_weighted=True).unit_norm == ()


@every_architecture
def test_the_start_is_the_same_on_every_mesh(architecture):
    (_, params), (_, sharded) = _start(architecture, (1, 1)), _start(architecture)
    jax.tree.map(np.testing.assert_array_equal, params, sharded)
