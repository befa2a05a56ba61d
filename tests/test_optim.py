"""The optimizer chain, the weight average and the firing counter against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

from sae_jax import firing, optim
from sae_jax.config import OptimizerConfig, SaeConfig, TrainConfig
from sae_jax.geometric_median import geometric_median

D, L = 12, 32
UNIT_NORM = ("w_dec_ld",)


def _params(seed: int = 0) -> oracle.Params:
    rng = np.random.default_rng(seed)
    return {
        "w_enc_ld": rng.normal(size=(L, D)),
        "w_dec_ld": oracle.unit_norm_rows(rng.normal(size=(L, D))),
        "b_dec_d": rng.normal(size=D),
    }


def _gradients(seed: int) -> oracle.Params:
    rng = np.random.default_rng(seed)
    size = 10.0 ** -rng.integers(0, 6)  # Adam must see every size alike, down to eps
    return {name: size * rng.normal(size=a.shape) for name, a in _params().items()}


def test_chain_is_projection_then_adam_then_unit_rows():
    config = TrainConfig(
        sae=SaeConfig(n_latents=L, k=4),
        optimizer=OptimizerConfig(learning_rate=0.01, b1=0.8, b2=0.95, eps=1e-5),
    )
    settings = oracle.Settings(
        k=1, k_aux=1, learning_rate=0.01, b1=0.8, b2=0.95, eps=1e-5
    )
    want = _params()
    moments = {name: (np.zeros_like(a), np.zeros_like(a)) for name, a in want.items()}
    with jax.enable_x64():
        chain = optim.build(config, UNIT_NORM)
        params = jax.tree.map(jnp.asarray, want)
        state = chain.init(params)
        for n_steps in range(1, 21):
            gradients = _gradients(n_steps)
            updates, state = chain.update(
                jax.tree.map(jnp.asarray, gradients), state, params
            )
            params = optax.apply_updates(params, updates)
            gradients["w_dec_ld"] = oracle.project_rows(
                gradients["w_dec_ld"], want["w_dec_ld"]
            )
            for name, value in want.items():
                value, *moments[name] = oracle.adam(
                    value, gradients[name], *moments[name], n_steps, settings
                )
                is_unit = name in UNIT_NORM
                want[name] = oracle.unit_norm_rows(value) if is_unit else value
        for name in want:
            np.testing.assert_allclose(params[name], want[name], rtol=1e-10, atol=1e-12)


def test_defaults_are_the_papers():
    """2e-4 / sqrt(L / 2^14), betas (0.9, 0.999), eps 6.25e-10."""
    config = TrainConfig(sae=SaeConfig(n_latents=2**12, k=4))
    with jax.enable_x64():
        chain = optim.build(config, ())
        # A gradient of the size of eps shows eps; one far above it, the rate.
        params = {"b_dec_d": jnp.zeros(2)}
        gradients = {"b_dec_d": jnp.array([6.25e-10, 1.0])}
        updates, _ = chain.update(gradients, chain.init(params), params)
    np.testing.assert_allclose(updates["b_dec_d"], [-2e-4, -4e-4], rtol=1e-6)


def test_projected_gradient_is_orthogonal_to_the_rows_and_leaves_the_rest_alone():
    params = jax.tree.map(jnp.float32, _params())
    gradients = jax.tree.map(jnp.float32, _gradients(1))
    project = optim.project_rows(UNIT_NORM)
    projected, _ = project.update(gradients, project.init(params), params)
    along_l = jnp.sum(projected["w_dec_ld"] * params["w_dec_ld"], axis=1)
    size = jnp.abs(gradients["w_dec_ld"]).max()
    np.testing.assert_allclose(along_l / size, 0, atol=1e-6)
    want = oracle.project_rows(_gradients(1)["w_dec_ld"], _params()["w_dec_ld"])
    np.testing.assert_allclose(projected["w_dec_ld"] / size, want / size, atol=1e-6)
    for name in ("w_enc_ld", "b_dec_d"):
        np.testing.assert_array_equal(projected[name], gradients[name])


def test_rows_have_unit_norm_after_every_update_in_float32():
    params = jax.tree.map(jnp.float32, _params())
    chain = optim.build(
        TrainConfig(optimizer=OptimizerConfig(learning_rate=0.1)), UNIT_NORM
    )
    state = chain.init(params)
    for seed in range(20):
        gradients = jax.tree.map(jnp.float32, _gradients(seed))
        updates, state = chain.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        norm_l = np.linalg.norm(np.float64(params["w_dec_ld"]), axis=1)
        np.testing.assert_allclose(norm_l, 1, atol=3e-7)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_average_is_the_oracles_with_unit_rows_where_declared(decay):
    with jax.enable_x64():
        ema = jax.tree.map(lambda a: jnp.zeros(a.shape), _params())
        want = {name: np.zeros_like(a) for name, a in _params().items()}
        for n_steps in range(1, 6):
            params = jax.tree.map(jnp.asarray, _params(n_steps))
            ema = optim.ema_update(ema, params, decay)
            for name, value in _params(n_steps).items():
                want[name] = oracle.ema_update(want[name], value, decay)
            read = optim.ema_read(ema, decay, n_steps, UNIT_NORM)
            for name, value in read.items():
                want_read = oracle.ema_read(want[name], decay, n_steps)
                if name in UNIT_NORM:
                    want_read = oracle.unit_norm_rows(want_read)
                np.testing.assert_allclose(value, want_read, rtol=1e-11)
    with pytest.raises(ValueError):
        optim.ema_read(ema, decay, 0, UNIT_NORM)


def test_firing_counter_is_the_oracles():
    rng = np.random.default_rng(0)
    steps_since_l, want_l = firing.start(L), np.zeros(L, int)
    np.testing.assert_array_equal(steps_since_l, want_l)
    for _ in range(12):
        fired_l = rng.random(L) < 0.2
        steps_since_l = firing.update(steps_since_l, jnp.asarray(fired_l))
        want_l = oracle.update_firing(want_l, fired_l)
        np.testing.assert_array_equal(steps_since_l, want_l)
        assert steps_since_l.dtype == jnp.int32
        for dead_after_steps in (1, 3, 12):
            np.testing.assert_array_equal(
                firing.is_dead(steps_since_l, dead_after_steps),
                oracle.is_dead(want_l, dead_after_steps),
            )
    assert firing.is_dead(steps_since_l, 3).any()
    assert not firing.is_dead(steps_since_l, 3).all()


def test_geometric_median_is_the_oracles_though_rows_lie_far_out():
    rng = np.random.default_rng(0)
    rows_bd = rng.normal(size=(64, D))
    rows_bd[:6] += 1e3
    want_d = oracle.geometric_median(rows_bd)
    assert np.abs(want_d).max() < 1 < np.abs(rows_bd.mean(0)).max()
    median_d = geometric_median(jnp.asarray(rows_bd, jnp.float32))
    np.testing.assert_allclose(median_d, want_d, atol=1e-4)
    same_bd = jnp.ones((5, D))  # every row lies on the median
    np.testing.assert_allclose(geometric_median(same_bd), 1, rtol=1e-6)
