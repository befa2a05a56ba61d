"""The rivals' oracle against finite differences, and what its losses are made of."""

import numpy as np
import oracle_rivals as rivals
import oracle_topk_family as topk_family
import pytest
from rival_cases import (
    B,
    CASES,
    DEAD_L,
    L,
    N_DEAD,
    make_params,
    make_rows,
    make_settings,
)

NOT_TERMS = ("l0", "n_dead")
every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_gradients_are_finite_differences(case):
    _check_differences(case, make_params(CASES[case][0]))


@pytest.mark.parametrize("case", ["relu", "jumprelu", "batch_topk", "norm-weighted"])
def test_gradients_without_an_encoder_bias_are_finite_differences(case):
    _check_differences(case, make_params(CASES[case][0], use_b_enc=False))


def _check_differences(case, params):
    """Of each term and of the loss, in every parameter without synthetic gradient."""
    architecture, changes, synthetic = CASES[case]
    settings, x_bd = make_settings(**changes), make_rows()
    metrics = rivals.terms(architecture, params, x_bd, DEAD_L, settings).metrics
    names = [name for name in metrics if name not in NOT_TERMS]
    found = {
        of: rivals.gradients(architecture, params, x_bd, DEAD_L, settings, of)
        for of in names
    }
    assert all(g.keys() == params.keys() for g in found.values())

    def losses(name, position, change):
        moved = {key: value.copy() for key, value in params.items()}
        moved[name][position] += change
        out = rivals.terms(architecture, moved, x_bd, DEAD_L, settings, stopped=params)
        return np.array([out.metrics[of] for of in names])

    for name in params.keys() - set(synthetic):
        for position in np.ndindex(params[name].shape):
            rises = losses(name, position, 1e-6) - losses(name, position, -1e-6)
            got = [found[of][name][position] for of in names]
            np.testing.assert_allclose(
                got, rises / 2e-6, rtol=1e-7, atol=3e-8, err_msg=f"{names}, {name}"
            )


@every_case
def test_the_loss_is_the_weighted_sum_of_its_terms(case):
    architecture, changes, _ = CASES[case]
    settings, params = make_settings(**changes), make_params(architecture)
    out = rivals.terms(architecture, params, make_rows(), DEAD_L, settings)
    want = dict(out.metrics)
    if settings.prefixes:
        of_prefixes = [want[f"nmse_prefix_{m}"] for m in settings.prefixes]
        assert of_prefixes[-1] == want["nmse"] and len(set(of_prefixes)) > 1
        want["nmse"] = np.mean(of_prefixes)
    if architecture in topk_family.ARCHITECTURES:
        want["aux_loss"] *= 0.3
    parts = ("nmse", "sparsity_loss", "aux_loss")
    total = sum(want.get(name, 0) for name in parts)
    total += want.get("multi_topk_nmse", 0) / 8
    assert out.metrics["loss"] == pytest.approx(total, rel=1e-12)
    assert out.metrics["n_dead"] == N_DEAD
    assert out.metrics["l0"] == np.count_nonzero(out.f_bl) / B
    np.testing.assert_array_equal(out.fired_l, out.f_bl.any(axis=0))


@pytest.mark.parametrize(
    ("case", "of", "untouched"),
    [
        ("relu", "sparsity_loss", {"w_dec_ld"}),
        ("relu_decoder_norm", "sparsity_loss", {"b_dec_d"}),
        ("prolu", "sparsity_loss", {"w_dec_ld", "b_dec_d"}),
        ("gated", "nmse", {"b_gate_l"}),
        ("gated", "sparsity_loss", {"w_dec_ld", "b_mag_l", "r_mag_l"}),
        ("gated", "aux_loss", {"w_dec_ld", "b_dec_d", "b_mag_l", "r_mag_l"}),
        ("jumprelu", "nmse", set()),
        ("jumprelu", "sparsity_loss", {"w_enc_ld", "w_dec_ld", "b_dec_d", "b_enc_l"}),
        ("batch_topk", "loss", {"threshold"}),
    ],
)
def test_a_term_touches_these_parameters_and_no_others(case, of, untouched):
    architecture, changes, _ = CASES[case]
    settings, params = make_settings(**changes), make_params(architecture)
    g = rivals.gradients(architecture, params, make_rows(), DEAD_L, settings, of)
    assert {name for name, value in g.items() if not value.any()} == untouched


@pytest.mark.parametrize("case", ["batch_topk", "norm-weighted", "matryoshka"])
def test_auxk_reaches_dead_latents_alone_and_is_nothing_without_them(case):
    architecture, changes, _ = CASES[case]
    inputs = architecture, make_params(architecture), make_rows()
    g = rivals.gradients(*inputs, DEAD_L, make_settings(**changes), of="aux_loss")
    for name in ("w_enc_ld", "w_dec_ld", "b_enc_l"):
        assert not g[name][~DEAD_L].any() and g[name][DEAD_L].any()
    none_l = np.zeros(L, bool)
    out = rivals.terms(*inputs, none_l, make_settings(**changes))
    assert out.metrics["aux_loss"] == 0
    g = rivals.gradients(*inputs, none_l, make_settings(**changes), of="aux_loss")
    assert not any(value.any() for value in g.values())


def test_l0_and_firing_count_values_above_the_threshold():
    settings = make_settings(firing_threshold=1.0)
    out = rivals.terms("relu", make_params("relu"), make_rows(), DEAD_L, settings)
    assert out.metrics["l0"] == (out.f_bl > 1).sum() / B < (out.f_bl > 0).sum() / B
    np.testing.assert_array_equal(out.fired_l, (out.f_bl > 1).any(axis=0))
