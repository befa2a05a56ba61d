"""Losses, gradients and runs of the TopK SAE on every mesh against the oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from collectives import collectives
from compare import check_loss, differentiate
from small_sae import (
    B,
    D,
    DEAD_AFTER,
    K,
    K_AUX,
    L,
    MESHES,
    make_counters,
    make_params,
    make_rows,
    make_setup,
    oracle_settings,
    place,
    random_dead,
    whole_numbers,
)

from sae_jax import firing, optim
from sae_jax.gradients import differentiate as differentiate_batch
from sae_jax.mesh import batch_sharding
from sae_jax.normalize import Normalization
from sae_jax.state import TrainState
from sae_jax.step import make_step

every_mesh = pytest.mark.parametrize("mesh_shape", MESHES)


@every_mesh
@pytest.mark.parametrize(
    "sae",
    [{}, {"subtract_b_dec": False}, {"use_b_enc": False}],
    ids=["paper", "without subtraction", "without b_enc"],
)
def test_loss_and_gradients_are_the_oracles(x64, mesh_shape, sae):
    setup = make_setup(mesh_shape, **sae)
    params = make_params(use_b_enc=setup.config.sae.use_b_enc)
    check_loss(setup, params, make_rows(), random_dead(12))


@pytest.mark.parametrize("mesh_shape", [(1, 8), (2, 4)])
@pytest.mark.parametrize("exchange", ["tree", "count"])
@pytest.mark.parametrize("multi_topk", [False, True])
def test_every_exchange_gives_the_same(x64, mesh_shape, exchange, multi_topk):
    setup = make_setup(mesh_shape, exchange=exchange, multi_topk=multi_topk)
    check_loss(setup, make_params(), make_rows(), random_dead(12))


@pytest.mark.parametrize("n_dead", [0, 1, K_AUX - 3, L])
def test_any_number_of_dead_latents(x64, n_dead):
    """None, fewer than k_aux, and all."""
    check_loss(make_setup((2, 4)), make_params(), make_rows(), random_dead(n_dead))


def test_loss_and_gradients_in_float32():
    setup = make_setup((2, 4))
    params = {name: np.float64(np.float32(a)) for name, a in make_params().items()}
    rows_bd = np.float64(np.float32(make_rows()))
    check_loss(setup, params, rows_bd, random_dead(12), np.float32, rtol=2e-5)


@every_mesh
@pytest.mark.parametrize("last", ["tied", "zero"])
def test_loss_and_gradients_with_ties_for_the_last_place(mesh_shape, last):
    """Never more than K; a chosen value of exactly 0 neither fires nor is trained."""
    params, rows_bd = whole_numbers()
    params["b_enc_l"] -= 4 if last == "zero" else 0
    pre_bl = oracle.pre_activations(params, rows_bd, subtract_b_dec=True)
    falling_bl = -np.sort(-pre_bl, axis=1)
    if last == "tied":
        is_tied_b = falling_bl[:, K - 1] == falling_bl[:, K]
        assert (is_tied_b & (falling_bl[:, K] > 0)).sum() > B / 4
    else:
        assert (falling_bl[:, :K] == 0).any()
    check_loss(
        make_setup(mesh_shape), params, rows_bd, random_dead(12), np.float32, rtol=1e-5
    )


def test_bfloat16_matmuls_stay_near_the_oracle_with_float32_gradients():
    setup, params = make_setup((2, 4), compute_dtype="bfloat16"), make_params()
    loss, _, gradients = differentiate(
        setup, params, make_rows(), random_dead(12), np.float32
    )
    want = oracle.forward(params, make_rows(), random_dead(12), oracle_settings(setup))
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(want.total, rel=0.02)
    want_gradients = oracle.gradients(
        params, make_rows(), random_dead(12), oracle_settings(setup)
    )
    for name, value in gradients.items():
        assert value.dtype == jnp.float32
        error = np.linalg.norm(value - want_gradients[name])
        assert error < 0.1 * np.linalg.norm(want_gradients[name]), name


@pytest.mark.parametrize("mesh_shape", [(8, 1), (2, 4)])
def test_one_row_per_device(x64, mesh_shape):
    """The residual's mean in AuxK is over the whole batch, not a device's rows."""
    rows_bd = make_rows(n_rows=mesh_shape[0])
    check_loss(make_setup(mesh_shape), make_params(), rows_bd, random_dead(12))


def test_the_loss_of_rows_is_measured_in_the_normalised_space(x64):
    normalization = Normalization("center_unit_norm")
    setup, acts_bd = make_setup((2, 4), normalization), 5 + 3 * make_rows()
    normed_bd, *_ = oracle.normalize("center_unit_norm", acts_bd)
    want = oracle.forward(
        make_params(), normed_bd, random_dead(12), oracle_settings(setup)
    )
    loss, *_ = differentiate(setup, make_params(), acts_bd, random_dead(12))
    assert float(loss) == pytest.approx(want.total, rel=1e-10)


@pytest.mark.parametrize(
    ("mesh_shape", "subtract_b_dec"), [((1, 8), True), ((2, 4), False)]
)
def test_auxk_trains_dead_latents_alone(x64, mesh_shape, subtract_b_dec):
    setup = make_setup(mesh_shape, subtract_b_dec=subtract_b_dec)
    params, rows_bd, dead_l = make_params(), make_rows(), random_dead(12)
    *_, gradients = differentiate(setup, params, rows_bd, dead_l, of="aux_loss")
    for name in ("w_enc_ld", "w_dec_ld", "b_enc_l"):
        live = np.asarray(gradients[name])[~dead_l]
        np.testing.assert_array_equal(live, 0, err_msg=name)
        assert np.abs(gradients[name]).max() > 1e-4
    # The residual is a constant: b_dec is moved through the encoder's subtraction only.
    if subtract_b_dec:
        want_d = -np.asarray(gradients["b_enc_l"]) @ params["w_enc_ld"]
        np.testing.assert_allclose(gradients["b_dec_d"], want_d, rtol=1e-9, atol=1e-12)
    else:
        np.testing.assert_array_equal(gradients["b_dec_d"], 0)
    settings = dataclasses.replace(oracle_settings(setup), aux_coefficient=1.0)
    want = oracle.aux_gradients(params, rows_bd, dead_l, settings)
    for name, value in gradients.items():
        np.testing.assert_allclose(value, want[name], rtol=1e-9, atol=1e-12)


def test_auxk_is_exactly_nothing_when_no_latent_is_dead():
    setup, dead_l = make_setup((2, 4)), random_dead(0)
    _, aux, gradients = differentiate(
        setup, make_params(), make_rows(), dead_l, np.float32, of="aux_loss"
    )
    assert aux["metrics"]["aux_loss"] == 0
    for name, value in gradients.items():
        np.testing.assert_array_equal(value, 0, err_msg=name)


def test_a_perfect_reconstruction_gives_finite_gradients():
    """The residual is zero: AuxK is 0/0, and counts as 0."""
    setup = make_setup((2, 4))
    params = make_params() | {"w_enc_ld": np.zeros((L, D)), "b_enc_l": np.zeros(L)}
    rows_bd = np.tile(np.float32(params["b_dec_d"]), (B, 1))
    loss, aux, gradients = differentiate(
        setup, params, rows_bd, random_dead(L), np.float32
    )
    assert loss == 0 and aux["metrics"]["aux_loss"] == 0
    for value in gradients.values():
        np.testing.assert_array_equal(value, 0)


def test_a_step_on_latent_shards_moves_candidates_and_reconstructions_only():
    """One gather of B * S * k_in, one sum of B * D for each x̂, and AuxK's counts."""
    setup = make_setup((1, 8), n_latents=1024, k=K, k_aux=K_AUX)
    rng = np.random.default_rng(0)
    params = {
        "w_enc_ld": rng.normal(size=(1024, D)),
        "w_dec_ld": rng.normal(size=(1024, D)),
        "b_dec_d": np.zeros(D),
        "b_enc_l": np.zeros(1024),
    }

    def run(params, rows_bd, counters):
        return differentiate_batch(setup, params, (rows_bd, rows_bd), counters)

    compiled = (
        jax.jit(run)
        .lower(
            place(setup, params, np.float32),
            jnp.float32(make_rows()),
            make_counters(np.arange(1024) % 2 == 0),
        )
        .compile()
    )
    moved = collectives(compiled)
    gathers = sorted(size for kind, size in moved if kind == "all-gather")
    assert gathers == [B * 8, B * 8 * K]  # AuxK's equal values, and the candidates
    n_reduced = sum(size for kind, size in moved if kind == "all-reduce")
    # AuxK counts a row's values in a loop, for three patterns, and when it is done.
    assert 2 * B * D <= n_reduced <= 2 * B * D + 2 * D + 4 * B + 16
    assert {kind for kind, _ in moved} == {"all-gather", "all-reduce"}


