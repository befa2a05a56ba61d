"""Codes of the TopK SAE on every mesh against the oracle, and where it starts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from compare import check_code
from small_sae import (
    B,
    D,
    K,
    L,
    MESHES,
    make_params,
    make_rows,
    make_setup,
    place,
    whole_numbers,
)

from sae_jax.config import NORMALIZATIONS
from sae_jax.normalize import Normalization
from sae_jax.saes import TopKSae


every_mesh = pytest.mark.parametrize("mesh_shape", MESHES)


@pytest.mark.parametrize(
    ("mesh_shape", "subtract_b_dec"), [*((m, True) for m in MESHES), ((2, 4), False)]
)
def test_encode_and_decode_are_the_oracles(x64, mesh_shape, subtract_b_dec):
    normalization = Normalization("layer_norm")
    setup = make_setup(mesh_shape, normalization, subtract_b_dec=subtract_b_dec)
    params, acts_bd = make_params(), 5 + 3 * make_rows()
    sae = setup.sae(place(setup, params))
    normed_bd, shift_b1, scale_b1 = oracle.normalize("layer_norm", acts_bd)
    pre_bl = oracle.pre_activations(params, normed_bd, subtract_b_dec)
    code = sae.encode(jnp.asarray(acts_bd))
    check_code(code, pre_bl, K, rtol=1e-12)
    np.testing.assert_allclose(code.shift, shift_b1, rtol=1e-12)
    np.testing.assert_allclose(code.scale, scale_b1, rtol=1e-12)
    z_bl = oracle.chosen_values(pre_bl, oracle.choose(pre_bl, K))
    dense_bl = sae.encode_dense(jnp.asarray(acts_bd))
    np.testing.assert_allclose(dense_bl, z_bl, rtol=1e-11)
    np.testing.assert_allclose(code.to_dense(L), z_bl, rtol=1e-11)
    want = oracle.encode(params, normed_bd, K, subtract_b_dec)
    want_bd = oracle.undo(oracle.decode(params, *want), shift_b1, scale_b1)
    np.testing.assert_allclose(sae.decode(code), want_bd, rtol=1e-10)


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_encode_and_decode_work_in_the_space_of_every_normalisation(x64, kind):
    acts_bd = 5 + 3 * make_rows()
    scale = 2.5 if kind in ("scale_to_sqrt_d", "unit_mean_square") else 1.0
    setup, params = make_setup((2, 4), Normalization(kind, scale)), make_params()
    sae = setup.sae(place(setup, params))
    normed_bd, *undoing = oracle.normalize(
        kind, acts_bd, mean_norm=scale * D**0.5, mean_square_norm=scale**2
    )
    want_bd = oracle.decode(params, *oracle.encode(params, normed_bd, K))
    recon_bd = sae.decode(sae.encode(jnp.asarray(acts_bd)))
    np.testing.assert_allclose(recon_bd, oracle.undo(want_bd, *undoing), rtol=1e-10)


@pytest.mark.parametrize(
    ("mesh_shape", "k"), [*((m, K) for m in MESHES), ((1, 8), 1), ((2, 4), L)]
)
def test_ties_go_to_the_oracles_latents(mesh_shape, k):
    setup = make_setup(mesh_shape, k=k)
    params, rows_bd = whole_numbers()
    pre_bl = oracle.pre_activations(params, rows_bd, subtract_b_dec=True)
    n_tied = sum(len(set(pre_l[pre_l > 0])) < (pre_l > 0).sum() for pre_l in pre_bl)
    assert n_tied > B / 2 and ((pre_bl > 0).sum(1) < L).all()
    sae = setup.sae(place(setup, params, np.float32))
    code = sae.encode(jnp.float32(rows_bd))
    check_code(code, pre_bl, k)
    z_bl = oracle.chosen_values(pre_bl, oracle.choose(pre_bl, k))
    np.testing.assert_array_equal(sae.encode_dense(jnp.float32(rows_bd)), z_bl)
    want_bd = z_bl @ params["w_dec_ld"] + params["b_dec_d"]
    np.testing.assert_array_equal(sae.decode(code), want_bd)


@pytest.mark.parametrize("mesh_shape", [(1, 1), (1, 8)])
def test_rows_with_fewer_than_k_positive_values_leave_slots_unused(mesh_shape):
    setup = make_setup(mesh_shape)
    params, rows_bd = whole_numbers()
    params["b_enc_l"] -= 6
    pre_bl = oracle.pre_activations(params, rows_bd, subtract_b_dec=True)
    n_positive_b = (pre_bl > 0).sum(1)
    assert (n_positive_b < K).all() and 0 in n_positive_b and n_positive_b.any()
    sae = setup.sae(place(setup, params, np.float32))
    code = sae.encode(jnp.float32(rows_bd))
    check_code(code, pre_bl, K)
    np.testing.assert_array_equal((code.values > 0).sum(1), n_positive_b)
    for silent_d in np.asarray(sae.decode(code))[n_positive_b == 0]:
        np.testing.assert_array_equal(silent_d, params["b_dec_d"])


@pytest.mark.parametrize(
    ("mesh_shape", "shape"),
    [((8, 1), (D,)), ((8, 1), (3, D)), ((2, 4), (2, 5, D)), ((1, 8), (1, D))],
)
def test_rows_come_in_any_number_and_shape(mesh_shape, shape):
    setup, params = make_setup(mesh_shape), make_params()
    acts = np.float32(make_rows(3, 16).reshape(-1)[: np.prod(shape)].reshape(shape))
    sae = setup.sae(place(setup, params, np.float32))
    code = sae.encode(jnp.asarray(acts))
    assert code.values.shape == code.indices.shape == (*shape[:-1], K)
    assert code.shift.shape == code.scale.shape == (*shape[:-1], 1)
    values_bk, indices_bk = oracle.encode(params, acts.reshape(-1, D), K)
    np.testing.assert_array_equal(code.indices.reshape(-1, K), indices_bk)
    np.testing.assert_allclose(code.values.reshape(-1, K), values_bk, rtol=1e-5)
    want = oracle.decode(params, values_bk, indices_bk).reshape(shape)
    np.testing.assert_allclose(sae.decode(code), want, rtol=1e-4, atol=1e-5)
    assert sae.encode_dense(jnp.asarray(acts)).shape == (*shape[:-1], L)


def test_bfloat16_rows_are_read_as_the_float32_rows_they_are():
    setup = make_setup((2, 4), Normalization("center_unit_norm"))
    sae = setup.sae(place(setup, make_params(), np.float32))
    acts_bd = jnp.asarray(make_rows(), jnp.bfloat16)
    code, want = sae.encode(acts_bd), sae.encode(acts_bd.astype(jnp.float32))
    np.testing.assert_array_equal(code.indices, want.indices)
    np.testing.assert_array_equal(code.values, want.values)
    assert code.values.dtype == sae.decode(code).dtype == jnp.float32


def test_rows_of_another_width_are_refused():
    setup = make_setup()
    sae = setup.sae(place(setup, make_params(), np.float32))
    with pytest.raises(ValueError, match=rf"{D + 1}.*d_model = {D}"):
        sae.encode(jnp.zeros((4, D + 1)))


@every_mesh
def test_parameters_are_born_in_place_with_parallel_unit_rows(mesh_shape):
    setup = make_setup(mesh_shape)
    b_dec_d = jnp.arange(D, dtype=jnp.float32)
    with jax.set_mesh(setup.mesh):
        make = functools.partial(
            TopKSae, setup.config.sae, setup.normalization, setup.mesh, "resid_post.0"
        )
        sae = jax.jit(make)(jax.random.key(0), b_dec_d)
    w_dec_ld = sae.w_dec_ld[...]
    np.testing.assert_allclose(np.linalg.norm(w_dec_ld, axis=1), 1, atol=1e-6)
    assert len(np.unique(np.round(w_dec_ld, 5), axis=0)) == L
    cosine_ll = np.asarray(sae.w_enc_ld[...] @ w_dec_ld.T)
    length_l = np.linalg.norm(sae.w_enc_ld[...], axis=1)
    np.testing.assert_allclose(np.diag(cosine_ll) / length_l, 1, rtol=1e-6)
    np.testing.assert_array_equal(sae.b_dec_d[...], b_dec_d)
    np.testing.assert_array_equal(sae.b_enc_l[...], 0)
    n_shards = mesh_shape[1]
    for array, shape in (
        (sae.w_enc_ld[...], (L // n_shards, D)),
        (w_dec_ld, (L // n_shards, D)),
        (sae.b_enc_l[...], (L // n_shards,)),
        (sae.b_dec_d[...], (D,)),
    ):
        assert array.sharding.shard_shape(array.shape) == shape
