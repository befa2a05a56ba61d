"""The oracle against finite differences, worked examples and plain truths."""

import dataclasses

import numpy as np
import oracle
import pytest

B, D, L = 8, 5, 12
SETTINGS = oracle.Settings(k=3, k_aux=4, loss_scale=1.7, aux_coefficient=0.3)


def _params(seed: int, has_b_enc: bool = True) -> oracle.Params:
    rng = np.random.default_rng(seed)
    params = {
        "w_enc_ld": rng.normal(size=(L, D)),
        "w_dec_ld": oracle.unit_norm_rows(rng.normal(size=(L, D))),
        "b_dec_d": rng.normal(size=D),
    }
    if has_b_enc:
        params["b_enc_l"] = rng.normal(size=L)
    return params


def _rows(seed: int) -> oracle.Array:
    return np.random.default_rng(seed).normal(size=(B, D))


@pytest.mark.parametrize("subtract_b_dec", [True, False])
@pytest.mark.parametrize("has_b_enc", [True, False])
@pytest.mark.parametrize("n_dead", [0, 3, 8, L])
def test_gradients_are_the_finite_differences_of_the_total_loss(
    subtract_b_dec, has_b_enc, n_dead
):
    settings = dataclasses.replace(SETTINGS, subtract_b_dec=subtract_b_dec)
    params, x_bd, dead_l = _params(0, has_b_enc), _rows(1), np.arange(L) >= L - n_dead
    residual_bd = oracle.forward(params, x_bd, dead_l, settings).residual_bd
    gradients = oracle.gradients(params, x_bd, dead_l, settings)
    assert gradients.keys() == params.keys()

    def total(name, position, change):
        moved = {key: value.copy() for key, value in params.items()}
        moved[name][position] += change
        return oracle.forward(moved, x_bd, dead_l, settings, residual_bd).total

    for name, value in params.items():
        for position in np.ndindex(value.shape):
            rise = total(name, position, 1e-6) - total(name, position, -1e-6)
            assert gradients[name][position] == pytest.approx(rise / 2e-6, abs=2e-8)


def test_aux_gradients_reach_dead_latents_alone():
    params, x_bd, dead_l = _params(2), _rows(3), np.arange(L) % 2 == 0
    gradients = oracle.aux_gradients(params, x_bd, dead_l, SETTINGS)
    for name in ("w_enc_ld", "w_dec_ld", "b_enc_l"):
        assert not gradients[name][~dead_l].any()
        assert gradients[name][dead_l].any()


def test_choose_prefers_the_lowest_index_and_never_takes_more_than_k():
    pre_bl = np.array([[1.0, 2.0, 2.0, 2.0, 1.0], [-1.0, -3.0, -1.0, 5.0, -2.0]])
    assert oracle.choose(pre_bl, 2) == [[1, 2], [3, 0]]
    dead_l = np.array([False, False, True, False, True])
    assert oracle.choose(pre_bl, 3, among_l=dead_l) == [[2, 4], [2, 4]]
    z_bl = oracle.chosen_values(pre_bl, oracle.choose(pre_bl, 2))
    np.testing.assert_array_equal(z_bl, [[0, 2, 2, 0, 0], [0, 0, 0, 5, 0]])


def test_encode_then_decode_is_the_dense_reconstruction():
    params, x_bd = _params(4), _rows(5)
    values_bk, indices_bk = oracle.encode(params, x_bd, SETTINGS.k)
    assert (np.diff(values_bk) <= 0).all() and (values_bk >= 0).all()
    out = oracle.forward(params, x_bd, np.zeros(L, bool), SETTINGS)
    decoded_bd = oracle.decode(params, values_bk, indices_bk)
    np.testing.assert_allclose(decoded_bd, out.x_hat_bd, rtol=1e-13)


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_main_loss_is_one_for_predicting_the_mean_and_aux_for_a_zero_code(offset):
    x_bd = _rows(6) + offset
    mean_bd = np.broadcast_to(x_bd.mean(axis=0), x_bd.shape)
    assert oracle.main_loss(mean_bd, x_bd, oracle.loss_scale(x_bd)) == pytest.approx(1)
    centred_bd = x_bd - mean_bd
    assert oracle.aux_loss(centred_bd, 0 * x_bd, any_dead=True) == pytest.approx(1)
    assert oracle.aux_loss(x_bd, x_bd, any_dead=True) == 0
    assert oracle.aux_loss(x_bd, 0 * x_bd, any_dead=False) == 0
    assert oracle.aux_loss(mean_bd[:1], x_bd[:1], any_dead=True) == 0


