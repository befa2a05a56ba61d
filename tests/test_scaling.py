"""The joint law against its table, and the capacity model against brute force."""

import functools
import itertools

import numpy as np
import pytest

from sae_jax.scaling import GPT4_LAW, allocation, predicted_exponents

N_FEATURES = 2_000_000


@pytest.mark.parametrize(
    ("k", "losses", "irreducible", "exponent"),
    [
        (8, (0.6939, 0.6306, 0.5758, 0.5284, 0.4874, 0.4519, 0.4074), 0.2239, -0.104),
        (32, (0.6314, 0.5441, 0.4745, 0.4189, 0.3745, 0.3391, 0.2989), 0.1990, -0.163),
        (128, (0.5746, 0.4697, 0.3925, 0.3357, 0.2938, 0.2630, 0.2313), 0.1769, -0.221),
        (512, (0.5231, 0.4057, 0.3260, 0.2719, 0.2351, 0.2101, 0.1868), 0.1572, -0.279),
    ],
)
def test_joint_law_of_gpt4(k, losses, irreducible, exponent):
    n = 2.0 ** np.array([11, 13, 15, 17, 19, 21, 24])
    got = GPT4_LAW.expected_loss(n, k)
    np.testing.assert_allclose(got, losses, rtol=0, atol=1e-4)
    assert GPT4_LAW.irreducible_loss(k) == pytest.approx(irreducible, abs=1e-4)
    slopes = np.diff(np.log(got - GPT4_LAW.irreducible_loss(k))) / np.diff(np.log(n))
    np.testing.assert_allclose(slopes, exponent, rtol=0, atol=6e-4)


def test_joint_law_broadcasts_and_takes_plain_numbers():
    grid = GPT4_LAW.expected_loss(np.array([[2048], [4096]]), np.array([8, 32, 128]))
    assert grid.shape == (2, 3)
    assert grid[1, 2] == GPT4_LAW.expected_loss(4096, 128)


@pytest.mark.parametrize(
    ("alpha", "beta", "features", "loss", "tolerance"),
    [
        (0.5, 1.5, 0.987, -0.507, 0.02),
        (0.7, 2.0, 0.990, -0.698, 0.02),
        (1.0, 0.3, 0.639, -0.289, 0.02),
        (1.5, 0.5, 0.593, -0.489, 0.02),
        (0.7, 0.4, 0.778, -0.350, 0.051),  # alpha near beta: far from the limit yet
    ],
)
def test_exponents_of_the_capacity_model(alpha, beta, features, loss, tolerance):
    """Slopes over N = 2^12 ... 2^16: of an independent computation, and predicted."""
    p_f = np.arange(1, N_FEATURES + 1) ** -(1 + alpha)
    n_latents = 2 ** np.arange(12, 17)
    points = []
    for n in n_latents:
        counts_f = allocation(p_f, functools.partial(_power_law, beta=beta), n)
        assert counts_f.sum() == n
        points.append((np.count_nonzero(counts_f), p_f @ _power_law(counts_f, beta)))
    slopes = np.polyfit(np.log(n_latents), np.log(points), 1)[0]
    np.testing.assert_allclose(slopes, (features, loss), rtol=0, atol=1e-3)
    want = predicted_exponents(alpha, beta)
    np.testing.assert_allclose(slopes, want, rtol=0, atol=tolerance)


def _power_law(n, beta):
    return (1.0 + n) ** -beta


def test_predicted_exponents_by_regime():
    assert predicted_exponents(0.5, 1.5) == (1, -0.5)
    assert predicted_exponents(1.5, 0.5) == (0.6, -0.5)
    assert predicted_exponents(0.5, 0.5) == (1, -0.5)
    for alpha, beta in [(0, 1), (1, -0.5), (float("nan"), 1)]:
        with pytest.raises(ValueError, match="above 0"):
            predicted_exponents(alpha, beta)


