"""ReLU-like codes and synthetic gradients of the rivals' oracle, by themselves."""

import numpy as np
import oracle
import oracle_rivals as rivals
import pytest
from rival_cases import (
    B,
    D,
    DEAD_L,
    L,
    SETTINGS,
    make_params,
    make_rows,
    make_settings,
)


def test_every_relu_like_code_is_relu_in_its_simplest_case():
    params, x_bd, zeros_l = make_params("relu"), make_rows(), np.zeros(L)
    want_bl = rivals.encode("relu", params, x_bd, SETTINGS)
    assert 0.3 < (want_bl > 0).mean() < 0.7 and (want_bl >= 0).all()
    assert (rivals.encode("relu_decoder_norm", params, x_bd, SETTINGS) == want_bl).all()
    for threshold in (0.0, -1.0):
        jump = params | {"threshold_l": zeros_l + threshold}
        assert (rivals.encode("jumprelu", jump, x_bd, SETTINGS) == want_bl).all()
    bias_l = params["b_enc_l"]
    free = {name: a for name, a in params.items() if name != "b_enc_l"}
    gated = free | {"b_gate_l": bias_l, "b_mag_l": bias_l, "r_mag_l": zeros_l}
    assert (rivals.encode("gated", gated, x_bd, SETTINGS) == want_bl).all()
    gated["r_mag_l"] = gated["r_mag_l"] + np.log(3)
    gated["b_mag_l"] = 3 * bias_l
    got_bl = rivals.encode("gated", gated, x_bd, SETTINGS)
    np.testing.assert_allclose(got_bl, 3 * want_bl, rtol=1e-12)
    want_bl = rivals.encode("relu", free, x_bd, SETTINGS)
    unbiased = free | {"b_enc_l": zeros_l}
    assert (rivals.encode("prolu", unbiased, x_bd, SETTINGS) == want_bl).all()


def test_codes_of_one_pre_activation():
    x_bd = np.array([[-1.0], [0.1], [0.5], [2.0]])
    one = {"w_enc_ld": np.ones((1, 1)), "w_dec_ld": np.ones((1, 1))}
    one["b_dec_d"] = np.zeros(1)

    def code(architecture, **scalars):
        params = one | {f"{n}_l": np.array([v]) for n, v in scalars.items()}
        return rivals.encode(architecture, params, x_bd, SETTINGS)[:, 0].tolist()

    assert code("relu", b_enc=1.5) == [0.5, 1.6, 2, 3.5]
    assert code("prolu", b_enc=-0.25) == [0, 0, 0.5, 2]
    assert code("prolu", b_enc=1.5) == [0, 0.1, 0.5, 2]
    assert code("jumprelu", threshold=0.5, b_enc=0.0) == [0, 0, 0, 2]
    assert code("gated", b_gate=-0.5, r_mag=0.0, b_mag=0.5) == [0, 0, 0, 2.5]
    assert code("gated", b_gate=2.0, r_mag=0.0, b_mag=-1.0) == [0, 0, 0, 1]


def test_the_decoder_norm_penalty_does_not_care_how_encoder_and_decoder_share_scale():
    settings, x_bd = make_settings(subtract_b_dec=False), make_rows()
    params = make_params("relu_decoder_norm")
    scale_l = np.exp(np.random.default_rng(3).normal(size=L))
    moved = params | {
        "w_enc_ld": params["w_enc_ld"] / scale_l[:, None],
        "b_enc_l": params["b_enc_l"] / scale_l,
        "w_dec_ld": params["w_dec_ld"] * scale_l[:, None],
    }
    inputs = x_bd, DEAD_L, settings
    want = rivals.terms("relu_decoder_norm", params, *inputs).metrics
    got = rivals.terms("relu_decoder_norm", moved, *inputs).metrics
    assert got == pytest.approx(want, rel=1e-12)
    unit = params | {"w_dec_ld": oracle.unit_norm_rows(params["w_dec_ld"])}
    want = rivals.terms("relu", unit, *inputs).metrics
    got = rivals.terms("relu_decoder_norm", unit, *inputs).metrics
    assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("subtract_b_dec", [True, False])
@pytest.mark.parametrize("architecture", ["prolu", "jumprelu"])
def test_synthetic_gradients_are_those_of_a_loop_over_elements(
    architecture, subtract_b_dec
):
    settings = make_settings(subtract_b_dec=subtract_b_dec)
    params, x_bd = make_params(architecture), make_rows()
    loop = _prolu_loop if architecture == "prolu" else _jumprelu_loop
    for of, got in {
        of: rivals.gradients(architecture, params, x_bd, DEAD_L, settings, of)
        for of in ("nmse", "sparsity_loss")
    }.items():
        want = loop(params, x_bd, settings, of)
        assert got.keys() == want.keys()
        for name in want:
            np.testing.assert_allclose(
                got[name], want[name], rtol=1e-10, atol=1e-14, err_msg=f"{of}, {name}"
            )
        if of == "nmse":
            assert all(value.any() for value in want.values())


def _prolu_loop(params, x_bd, settings, of):
    want = {name: np.zeros_like(a) for name, a in params.items()}
    for x_d in x_bd:
        h_l, x_in_d = _products(params, x_d, settings)
        f_l = [
            h if h > 0 and h + b > 0 else 0
            for h, b in zip(h_l, params["b_enc_l"], strict=True)
        ]
        for latent, g_f in _code_loop(params, x_d, f_l, want, settings, of):
            if f_l[latent] > 0:
                g_h = g_f * (1 + h_l[latent])
                _encoder_loop(params, latent, g_h, x_in_d, want, settings)
                want["b_enc_l"][latent] += g_f * h_l[latent]
    return want


