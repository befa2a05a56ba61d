"""The optimizer chain, the weight average and the firing counter against the oracle."""

import dataclasses
import functools

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


def _start(params: oracle.Params) -> optim.Optimized:
    params = jax.tree.map(jnp.asarray, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    return optim.Optimized(params, zeros, optim.start(params))


def _updater(config: TrainConfig, unit_norm: tuple[str, ...] = UNIT_NORM):
    """(old, gradients) -> (new, norms), compiled."""
    compiled = jax.jit(functools.partial(optim.update, config, unit_norm, assigned={}))

    def update(old: optim.Optimized, gradients: oracle.Params):
        return compiled(
            old,
            {
                name: jnp.asarray(gradients[name], value.dtype)
                for name, value in old.params.items()
            },
        )

    return update


@pytest.mark.parametrize("chunk_size", [5 * D, 2**19])  # of 32 rows 2 are left over
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_update_is_projection_then_clipping_then_adam_then_unit_rows(
    schedule, chunk_size, monkeypatch
):
    monkeypatch.setattr(optim, "_CHUNK_SIZE", chunk_size)
    config = _config(**SCHEDULES[schedule])
    want, is_clipped = oracle.initial_state(_params()), set()
    with jax.enable_x64():
        got, update = _start(want.params), _updater(config)
        for seed in range(20):
            gradients = _gradients(seed)
            got, norms = update(got, gradients)
            is_clipped.add(bool(norms["grad_norm"] > 0.01))
            fired_l = np.zeros(L, bool)
            want = oracle.update(want, gradients, fired_l, _settings(config))
            for name, value in want.params.items():
                close = dict(rtol=1e-10, atol=1e-12)
                np.testing.assert_allclose(got.params[name], value, **close)
                np.testing.assert_allclose(got.ema[name], want.ema[name], **close)
            for norm, of in (("grad_norm", gradients), ("param_norm", want.params)):
                np.testing.assert_allclose(norms[norm], optax.tree.norm(of), rtol=1e-10)
    assert is_clipped == {True, False}


def test_moments_are_optaxs():
    config = _config()
    with jax.enable_x64():
        got = _start(_params())
        adam = optax.scale_by_adam(b1=0.8, b2=0.95, eps=1e-5)
        want, update = adam.init(got.params), _updater(config, ())
        assert jax.tree.structure(got.moments) == jax.tree.structure(want)
        for seed in range(3):
            got, _ = update(got, _gradients(seed))
            _, want = adam.update(jax.tree.map(jnp.asarray, _gradients(seed)), want)
            for a, b in zip(jax.tree.leaves(got.moments), jax.tree.leaves(want)):
                np.testing.assert_allclose(a, b, rtol=1e-12)


def test_an_assigned_parameter_is_taken_as_it_is_and_averaged():
    params = {"w_dec_ld": _params()["w_dec_ld"], "threshold": np.float64(2)}
    gradients = {"w_dec_ld": _gradients(0)["w_dec_ld"], "threshold": np.float64(7)}
    with jax.enable_x64():
        gradients = jax.tree.map(jnp.asarray, gradients)
        assigned = {"threshold": jnp.asarray(5.0)}
        step = jax.jit(functools.partial(optim.update, _config(), ()))
        got, norms = step(_start(params), gradients, assigned)
        got = jax.device_get(got)
    assert got.params["threshold"] == 5
    np.testing.assert_allclose(got.ema["threshold"], 0.1 * 5, rtol=1e-12)
    assert got.moments.mu["threshold"] == got.moments.nu["threshold"] == 0
    want = np.sqrt(L + 5**2)  # as many unit rows, nearly, and the threshold
    np.testing.assert_allclose(norms["param_norm"], want, rtol=0.01)


def test_nothing_of_the_size_of_a_parameter_is_held_beside_the_state(monkeypatch):
    """And what is given up becomes what comes back."""
    monkeypatch.setattr(optim, "_CHUNK_SIZE", 2**15)
    params = {"w_dec_ld": jnp.zeros((40960, 64)), "w_enc_ld": jnp.zeros((40960, 64))}
    size = params["w_dec_ld"].nbytes

    def step(old, grads):
        return optim.update(TrainConfig(), UNIT_NORM, old, grads, {})

    old = optim.Optimized(params, params, optim.start(params))
    compiled = jax.jit(step, donate_argnums=0).lower(old, params).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * size
    assert memory.alias_size_in_bytes >= 8 * size


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
        optimizer=optim.start(params),
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
        # A gradient of the size of eps shows eps; one far above it, the rate.
        gradients = {"b_dec_d": np.array([6.25e-10, 1.0])}
        got, _ = _updater(config, ())(_start({"b_dec_d": np.zeros(2)}), gradients)
    np.testing.assert_allclose(got.params["b_dec_d"], [-2e-4, -4e-4], rtol=1e-6)


def test_projected_gradient_is_orthogonal_to_the_rows():
    w_ld = jnp.float32(_params()["w_dec_ld"])
    grad_ld = jnp.float32(_gradients(1)["w_dec_ld"])
    projected_ld = optim.project_rows(grad_ld, w_ld)
    size = jnp.abs(grad_ld).max()
    along_l = jnp.sum(projected_ld * w_ld, axis=1)
    np.testing.assert_allclose(along_l / size, 0, atol=1e-6)
    want = oracle.project_rows(_gradients(1)["w_dec_ld"], _params()["w_dec_ld"])
    np.testing.assert_allclose(projected_ld / size, want / size, atol=1e-6)


def test_rows_have_unit_norm_after_every_update_in_float32():
    config = TrainConfig(optimizer=OptimizerConfig(learning_rate=0.1))
    got, update = _start(jax.tree.map(np.float32, _params())), _updater(config)
    for seed in range(20):
        got, _ = update(got, _gradients(seed))
        norm_l = np.linalg.norm(np.float64(got.params["w_dec_ld"]), axis=1)
        np.testing.assert_allclose(norm_l, 1, atol=3e-7)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
def test_average_is_read_free_of_its_start_and_with_unit_rows(decay):
    ema = {name: np.zeros_like(value) for name, value in _params().items()}
    for n_steps in range(1, 6):
        for name, value in _params(n_steps).items():
            ema[name] = oracle.ema_update(ema[name], value, decay)
        with jax.enable_x64():
            read = optim.ema_read(
                jax.tree.map(jnp.asarray, ema), decay, n_steps, UNIT_NORM
            )
        for name, value in read.items():
            want = oracle.ema_read(ema[name], decay, n_steps)
            if name in UNIT_NORM:
                want = oracle.unit_norm_rows(want)
            np.testing.assert_allclose(value, want, rtol=1e-11)
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
