"""BatchTopK, Multi-TopK, Matryoshka and norm-weighted TopK of the rivals' oracle."""

import numpy as np
import oracle
import oracle_rivals as rivals
import oracle_topk_family as topk_family
import pytest
from rival_cases import (
    B,
    DEAD_L,
    K,
    L,
    SETTINGS,
    THRESHOLD,
    make_params,
    make_rows,
    make_settings,
)


def test_topk_is_the_oracles_topk():
    params, x_bd = make_params("topk"), make_rows()
    want = oracle.forward(params, x_bd, DEAD_L, SETTINGS)
    out = rivals.terms("topk", params, x_bd, DEAD_L, SETTINGS)
    np.testing.assert_array_equal(out.f_bl, want.z_bl)
    np.testing.assert_array_equal(out.x_hat_bd, want.x_hat_bd)
    assert out.metrics["nmse"] == want.main and out.metrics["aux_loss"] == want.aux
    assert out.metrics["loss"] == pytest.approx(want.total, rel=1e-14)
    got = rivals.gradients("topk", params, x_bd, DEAD_L, SETTINGS)
    for name, value in oracle.gradients(params, x_bd, DEAD_L, SETTINGS).items():
        np.testing.assert_allclose(got[name], value, rtol=1e-12, atol=1e-15)


def test_batch_topk_takes_the_best_of_the_batch():
    params, x_bd = make_params("batch_topk"), make_rows()
    f_bl = rivals.terms("batch_topk", params, x_bd, DEAD_L, SETTINGS).f_bl
    pre_bl = oracle.pre_activations(params, x_bd, True)
    best = np.sort(pre_bl.ravel())[-K * B :]
    np.testing.assert_array_equal(np.sort(f_bl[f_bl > 0]), best)
    assert topk_family.batch_threshold(pre_bl, K) == best[0]
    assert len({(row > 0).sum() for row in f_bl}) > 1
    inferred_bl = rivals.encode("batch_topk", params, x_bd, SETTINGS)
    np.testing.assert_array_equal(inferred_bl, np.where(pre_bl >= THRESHOLD, pre_bl, 0))


def test_batch_topks_threshold_with_ties_and_with_few_positive():
    pre_bl = np.array([[3.0, 2.0, 1.0], [2.0, 2.0, -1.0]])
    assert topk_family.batch_threshold(pre_bl, 1) == 2
    tied_bl = topk_family.code_above(pre_bl, 2)
    np.testing.assert_array_equal(tied_bl, [[3, 2, 0], [2, 2, 0]])
    assert topk_family.batch_threshold(pre_bl, 3) == 0
    every_bl = topk_family.code_above(pre_bl, 0)
    np.testing.assert_array_equal(every_bl, np.maximum(pre_bl, 0))


def test_batch_topks_running_threshold_starts_at_the_first_and_follows():
    threshold = topk_family.next_threshold(None, 2.0)
    assert threshold == 2
    threshold = topk_family.next_threshold(threshold, 3.0)
    assert threshold == pytest.approx(2.1)


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_one_prefix_of_all_latents_changes_nothing(architecture):
    params, x_bd = make_params(architecture), make_rows()
    want = rivals.gradients(architecture, params, x_bd, DEAD_L, SETTINGS)
    whole = make_settings(prefixes=(L,))
    got = rivals.gradients(architecture, params, x_bd, DEAD_L, whole)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_a_prefix_is_the_smaller_sae_of_the_latents_chosen_among_all():
    params, x_bd = make_params("topk"), make_rows()
    settings = make_settings(prefixes=(4, L))
    out = rivals.terms("topk", params, x_bd, DEAD_L, settings)
    x_hat_bd = out.f_bl[:, :4] @ params["w_dec_ld"][:4] + params["b_dec_d"]
    want = oracle.main_loss(x_hat_bd, x_bd, 1.7)
    assert out.metrics["nmse_prefix_4"] == pytest.approx(want, rel=1e-12)
    g = rivals.gradients("topk", params, x_bd, DEAD_L, settings, "nmse_prefix_4")
    assert not g["w_dec_ld"][4:].any() and g["w_dec_ld"][:4].any()


def test_multi_topk_is_the_error_of_four_times_as_many():
    params, x_bd = make_params("topk"), make_rows()
    out = rivals.terms("topk", params, x_bd, DEAD_L, make_settings(multi_topk=True))
    more = rivals.terms("topk", params, x_bd, DEAD_L, make_settings(k=4 * K))
    assert out.metrics["multi_topk_nmse"] == more.metrics["nmse"]
    assert out.metrics["nmse"] != more.metrics["nmse"]


def test_norm_weighted_topk_is_topk_of_the_folded_weights():
    params, x_bd = make_params("topk"), make_rows()
    norm_l = np.sqrt((params["w_dec_ld"] ** 2).sum(axis=1))
    folded = params | {
        "w_enc_ld": params["w_enc_ld"] * norm_l[:, None],
        "b_enc_l": params["b_enc_l"] * norm_l,
        "w_dec_ld": params["w_dec_ld"] / norm_l[:, None],
    }
    weighted = make_settings(norm_weighted=True)
    got = rivals.terms("topk", params, x_bd, DEAD_L, weighted)
    want = rivals.terms("topk", folded, x_bd, DEAD_L, SETTINGS)
    np.testing.assert_allclose(got.f_bl, want.f_bl, rtol=1e-12)
    assert got.metrics == pytest.approx(want.metrics, rel=1e-12)
    plain = rivals.terms("topk", params, x_bd, DEAD_L, SETTINGS)
    assert ((plain.f_bl > 0) != (got.f_bl > 0)).any()  # the norms change the choice