@pytest.mark.parametrize(
    "kind",
    ["none", "center_unit_norm", "layer_norm", "scale_to_sqrt_d", "unit_mean_square"],
)
def test_normalisations_have_their_property_and_are_undone(kind):
    acts_bd = 40 + 7 * _rows(7)
    norm_b = np.linalg.norm(acts_bd, axis=1)
    normed_bd, shift_b1, scale_b1 = oracle.normalize(
        kind, acts_bd, norm_b.mean(), (norm_b**2).mean()
    )
    back_bd = oracle.undo(normed_bd, shift_b1, scale_b1)
    np.testing.assert_allclose(back_bd, acts_bd, rtol=1e-13)
    norm_b = np.linalg.norm(normed_bd, axis=1)
    if kind in ("center_unit_norm", "layer_norm"):
        wanted = 1 if kind == "center_unit_norm" else np.sqrt(D - 1)
        np.testing.assert_allclose(norm_b, wanted, rtol=1e-5)
        np.testing.assert_allclose(normed_bd.mean(axis=1), 0, atol=1e-13)
    elif kind == "scale_to_sqrt_d":
        assert norm_b.mean() == pytest.approx(np.sqrt(D))
    elif kind == "unit_mean_square":
        assert (norm_b**2).mean() == pytest.approx(1)


def test_projection_leaves_nothing_along_the_rows_and_is_idempotent():
    w_ld = _params(8)["w_dec_ld"]
    g_ld = np.random.default_rng(9).normal(size=(L, D))
    once_ld = oracle.project_rows(g_ld, w_ld)
    np.testing.assert_allclose((once_ld * w_ld).sum(axis=1), 0, atol=1e-14)
    np.testing.assert_allclose(oracle.project_rows(once_ld, w_ld), once_ld, atol=1e-14)
    along_l1 = ((g_ld - once_ld) * w_ld).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(g_ld - once_ld, along_l1 * w_ld, atol=1e-14)


def test_adams_first_step_is_the_learning_rate_whatever_the_gradient():
    gradient = np.array([1e-3, -7.0, 20.0])
    zeros = np.zeros(3)
    value, *_ = oracle.adam(zeros, gradient, zeros, zeros, 1, SETTINGS)
    np.testing.assert_allclose(value, -1e-3 * np.sign(gradient), rtol=1e-5)


def test_average_of_a_constant_is_the_constant():
    ema = np.zeros(2)
    for n_steps in range(1, 6):
        ema = oracle.ema_update(ema, np.array([3.0, -1.0]), 0.9)
        np.testing.assert_allclose(oracle.ema_read(ema, 0.9, n_steps), [3, -1])


def test_firing_counter_and_death():
    steps_since_l = np.zeros(3, int)
    for fired_l in ([1, 0, 0], [1, 0, 0], [0, 1, 0]):
        steps_since_l = oracle.update_firing(steps_since_l, np.array(fired_l, bool))
    np.testing.assert_array_equal(steps_since_l, [1, 0, 3])
    np.testing.assert_array_equal(oracle.is_dead(steps_since_l, 3), [0, 0, 1])


def test_train_step_lowers_the_loss_and_keeps_unit_rows():
    rng = np.random.default_rng(10)
    x_bd = rng.normal(size=(64, D))
    settings = dataclasses.replace(
        SETTINGS, loss_scale=oracle.loss_scale(x_bd), learning_rate=0.01
    )
    params = _params(11)
    params["b_dec_d"] = oracle.geometric_median(x_bd)
    params["b_enc_l"] = np.zeros(L)
    params["w_enc_ld"] = params["w_dec_ld"].copy()
    state, losses = oracle.initial_state(params), []
    for _ in range(100):
        state, out = oracle.train_step(state, x_bd, settings)
        losses.append(out.main)
    assert losses[-1] < 0.5 * losses[0]
    norm_l = np.linalg.norm(state.params["w_dec_ld"], axis=1)
    np.testing.assert_allclose(norm_l, 1, rtol=1e-12)


def test_geometric_median_resists_outliers_and_is_where_the_pulls_cancel():
    rows_bd = np.concatenate([_rows(12), 1e4 + _rows(13)[:2]])
    median_d = oracle.geometric_median(rows_bd)
    away_bd = rows_bd - median_d
    pull_bd = away_bd / np.linalg.norm(away_bd, axis=1, keepdims=True)
    np.testing.assert_allclose(pull_bd.sum(axis=0), 0, atol=1e-8)
    assert np.abs(median_d).max() < 3
