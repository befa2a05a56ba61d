"""Loss terms, and their gradients where a 0/0 lies near, against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from sae_jax import losses

B, D = 16, 12


def _pair(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(B, D)) + 2, rng.normal(size=(B, D))


def _aux(residual_bd, aux_bd, any_dead=True):
    """AuxK and its gradients with respect to the residual and its reconstruction."""
    return jax.value_and_grad(losses.aux_loss, argnums=(0, 1))(
        jnp.asarray(residual_bd), jnp.asarray(aux_bd), jnp.asarray(any_dead)
    )


def test_main_loss_is_the_oracles_and_one_for_predicting_the_mean():
    x_bd, recon_bd = _pair()
    with jax.enable_x64():
        scale = losses.loss_scale(jnp.asarray(x_bd))
        error = losses.mean_square_error(jnp.asarray(recon_bd), jnp.asarray(x_bd))
        mean_bd = jnp.broadcast_to(x_bd.mean(0), x_bd.shape)
        error_of_mean = losses.mean_square_error(mean_bd, jnp.asarray(x_bd))
    assert float(scale) == pytest.approx(oracle.loss_scale(x_bd), rel=1e-12)
    want = oracle.main_loss(recon_bd, x_bd, oracle.loss_scale(x_bd))
    assert float(scale * error) == pytest.approx(want, rel=1e-12)
    assert float(scale * error_of_mean) == pytest.approx(1, rel=1e-12)


def test_aux_loss_and_gradient_are_the_oracles():
    residual_bd, aux_bd = _pair(1)
    with jax.enable_x64():
        loss, (residual_grad_bd, aux_grad_bd) = _aux(residual_bd, aux_bd)
    want = oracle.aux_loss(residual_bd, aux_bd, any_dead=True)
    assert float(loss) == pytest.approx(want, rel=1e-12)
    variation = ((residual_bd - residual_bd.mean(0)) ** 2).sum()
    want_bd = 2 * (aux_bd - residual_bd) / variation
    np.testing.assert_allclose(aux_grad_bd, want_bd, rtol=1e-12)
    np.testing.assert_array_equal(residual_grad_bd, 0)  # the residual is a constant


def test_aux_loss_does_not_depend_on_the_residuals_scale():
    residual_bd, aux_bd = _pair(2)
    want = oracle.aux_loss(residual_bd, aux_bd, any_dead=True)
    for scale in (1e-6, 1e6):
        loss, _ = _aux(np.float32(scale * residual_bd), np.float32(scale * aux_bd))
        assert float(loss) == pytest.approx(want, rel=1e-5)


def test_aux_loss_is_exactly_zero_when_nothing_is_dead():
    loss, gradients = _aux(*_pair(3), any_dead=False)
    assert loss == 0
    for gradient_bd in gradients:
        np.testing.assert_array_equal(gradient_bd, 0)


@pytest.mark.parametrize("case", ["zero", "same rows", "one row"])
def test_aux_loss_of_a_residual_that_does_not_vary_is_zero_with_zero_gradient(case):
    residual_bd, aux_bd = _pair(4)
    residual_bd, aux_bd = {
        "zero": (0 * residual_bd, aux_bd),
        "same rows": (np.ones_like(residual_bd), aux_bd),
        "one row": (residual_bd[:1], aux_bd[:1]),
    }[case]
    for reconstruction_bd in (aux_bd, residual_bd):
        loss, gradients = _aux(residual_bd, reconstruction_bd)
        assert loss == 0
        for gradient_bd in gradients:
            np.testing.assert_array_equal(gradient_bd, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["residual", "reconstruction"])
def test_aux_loss_that_is_not_a_number_is_zero_with_finite_gradient(bad, where):
    residual_bd, aux_bd = _pair(5)
    (residual_bd if where == "residual" else aux_bd)[3, 4] = bad
    loss, gradients = _aux(residual_bd, aux_bd)
    assert loss == 0
    for gradient_bd in gradients:
        assert np.isfinite(gradient_bd).all()
