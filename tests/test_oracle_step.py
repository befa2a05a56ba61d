"""The oracle's choice, clipping, schedule, firing and encoder rescale by themselves."""

import dataclasses

import numpy as np
import oracle
import pytest

B, D, L, K = 16, 12, 32, 4
SETTINGS = oracle.Settings(k=K, k_aux=6)


def _params(seed: int = 0) -> oracle.Params:
    rng = np.random.default_rng(seed)
    return {
        "w_enc_ld": rng.normal(size=(L, D)),
        "w_dec_ld": oracle.unit_norm_rows(rng.normal(size=(L, D))),
        "b_dec_d": rng.normal(size=D),
        "b_enc_l": rng.normal(size=L),
    }


def _rows(seed: int = 1) -> oracle.Array:
    return np.random.default_rng(seed).normal(size=(B, D))


@pytest.mark.parametrize("k", [1, K, L])
@pytest.mark.parametrize("n_among", [None, 0, 2, L])
def test_choose_is_sorting_by_value_and_then_by_index(k, n_among):
    rng = np.random.default_rng(0)
    among_l = None if n_among is None else rng.permutation(L) < n_among
    latents = [i for i in range(L) if among_l is None or among_l[i]]
    for pre_bl in (
        rng.normal(size=(B, L)),
        np.float64(rng.integers(-2, 3, size=(B, L))),
        np.where(np.arange(L) % 5 == 3, 1.0, -np.inf) * np.ones((B, 1)),
    ):
        chosen = oracle.choose(pre_bl, k, among_l)
        assert chosen == [
            sorted(latents, key=lambda i: (-pre_l[i], i))[:k] for pre_l in pre_bl
        ]
        z_bl = oracle.chosen_values(pre_bl, chosen)
        for row, latent in np.ndindex(B, L):
            value = max(pre_bl[row, latent], 0) if latent in chosen[row] else 0
            assert z_bl[row, latent] == value


def test_clipping_shortens_all_gradients_alike_and_only_when_they_are_too_long():
    gradients = {"w_dec_ld": np.array([[3.0, 0.0]]), "b_dec_d": np.array([0.0, -4.0])}
    same = oracle.clip(gradients, 5.5)
    clipped = oracle.clip(gradients, 2.0)
    for name, g in gradients.items():
        np.testing.assert_array_equal(same[name], g)
        np.testing.assert_allclose(clipped[name], 0.4 * g)


def test_a_step_clips_what_projection_left_before_adam_sees_it():
    params, x_bd = _params(), _rows()
    dead_l = np.zeros(L, bool)
    g = oracle.gradients(params, x_bd, dead_l, SETTINGS)
    g["w_dec_ld"] = oracle.project_rows(g["w_dec_ld"], params["w_dec_ld"])
    norm = np.linalg.norm(np.concatenate([a.ravel() for a in g.values()]))
    settings = dataclasses.replace(SETTINGS, clip_norm=norm / 3)
    state, _ = oracle.train_step(oracle.initial_state(params), x_bd, settings)
    for name, mean in state.mean.items():
        np.testing.assert_allclose(mean, 0.1 * g[name] / 3, rtol=1e-12, atol=1e-17)


def test_the_rate_rises_stays_and_falls_to_its_last_step():
    settings = dataclasses.replace(
        SETTINGS, learning_rate=2.0, warmup_steps=4, decay_steps=5, n_steps=12
    )
    rates = [oracle.learning_rate(t, settings) for t in range(12)]
    assert rates == pytest.approx(
        [0.5, 1.0, 1.5, 2, 2, 2, 2, 2, 1.6, 1.2, 0.8, 0.4], rel=1e-12
    )
    assert oracle.learning_rate(7, SETTINGS) == SETTINGS.learning_rate


def test_adam_takes_the_rate_of_the_steps_done_before_it():
    settings = dataclasses.replace(SETTINGS, learning_rate=1.0, warmup_steps=4)
    value, mean, mean_square = np.zeros(1), np.zeros(1), np.zeros(1)
    for n_steps, want in enumerate([0.25, 0.75, 1.5, 2.5, 3.5], start=1):
        value, mean, mean_square = oracle.adam(
            value, np.ones(1), mean, mean_square, n_steps, settings
        )
        np.testing.assert_allclose(value, -want, rtol=1e-6)


def test_free_decoder_rows_are_neither_projected_nor_normalised():
    params, x_bd = _params(), _rows()
    params["w_dec_ld"] *= 3
    g = oracle.gradients(params, x_bd, np.zeros(L, bool), SETTINGS)
    settings = dataclasses.replace(SETTINGS, unit_norm=False, learning_rate=1e-3)
    state, _ = oracle.train_step(oracle.initial_state(params), x_bd, settings)
    np.testing.assert_allclose(state.mean["w_dec_ld"], 0.1 * g["w_dec_ld"], rtol=1e-12)
    moved_ld = state.params["w_dec_ld"] - params["w_dec_ld"]
    assert 0.9e-3 < np.abs(moved_ld).max() < 1.1e-3


def test_a_latent_fires_above_the_threshold_only():
    z_bl = np.array([[0.0, 0.5, 0.2, 0.0], [0.0, 0.1, 0.5, 0.6]])
    high = dataclasses.replace(SETTINGS, firing_threshold=0.5)
    np.testing.assert_array_equal(oracle.fires(z_bl, SETTINGS), [0, 1, 1, 1])
    np.testing.assert_array_equal(oracle.fires(z_bl, high), [0, 0, 0, 1])


def test_a_step_counts_latents_below_the_firing_threshold_as_silent():
    settings = dataclasses.replace(SETTINGS, firing_threshold=6.0)
    state, out = oracle.train_step(oracle.initial_state(_params()), _rows(), settings)
    best_l = out.z_bl.max(axis=0)
    assert ((best_l > 0) & (best_l <= 6)).any() and (best_l > 6).any()
    np.testing.assert_array_equal(state.steps_since_l, best_l <= 6)


@pytest.mark.parametrize("subtract_b_dec", [True, False])
def test_a_rescaled_encoder_rebuilds_unit_vectors_at_unit_length(subtract_b_dec):
    settings = dataclasses.replace(SETTINGS, subtract_b_dec=subtract_b_dec)
    params = _params()
    unit_bd = oracle.unit_norm_rows(np.random.default_rng(2).normal(size=(256, D)))
    w_enc_ld = oracle.encoder_rescale(params, unit_bd, settings)
    start = params | {"w_enc_ld": w_enc_ld, "b_enc_l": np.zeros(L)}
    x_bd = params["b_dec_d"] + unit_bd
    rebuilt_bd = oracle.decode(start, *oracle.encode(start, x_bd, K, subtract_b_dec))
    lengths_b = np.linalg.norm(rebuilt_bd - params["b_dec_d"], axis=1)
    assert lengths_b.mean() == pytest.approx(1, rel=1e-12)
    ratio_ld = w_enc_ld / params["w_enc_ld"]
    np.testing.assert_allclose(ratio_ld, ratio_ld[0, 0], rtol=1e-12)