@every_mesh
def test_a_run_of_100_steps_is_the_oracles(x64, mesh_shape):
    """Losses, parameters, averages and counters, with latents that die and revive."""
    setup = make_setup(mesh_shape, k=3)
    settings = oracle_settings(setup)
    want = oracle.initial_state(make_params())
    params = place(setup, make_params())
    state = TrainState(
        params=params,
        ema=jax.tree.map(jnp.zeros_like, params),
        optimizer=optim.start(params),
        counters=make_counters(random_dead(0))._replace(steps_since_l=firing.start(L)),
    )
    step, n_dead = make_step(setup), []
    for seed in range(100):
        rows_bd = make_rows(seed)
        dead_l = oracle.is_dead(want.steps_since_l, DEAD_AFTER)
        n_dead.append(dead_l.sum())
        want, out = oracle.train_step(want, rows_bd, settings)
        placed_bd = jax.device_put(rows_bd, batch_sharding(setup.mesh))
        state, metrics = step(state, placed_bd)
        np.testing.assert_allclose(metrics["loss"], out.total, rtol=1e-9)
        np.testing.assert_array_equal(metrics["n_dead"], dead_l.sum())
    assert len(set(n_dead)) > 3
    np.testing.assert_array_equal(state.counters.steps_since_l, want.steps_since_l)
    read = optim.ema_read(state.ema, settings.ema_decay, want.n_steps, setup.unit_norm)
    for name, value in want.params.items():
        np.testing.assert_allclose(state.params[name], value, rtol=1e-7, atol=1e-9)
        ema = oracle.ema_read(want.ema[name], settings.ema_decay, want.n_steps)
        if name in setup.unit_norm:
            ema = oracle.unit_norm_rows(ema)
        np.testing.assert_allclose(read[name], ema, rtol=1e-7, atol=1e-9)
    rows_norm_l = np.linalg.norm(state.params["w_dec_ld"], axis=1)
    np.testing.assert_allclose(rows_norm_l, 1, rtol=1e-12)