def _jumprelu_loop(params, x_bd, settings, of):
    want = {name: np.zeros_like(a) for name, a in params.items()}
    width = settings.bandwidth
    for x_d in x_bd:
        h_l, x_in_d = _products(params, x_d, settings)
        pre_l, theta_l = h_l + params["b_enc_l"], params["threshold_l"]
        f_l = [
            p if p > t and p > 0 else 0 for p, t in zip(pre_l, theta_l, strict=True)
        ]
        if of == "sparsity_loss":
            for latent in range(L):
                if abs(pre_l[latent] - theta_l[latent]) < width / 2:
                    want["threshold_l"][latent] -= 0.2 / B / width
            continue
        for latent, g_f in _code_loop(params, x_d, f_l, want, settings, of):
            if f_l[latent] > 0:
                _encoder_loop(params, latent, g_f, x_in_d, want, settings)
                want["b_enc_l"][latent] += g_f
            if abs(pre_l[latent] - theta_l[latent]) < width / 2 and theta_l[latent] > 0:
                want["threshold_l"][latent] -= g_f * theta_l[latent] / width
    return want


def _products(params, x_d, settings):
    x_in_d = x_d - params["b_dec_d"] if settings.subtract_b_dec else x_d
    return np.array([row_d @ x_in_d for row_d in params["w_enc_ld"]]), x_in_d


def _code_loop(params, x_d, f_l, want, settings, of):
    """Yields (latent, gradient of its code), having added what the decoder gets."""
    if of == "sparsity_loss":
        yield from ((latent, 0.2 / B) for latent in range(L))
        return
    x_hat_d = params["b_dec_d"].copy()
    for latent in range(L):
        x_hat_d += f_l[latent] * params["w_dec_ld"][latent]
    g_d = 1.7 * 2 * (x_hat_d - x_d) / (B * D)
    want["b_dec_d"] += g_d
    for latent in range(L):
        want["w_dec_ld"][latent] += f_l[latent] * g_d
        yield latent, g_d @ params["w_dec_ld"][latent]


def _encoder_loop(params, latent, g_h, x_in_d, want, settings):
    want["w_enc_ld"][latent] += g_h * x_in_d
    if settings.subtract_b_dec:
        want["b_dec_d"] -= g_h * params["w_enc_ld"][latent]


def test_jumprelus_threshold_gradient_is_the_loss_over_a_band_as_wide_as_the_kernel():
    """Raised by half a bandwidth and lowered by it, θ passes just the rows in the band.

    For L0 the slope between is the synthetic gradient itself; for the error it is, up
    to the band's width against θ, where rows lie evenly about the threshold.
    """
    n_rows, theta, settings = 40_000, 0.8, make_settings(bandwidth=0.01, target_l0=None)
    rng = np.random.default_rng(4)
    x_bd = rng.normal(size=(n_rows, 3))
    x_bd[:, 0] = np.linspace(0.3, 1.3, n_rows)  # is the pre-activation
    params = {
        "w_enc_ld": np.array([[1.0, 0.0, 0.0]]),
        "w_dec_ld": np.array([[0.9, 0.6, -0.4]]),
        "b_dec_d": np.zeros(3),
        "threshold_l": np.array([theta]),
    }
    dead_l = np.zeros(1, bool)
    high, low = (
        rivals.terms(
            "jumprelu",
            params | {"threshold_l": np.array([theta + change])},
            x_bd,
            dead_l,
            settings,
        ).metrics
        for change in (0.005, -0.005)
    )
    for of, rtol in (("sparsity_loss", 1e-9), ("nmse", 0.01)):
        g = rivals.gradients("jumprelu", params, x_bd, dead_l, settings, of)
        want = (high[of] - low[of]) / settings.bandwidth
        assert abs(want) > 0.01
        np.testing.assert_allclose(g["threshold_l"], want, rtol=rtol)


def test_jumprelus_penalty_counts_the_code_also_where_thresholds_are_negative():
    params = make_params("jumprelu")
    assert (params["threshold_l"] < -0.3).any()
    inputs = params, make_rows(), DEAD_L, make_settings(sparsity_coefficient=1.0)
    metrics = rivals.terms("jumprelu", *inputs).metrics
    assert metrics["sparsity_loss"] == pytest.approx(metrics["l0"], rel=1e-12)


def test_jumprelus_target_pulls_the_threshold_towards_it():
    params, x_bd = make_params("jumprelu"), make_rows()
    one = make_settings(sparsity_coefficient=1.0)
    l0 = rivals.terms("jumprelu", params, x_bd, DEAD_L, one).metrics["sparsity_loss"]
    plain = rivals.gradients("jumprelu", params, x_bd, DEAD_L, one, "sparsity_loss")
    for target, pull in ((l0 / 2, 4 / l0), (l0, 0), (2 * l0, -0.5 / l0)):
        settings = make_settings(sparsity_coefficient=1.0, target_l0=target)
        inputs = "jumprelu", params, x_bd, DEAD_L, settings
        loss = rivals.terms(*inputs).metrics["sparsity_loss"]
        assert loss == pytest.approx((l0 / target - 1) ** 2)
        g = rivals.gradients(*inputs, of="sparsity_loss")["threshold_l"]
        np.testing.assert_allclose(g, pull * plain["threshold_l"], rtol=1e-12)
