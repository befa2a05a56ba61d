"""Codes and reconstructions of every architecture but plain TopK against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_rivals as rivals
import oracle_topk_family as topk_family
import pytest
from compare import check_code
from rival_cases import make_params
from small_sae import (
    B,
    D,
    K,
    L,
    MESHES,
    make_rows,
    make_setup,
    oracle_settings,
    place,
    whole_numbers,
)

from sae_jax.normalize import Normalization
from sae_jax.saes import SparseCode

PENALISED = ["relu", "relu_decoder_norm", "prolu", "gated", "jumprelu"]
CASES = {
    **{name: {"architecture": name} for name in (*PENALISED, "batch_topk")},
    "multi-topk": {"multi_topk": True},
    "norm-weighted": {"norm_weighted": True},
}
# On mesh (1, 8) a code is wider than a shard, and every row has more active latents.
WIDTHS = {name: {"max_active": 5} for name in (*PENALISED, "batch_topk")}


def _params(case, **changes):
    return make_params(CASES[case].get("architecture", "topk"), **changes)


def _rank(setup, params, normed_bd) -> oracle.Array:
    """The dense code; of TopK, what the choice is made among."""
    settings, architecture = oracle_settings(setup), setup.config.sae.architecture
    if architecture == "topk":
        params = topk_family.effective(params, settings)
        return oracle.pre_activations(params, normed_bd, settings.subtract_b_dec)
    return rivals.encode(architecture, params, normed_bd, settings)


@pytest.mark.parametrize(
    ("case", "mesh_shape"),
    [
        *((case, (1, 8)) for case in CASES),
        *(
            (case, mesh_shape)
            for case in ("gated", "batch_topk", "norm-weighted")
            for mesh_shape in MESHES
            if mesh_shape != (1, 8)
        ),
    ],
)
def test_encode_and_decode_are_the_oracles(x64, case, mesh_shape):
    normalization = Normalization("layer_norm")
    fields = CASES[case] | WIDTHS.get(case, {})
    setup = make_setup(mesh_shape, normalization, **fields)
    params, acts_bd = _params(case), 5 + 3 * make_rows()
    sae = setup.sae(place(setup, params))
    normed_bd, *undoing = oracle.normalize("layer_norm", acts_bd)
    ranked_bl = _rank(setup, params, normed_bd)
    n_slots = 5 if case in WIDTHS else K
    code = sae.encode(jnp.asarray(acts_bd))
    check_code(code, ranked_bl, n_slots, rtol=1e-10)
    # The same on every mesh in unused slots too.
    chosen = oracle.choose(ranked_bl, n_slots)
    np.testing.assert_array_equal(code.indices, chosen)
    n_active_b1 = (ranked_bl > 0).sum(axis=1, keepdims=True)
    is_cut = case in WIDTHS
    np.testing.assert_array_equal(
        code.n_cut, np.maximum(n_active_b1 - n_slots, 0) if is_cut else 0
    )
    assert not is_cut or (np.asarray(code.n_cut) > 0).sum() > B / 2
    z_bl = oracle.chosen_values(ranked_bl, chosen)
    np.testing.assert_allclose(code.to_dense(L), z_bl, rtol=1e-10)
    w_dec_ld = topk_family.effective(params, oracle_settings(setup))["w_dec_ld"]
    want_bd = oracle.undo(z_bl @ w_dec_ld + params["b_dec_d"], *undoing)
    np.testing.assert_allclose(sae.decode(code), want_bd, rtol=1e-10)


@pytest.mark.parametrize("architecture", [*PENALISED, "batch_topk"])
def test_a_code_holds_every_active_latent_where_it_may(x64, architecture):
    setup, params = make_setup((2, 4), architecture=architecture), _params(architecture)
    params["b_dec_d"] += 1  # so that a few rows have few active latents
    sae = setup.sae(place(setup, params))
    code = sae.encode(jnp.asarray(make_rows()))
    f_bl = _rank(setup, params, make_rows())
    check_code(code, f_bl, L, rtol=1e-10)
    np.testing.assert_array_equal(code.n_cut, 0)
    assert (np.asarray(code.values)[:, -1] == 0).all()  # there are unused slots
    np.testing.assert_allclose(sae.encode_dense(jnp.asarray(make_rows())), f_bl)


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4)])
def test_batch_topk_keeps_what_reaches_its_threshold(mesh_shape):
    setup = make_setup(mesh_shape, architecture="batch_topk")
    params, rows_bd = whole_numbers()
    pre_bl = oracle.pre_activations(params, rows_bd, subtract_b_dec=True)
    for threshold in (0, 2, 2.5, 99):
        params["threshold"] = np.float64(threshold)
        sae = setup.sae(place(setup, params, np.float32))
        dense_bl = sae.encode_dense(jnp.float32(rows_bd))
        is_kept_bl = (pre_bl >= threshold) & (pre_bl > 0)
        assert is_kept_bl.any() == (threshold < 99)
        np.testing.assert_array_equal(dense_bl, np.where(is_kept_bl, pre_bl, 0))


def test_jumprelu_drops_what_equals_its_threshold():
    setup = make_setup((2, 4), architecture="jumprelu")
    params, rows_bd = whole_numbers()
    params["threshold_l"] = np.arange(L) % 4 - 1.0
    pre_bl = oracle.pre_activations(params, rows_bd, subtract_b_dec=True)
    assert ((pre_bl == params["threshold_l"]) & (pre_bl > 0)).any()
    sae = setup.sae(place(setup, params, np.float32))
    is_kept_bl = pre_bl > np.maximum(params["threshold_l"], 0)
    np.testing.assert_array_equal(
        sae.encode_dense(jnp.float32(rows_bd)), np.where(is_kept_bl, pre_bl, 0)
    )


@pytest.mark.parametrize("architecture", ["topk", "relu_decoder_norm"])
def test_decoder_rows_of_any_length(x64, architecture):
    """Norm-weighted TopK decodes with unit rows; free rows count as they are."""
    norm_weighted = architecture == "topk"
    setup = make_setup(
        (2, 4), architecture=architecture, norm_weighted=norm_weighted
    )
    params = make_params(architecture)
    norm_l = np.linalg.norm(params["w_dec_ld"], axis=1)
    assert not np.allclose(norm_l, 1, atol=0.2)
    one_l1 = jnp.ones((L, 1))
    each = SparseCode(
        values=one_l1,
        indices=jnp.arange(L, dtype=jnp.int32)[:, None],
        shift=0 * one_l1,
        scale=one_l1,
        n_cut=jnp.zeros((L, 1), jnp.int32),
    )
    rows_ld = setup.sae(place(setup, params)).decode(each) - params["b_dec_d"]
    want_l = np.ones(L) if norm_weighted else norm_l
    np.testing.assert_allclose(np.linalg.norm(rows_ld, axis=1), want_l, rtol=1e-12)
    cosine_l = (rows_ld * params["w_dec_ld"]).sum(axis=1) / norm_l / want_l
    np.testing.assert_allclose(cosine_l, 1, rtol=1e-12)


@pytest.mark.parametrize("architecture", [*PENALISED, "batch_topk"])
def test_a_row_without_active_latents_is_rebuilt_as_the_bias(architecture):
    setup, params = make_setup((1, 8), architecture=architecture), _params(architecture)
    bias = "b_gate_l" if architecture == "gated" else "b_enc_l"
    params[bias] -= 99
    sae = setup.sae(place(setup, params, np.float32))
    code = sae.encode(jnp.float32(make_rows()))
    check_code(code, np.zeros((B, L)), L)
    want_bd = np.tile(np.float32(params["b_dec_d"]), (B, 1))
    np.testing.assert_array_equal(sae.decode(code), want_bd)


@pytest.mark.parametrize(("mesh_shape", "shape"), [((8, 1), (3, D)), ((2, 4), (D,))])
def test_n_cut_has_the_shape_of_rows_that_do_not_fill_the_mesh(mesh_shape, shape):
    setup = make_setup(mesh_shape, architecture="relu", max_active=2)
    params = _params("relu")
    acts = make_rows().reshape(-1)[: np.prod(shape)].reshape(shape)
    code = setup.sae(place(setup, params, np.float32)).encode(jnp.float32(acts))
    f_bl = _rank(setup, params, acts.reshape(-1, D))
    want = (f_bl > 0).sum(axis=1) - 2
    np.testing.assert_array_equal(code.n_cut, want.reshape(*shape[:-1], 1))
    assert code.values.shape == (*shape[:-1], 2)


def test_codes_pass_through_jit_as_arguments(x64):
    """An SAE and its code are pytrees."""
    setup, params = make_setup((2, 4), architecture="gated"), _params("gated")
    sae, rows_bd = setup.sae(place(setup, params)), jnp.asarray(make_rows())
    want_bd = sae.decode(sae.encode(rows_bd))
    found_bd = jax.jit(lambda sae, rows: sae.decode(sae.encode(rows)))(sae, rows_bd)
    np.testing.assert_allclose(found_bd, want_bd, rtol=1e-12)
