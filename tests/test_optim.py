"""The optimizer chain, the weight average and the firing counter against the oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import small_sae

from sae_jax import firing, optim
from sae_jax.config import DataConfig, OptimizerConfig, SaeConfig, TrainConfig
from sae_jax.geometric_median import geometric_median
from sae_jax.mesh import batch_sharding
from sae_jax.state import TrainState
from sae_jax.step import make_step

D, L = small_sae.D, small_sae.L
ROWS = 64  # in a step
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


SCHEDULES = {
    "constant": {},
    "clipped": {"clip_norm": 0.01},
    "warmed up": {"warmup_rows": 7 * ROWS},
    "lowered": {"decay_rows": 9 * ROWS},
    "all": {"clip_norm": 0.01, "warmup_rows": 7 * ROWS, "decay_rows": 13 * ROWS},
}


def _config(**optimizer) -> TrainConfig:
    """A run of 20 steps."""
    adam = dict(learning_rate=0.01, b1=0.8, b2=0.95, eps=1e-5, ema_decay=0.9)
    return TrainConfig(
        sae=SaeConfig(n_latents=L, k=4),
        optimizer=OptimizerConfig(**(adam | optimizer)),
        data=DataConfig(batch_rows=ROWS, lanes=1),
        rows=20 * ROWS,
        dead_after_rows=ROWS,
    )


def _settings(config: TrainConfig) -> oracle.Settings:
    optimizer = config.optimizer
    return oracle.Settings(
        k=1,
        k_aux=1,
        clip_norm=optimizer.clip_norm,
        learning_rate=optimizer.learning_rate,
        warmup_steps=optimizer.warmup_rows // ROWS,
        decay_steps=optimizer.decay_rows // ROWS,
        n_steps=20,
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        ema_decay=optimizer.ema_decay,
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_chain_is_projection_then_clipping_then_adam_then_unit_rows(schedule):
    config = _config(**SCHEDULES[schedule])
    want, is_clipped = oracle.initial_state(_params()), set()
    with jax.enable_x64():
        chain = optim.build(config, UNIT_NORM)
        params = jax.tree.map(jnp.asarray, want.params)
        state = chain.init(params)
        for seed in range(20):
            gradients = _gradients(seed)
            updates, state = chain.update(
                jax.tree.map(jnp.asarray, gradients), state, params
            )
            params = optax.apply_updates(params, updates)
            is_clipped.add(bool(optax.tree.norm(gradients) > 0.01))
            fired_l = np.zeros(L, bool)
            want = oracle.update(want, gradients, fired_l, _settings(config))
            for name, value in want.params.items():
                np.testing.assert_allclose(params[name], value, rtol=1e-10, atol=1e-12)
    assert is_clipped == {True, False}


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4), (8, 1)])
def test_a_step_clips_by_the_norm_over_all_parameters_on_all_devices(x64, mesh_shape):
    """Batches of many sizes, as Adam does not see one factor of all its gradients."""
    setup = small_sae.make_setup(mesh_shape)
    optimizer = dataclasses.replace(setup.config.optimizer, clip_norm=0.5)
    config = dataclasses.replace(setup.config, optimizer=optimizer)
    setup = dataclasses.replace(setup, config=config)
    settings = small_sae.oracle_settings(setup)
    settings = dataclasses.replace(settings, clip_norm=0.5)
    want = oracle.initial_state(small_sae.make_params())
    params = small_sae.place(setup, want.params)
    state = TrainState(
        params=params,
        ema=jax.tree.map(jnp.zeros_like, params),
        optimizer=optim.build(config, setup.unit_norm).init(params),
        counters=small_sae.make_counters(np.zeros(L, bool)),
    )
    step, norms = make_step(setup), []
    for seed in range(6):
        rows_bd = (1 + 3 * seed) * small_sae.make_rows(seed)
        dead_l = np.zeros(L, bool)  # dead latents are for other tests
        gradients = oracle.gradients(want.params, rows_bd, dead_l, settings)
        fired_l = np.ones(L, bool)
        want = oracle.update(want, gradients, fired_l, settings)
        placed_bd = jax.device_put(rows_bd, batch_sharding(setup.mesh))
        state = state._replace(counters=small_sae.make_counters(dead_l))
        state, metrics = step(state, placed_bd)
        norms.append(metrics["grad_norm"].item())
        for name, value in want.params.items():
            np.testing.assert_allclose(state.params[name], value, rtol=1e-8, atol=1e-10)
    assert min(norms) > 2 * 0.5 and max(norms) > 4 * min(norms)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_of_every_step_is_the_oracles(schedule):
    """Rows that make no whole step count for nothing."""
    config = _config(**SCHEDULES[schedule])
    config.optimizer.warmup_rows += ROWS - 1
    rates = [optim.learning_rate_at(config, step).item() for step in range(20)]
    want = [oracle.learning_rate(step, _settings(config)) for step in range(20)]
    np.testing.assert_allclose(rates, want, rtol=1e-6)
    first = 0.01 / 7 if config.optimizer.warmup_rows > ROWS else 0.01
    last = 0.01 / _settings(config).decay_steps if config.optimizer.decay_rows else 0.01
    assert (rates[0], rates[-1]) == pytest.approx((first, last), rel=1e-6)
    if schedule in ("constant", "clipped"):
        assert len(set(rates)) == 1


def test_defaults_are_the_papers():
    """2e-4 / sqrt(L / 2^14), betas (0.9, 0.999), eps 6.25e-10."""
    config = TrainConfig(sae=SaeConfig(n_latents=2**12, k=4))
    assert (config.optimizer.b1, config.optimizer.b2) == (0.9, 0.999)
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
