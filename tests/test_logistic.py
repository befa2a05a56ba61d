"""Probes against float64 SciPy: common, heavy-tailed, separable and broken features."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle_probes
import pytest

from sae_jax import logistic

fit_each, fit_together = jax.jit(logistic.fit_each), jax.jit(logistic.fit_together)
N = 200
ENTROPY = -(0.4 * np.log(0.4) + 0.6 * np.log(0.6))  # of a label that is true in 0.4


def _labels(rng):
    return rng.permutation(N) < 0.4 * N


def _features(rng, labels_n, kind):
    noise_nf = rng.normal(size=(N, 6))
    if kind == "shifted":
        return noise_nf + labels_n[:, None] * np.arange(6)
    if kind == "heavy":
        return np.exp(3 * noise_nf) * (1 + labels_n[:, None])
    if kind == "cauchy":
        return rng.standard_cauchy((N, 6)) * (1 + 9 * labels_n[:, None])
    if kind == "rare":  # fires on few rows, all with the label
        return (rng.random((N, 6)) < 0.05) * labels_n[:, None] * np.abs(noise_nf)
    assert kind == "separable"
    return (2 * labels_n[:, None] - 1) * np.exp(0.3 * np.arange(6) * noise_nf)


@pytest.mark.parametrize("kind", ["shifted", "heavy", "cauchy", "rare", "separable"])
def test_each_feature_is_fit_as_by_scipy(kind):
    rng = np.random.default_rng(1)
    labels_n = _labels(rng)
    features_nf = _features(rng, labels_n, kind)
    weights_n = np.where(np.arange(N) < 30, 0, rng.integers(1, 3, size=N))
    probe = fit_each(
        jnp.asarray(features_nf, jnp.float32), labels_n, weights_n
    )
    for at, feature_n in enumerate(features_nf.T):
        slope_1, _, loss = oracle_probes.fit(feature_n, labels_n, weights_n)
        deviation = feature_n[weights_n > 0].std()
        assert probe.loss[at] == pytest.approx(loss, abs=2e-6)
        assert probe.slope[at] * deviation == pytest.approx(
            slope_1[0] * deviation, rel=1e-2, abs=1e-3
        )
        logits_n = feature_n * float(probe.slope[at]) + float(probe.intercept[at])
        mean = np.average(oracle_probes.log_loss(logits_n, labels_n), weights=weights_n)
        assert mean == pytest.approx(loss, abs=2e-6)


def test_where_whole_steps_of_newton_diverge():
    """Few, weighted points, found at random, on which the plain method does."""
    points = np.array([-1.16923105, -8.58116822, 0.105403032, -10.5816510])
    masses = np.array([8.8629128e-3, 5.18276139e-4, 0.982234459, 8.38435159e-3])
    rates = np.array([0.350298357, 4.9e-17, 0.998989073, 6.19137615e-3])
    feature_n, labels_n = np.tile(points, 2), np.repeat([True, False], 4)
    weights_n = np.concatenate([masses * rates, masses * (1 - rates)])
    at = np.zeros(2)
    x_nc = np.stack([(points - masses @ points), np.ones(4)], axis=1)
    x_nc[:, 0] /= np.sqrt(masses @ x_nc[:, 0] ** 2)
    with np.errstate(over="ignore"):
        for _ in range(30):
            p = 1 / (1 + np.exp(-x_nc @ at))
            gradient = (masses * (p - rates)) @ x_nc + oracle_probes.RIDGE * at
            hessian = (x_nc.T * masses * p * (1 - p)) @ x_nc
            at -= np.linalg.solve(hessian + oracle_probes.RIDGE * np.eye(2), gradient)
    assert np.abs(gradient).max() > 0.01  # else nothing is shown

    probe = fit_each(jnp.float32(feature_n)[:, None], labels_n, weights_n)
    _, _, loss = oracle_probes.fit(feature_n, labels_n, weights_n)
    assert probe.loss[0] == pytest.approx(loss, abs=2e-6)
    together = fit_together(
        jnp.float32(feature_n)[:, None], labels_n, weights_n
    )
    assert together.loss == pytest.approx(loss, abs=2e-6)


def test_shift_and_scale_change_nothing():
    rng = np.random.default_rng(2)
    labels_n = _labels(rng)
    features_nf = _features(rng, labels_n, "shifted")
    scale_f = np.array([1, -1, 1e-6, 1e6, 3, -0.2])
    moved_nf = features_nf * scale_f + 5 * scale_f
    first, second = (
        fit_each(jnp.float32(x_nf), labels_n, np.ones(N))
        for x_nf in (features_nf, moved_nf)
    )
    np.testing.assert_allclose(first.loss, second.loss, atol=1e-6)
    np.testing.assert_allclose(first.slope, second.slope * scale_f, rtol=1e-3)


def test_broken_features_harm_no_others():
    rng = np.random.default_rng(3)
    labels_n = _labels(rng)
    features_nf = _features(rng, labels_n, "shifted")
    features_nf[:, 1] = 7.1  # whose mean is rounded
    features_nf[3, 2] = np.nan
    features_nf[:, 4] = 0
    features_nf[5, 5] = np.inf
    probe = fit_each(jnp.float32(features_nf), labels_n, np.ones(N))
    assert np.isnan(probe.loss).tolist() == [False, False, True, False, False, True]
    np.testing.assert_allclose(probe.loss[jnp.array([1, 4])], ENTROPY, rtol=1e-6)
    assert probe.slope[1] == probe.slope[4] == 0
    for at in (0, 3):
        loss = oracle_probes.fit(features_nf[:, at], labels_n)[2]
        assert probe.loss[at] == pytest.approx(loss, abs=2e-6)


@pytest.mark.parametrize(
    ("n_features", "ridge"), [(1, 1e-4), (5, 1e-4), (30, 1e-2), (300, 1e-2), (300, 1.0)]
)
def test_all_features_together_are_fit_as_by_scipy(n_features, ridge):
    rng = np.random.default_rng(4)
    labels_n = _labels(rng)
    mixing_dd = rng.normal(size=(n_features, n_features)) / np.sqrt(n_features)
    features_nd = rng.normal(size=(N, n_features)) @ mixing_dd + 3
    features_nd[:, 0] += labels_n
    weights_n = np.where(np.arange(N) < 30, 0, 1)
    probe = fit_together(
        jnp.float32(features_nd), labels_n, weights_n, ridge
    )
    slope_d, intercept, loss = oracle_probes.fit(
        features_nd, labels_n, weights_n, ridge
    )
    assert probe.loss == pytest.approx(loss, abs=1e-4)
    logits_n = features_nd @ np.float64(probe.slope) + float(probe.intercept)
    np.testing.assert_allclose(logits_n, features_nd @ slope_d + intercept, atol=0.02)


def test_separable_rows_have_a_finite_probe():
    rng = np.random.default_rng(5)
    labels_n = _labels(rng)
    features_nd = rng.normal(size=(N, 400))
    features_nd[:, 7] = labels_n
    probe = fit_together(jnp.float32(features_nd), labels_n, np.ones(N))
    assert np.isfinite(probe.slope).all() and probe.loss < 0.01
    one_class = fit_each(
        jnp.float32(features_nd), np.ones(N, bool), np.ones(N)
    )
    assert np.isfinite(one_class.slope).all() and one_class.loss.max() < 0.01
