"""Input normalisations against the oracle."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from sae_jax import normalize
from sae_jax.config import NORMALIZATIONS

D = 12


def _acts(n_rows: int = 16, offset: float = 3.0) -> np.ndarray:
    """Rows with a mean of their own and norms that differ."""
    rng = np.random.default_rng(0)
    length_b1 = np.exp(rng.normal(size=(n_rows, 1)))
    return offset + length_b1 * rng.normal(size=(n_rows, D))


def _fit(kind: str, acts_bd: np.ndarray) -> tuple[normalize.Normalization, dict]:
    norm_b = np.linalg.norm(acts_bd, axis=-1)
    numbers = {"mean_norm": norm_b.mean(), "mean_square_norm": (norm_b**2).mean()}
    statistics = types.SimpleNamespace(mean_d=acts_bd.mean(0), **numbers)
    return normalize.fit(kind, statistics, D), numbers


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_apply_and_undo_are_the_oracles(kind, dtype):
    acts_bd = _acts().astype(dtype)
    normalization, numbers = _fit(kind, acts_bd)
    with jax.enable_x64(dtype == np.float64):
        outs = normalize.apply(normalization, jnp.asarray(acts_bd))
        back_bd = normalize.undo(*outs)
    wants = oracle.normalize(kind, acts_bd, **numbers)
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    for out, want in zip(outs, wants, strict=True):
        assert out.dtype == dtype and out.shape == want.shape
        np.testing.assert_allclose(out, want, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(back_bd, acts_bd, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["scale_to_sqrt_d", "unit_mean_square"])
def test_scalar_kinds_have_their_property_over_the_data(kind):
    acts_bd = _acts(200)
    normed_bd, *_ = normalize.apply(_fit(kind, acts_bd)[0], jnp.asarray(acts_bd))
    norm_b = np.linalg.norm(normed_bd, axis=-1)
    mean = norm_b.mean() / D**0.5 if kind == "scale_to_sqrt_d" else (norm_b**2).mean()
    assert mean == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_rows_of_any_leading_shape_are_normalised_alone(kind):
    acts_bd = _acts().astype(np.float32)
    normalization, _ = _fit(kind, acts_bd)
    whole = normalize.apply(normalization, jnp.asarray(acts_bd))
    folded = normalize.apply(normalization, jnp.asarray(acts_bd.reshape(2, 8, D)))
    for flat, fold in zip(whole, folded, strict=True):
        np.testing.assert_allclose(fold.reshape(flat.shape), flat, rtol=1e-6)
    one_d, shift_1, scale_1 = normalize.apply(normalization, jnp.asarray(acts_bd[3]))
    np.testing.assert_allclose(one_d, whole[0][3], rtol=1e-6)
    assert shift_1.shape == scale_1.shape == (1,)


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_a_row_of_zeros_stays_finite_and_is_undone(kind):
    acts_bd = _acts().astype(np.float32)
    normalization, _ = _fit(kind, acts_bd)
    outs = normalize.apply(normalization, jnp.zeros((2, D)))
    np.testing.assert_array_equal(outs[0], 0)
    np.testing.assert_array_equal(normalize.undo(*outs), 0)


@pytest.mark.parametrize("kind", ["center_unit_norm", "layer_norm"])
def test_a_large_common_offset_does_not_cost_precision(kind):
    """Float32 rows around 1000 whose variation is 1: one pass over x^2 would fail."""
    acts_bd = _acts(offset=1000.0).astype(np.float32)
    normed_bd, *_ = normalize.apply(normalize.Normalization(kind), jnp.asarray(acts_bd))
    want_bd, *_ = oracle.normalize(kind, acts_bd)
    np.testing.assert_allclose(normed_bd, want_bd, atol=2e-3)


def test_fit_keeps_the_kind_and_per_row_kinds_fit_nothing():
    for kind in NORMALIZATIONS:
        normalization, _ = _fit(kind, _acts())
        assert normalization.kind == kind
        assert isinstance(normalization.scale, float)
    for kind in ("none", "center_unit_norm", "layer_norm"):
        assert _fit(kind, _acts())[0].scale == 1