CURVES = {
    "power law": functools.partial(_power_law, beta=0.6),
    "with a floor": lambda n: 0.3 + np.exp(-n),
    "discrete": lambda n: np.where(n == 0, 1.0, 0.0),
    "linear": lambda n: 10 - n,
    "flat": np.ones_like,
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("seed", range(4))
def test_no_way_to_give_out_latents_is_better(curve, seed):
    """All ways are tried; frequencies are in no order, some equal, some zero."""
    loss_of_n = CURVES[curve]
    p_f = np.random.default_rng(seed).choice([0, 0.1, 0.2, 0.7, 1.0, 3.0], size=4)
    for n_latents in range(8):
        ways = itertools.product(range(n_latents + 1), repeat=len(p_f))
        best = min(
            p_f @ loss_of_n(np.array(way, float))
            for way in ways
            if sum(way) == n_latents
        )
        counts_f = allocation(p_f, loss_of_n, n_latents)
        assert counts_f.sum() == n_latents and counts_f.min() >= 0
        assert p_f @ loss_of_n(counts_f.astype(float)) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("n_latents", [1, 5, 64, 1000])
def test_latents_go_one_by_one_to_the_largest_gain(n_latents):
    """Ties to the more frequent feature, and to the first of the equally frequent."""
    p_f = np.array([1, 4, 2, 4, 8, 1, 0]) / 8
    # L(n) - L(n + 1) = 2^-n until n = 40, so gains tie between frequencies, exactly.
    saved = np.concatenate([0.5 ** np.arange(40), np.full(1000, 0.5**40)])
    losses_n = saved.sum() - np.concatenate([[0], np.cumsum(saved)])
    counts_f = np.zeros(len(p_f), int)
    for _ in range(n_latents):
        gains_f = p_f * (losses_n[counts_f] - losses_n[counts_f + 1])
        counts_f[max(range(len(p_f)), key=lambda f: (gains_f[f], p_f[f], -f))] += 1
    got_f = allocation(p_f, lambda n: losses_n[n.astype(int)], n_latents)
    np.testing.assert_array_equal(got_f, counts_f)


def test_surplus_latents_go_to_the_most_frequent():
    discrete = CURVES["discrete"]
    p_f = np.array([0.1, 0.6, 0.3])
    np.testing.assert_array_equal(allocation(p_f, discrete, 2), [0, 1, 1])
    np.testing.assert_array_equal(allocation(p_f, discrete, 9), [1, 7, 1])
    np.testing.assert_array_equal(allocation(p_f, discrete, 0), [0, 0, 0])


def test_of_many_equals_the_first_are_served():
    counts_f = allocation(np.resize([1.0, 2.0], 1000), CURVES["power law"], 300)
    np.testing.assert_array_equal(np.flatnonzero(counts_f), np.arange(1, 600, 2))


def test_rounding_of_a_flat_curve_is_not_taken_for_a_rise():
    counts_f = allocation(np.ones(4), lambda n: 1 + (1 + n) ** -2.0, 2**20)
    assert counts_f.sum() == 2**20


@pytest.mark.parametrize(
    ("loss_of_n", "words"),
    [
        (lambda n: n, "by latent 1: it must fall"),
        (lambda n: np.maximum(3 - n, n - 3), "by latent 4: it must fall"),
        (lambda n: -(n**2), "by latent 2: .* no more than the one before"),
        (lambda n: n * np.nan, "saves nan"),
    ],
)
def test_a_curve_that_greed_does_not_solve_is_refused(loss_of_n, words):
    with pytest.raises(ValueError, match=words):
        allocation(np.ones(3), loss_of_n, 6)


@pytest.mark.parametrize(
    ("frequencies", "n_latents", "words"),
    [
        ([0.5, -0.1], 3, "frequency 1 is -0.1"),
        ([np.nan], 3, "frequency 0 is nan"),
        ([], 3, r"shape \(0,\)"),
        ([[1.0]], 3, r"shape \(1, 1\)"),
        ([1.0], -1, "n_latents is -1"),
    ],
)
def test_bad_arguments_are_refused(frequencies, n_latents, words):
    with pytest.raises(ValueError, match=words):
        allocation(np.array(frequencies), CURVES["power law"], n_latents)
