"""Loss terms against the oracle."""

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
