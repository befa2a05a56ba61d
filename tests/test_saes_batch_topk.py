"""What BatchTopK alone has: one choice over a batch, and a running threshold."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_topk_family as topk_family
import pytest
from collectives import collectives
from compare import check_loss, differentiate
from rival_cases import THRESHOLD, make_params
from small_sae import (
    B,
    D,
    K,
    K_AUX,
    L,
    MESHES,
    make_counters,
    make_rows,
    make_setup,
    place,
    random_dead,
    whole_numbers,
)

from sae_jax import state as states
from sae_jax.gradients import differentiate as differentiate_batch
from sae_jax.mesh import batch_sharding
from sae_jax.step import make_step


def _setup(mesh_shape=(2, 4), **changes):
    return make_setup(mesh_shape, architecture="batch_topk", **changes)


def _least(params, rows_bd) -> float:
    pre_bl = oracle.pre_activations(params, rows_bd, subtract_b_dec=True)
    return topk_family.batch_threshold(pre_bl, K)


@pytest.mark.parametrize("n_dead", [0, 1, K_AUX - 3, L])
def test_any_number_of_dead_latents(x64, n_dead):
    check_loss(_setup(), make_params("batch_topk"), make_rows(), random_dead(n_dead))


@pytest.mark.parametrize("mesh_shape", [(8, 1), (2, 4)])
def test_one_row_per_device_shares_the_latents_of_the_whole_batch(x64, mesh_shape):
    rows_bd = make_rows(n_rows=mesh_shape[0])
    rows_bd[0] *= 3  # so that its values are among the greatest of all rows
    setup, params = _setup(mesh_shape), make_params("batch_topk")
    check_loss(setup, params, rows_bd, random_dead(12))
    least = _least(params, rows_bd)
    pre_bl = oracle.pre_activations(params, rows_bd, subtract_b_dec=True)
    assert (pre_bl[0] >= least).sum() > K


@pytest.mark.parametrize("mesh_shape", [(1, 8), (2, 4)])
def test_values_that_tie_with_the_least_are_all_kept(mesh_shape):
    params, rows_bd = _whole_numbers()
    pre_bl = oracle.pre_activations(params, rows_bd, subtract_b_dec=True)
    n_kept = (pre_bl >= _least(params, rows_bd)).sum()
    assert n_kept > K * B
    inputs = _setup(mesh_shape), params, rows_bd, random_dead(12), np.float32
    check_loss(*inputs, rtol=1e-5)
    _, aux, _ = differentiate(*inputs)
    assert aux["metrics"]["l0"] == n_kept / B


@pytest.mark.parametrize("mesh_shape", [(1, 8), (2, 4)])
def test_fewer_positive_values_than_there_are_places_are_all_kept(mesh_shape):
    params, rows_bd = _whole_numbers()
    params["b_enc_l"] -= 5
    assert _least(params, rows_bd) == 0
    inputs = _setup(mesh_shape), params, rows_bd, random_dead(12), np.float32
    check_loss(*inputs, rtol=1e-5)
    _, aux, _ = differentiate(*inputs)
    assert aux["metrics"]["threshold"] == 0 < aux["metrics"]["l0"] < K


@pytest.mark.parametrize("mesh_shape", MESHES)
def test_the_threshold_starts_at_the_first_and_follows(x64, mesh_shape):
    setup, params, rows_bd = _setup(mesh_shape), make_params("batch_topk"), make_rows()
    inputs = setup, params, rows_bd, random_dead(12)
    least = _least(params, rows_bd)
    for steps, want in ((0, least), (1, 0.9 * THRESHOLD + 0.1 * least)):
        _, aux, gradients = differentiate(*inputs, steps=steps)
        assert float(aux["metrics"]["threshold"]) == pytest.approx(want, rel=1e-12)
        assert aux["assigned"] == {"threshold": aux["metrics"]["threshold"]}
        assert gradients["threshold"] == 0


def test_steps_keep_the_running_threshold_beside_trained_parameters():
    setup = _setup()
    state, step = states.create(setup, jnp.float32(make_rows(0, 64))), make_step(setup)
    assert state.params["threshold"] == 0
    want = None
    for seed in range(4):
        params = {name: np.float64(a) for name, a in state.params.items()}
        least = _least(params, make_rows(seed))
        want = least if want is None else 0.9 * want + 0.1 * least
        rows_bd = np.float32(make_rows(seed))
        placed_bd = jax.device_put(rows_bd, batch_sharding(setup.mesh))
        state, metrics = step(state, placed_bd)
        assert float(metrics["threshold"]) == pytest.approx(want, rel=1e-5)
        assert state.params["threshold"] == metrics["threshold"]


def test_a_step_on_latent_shards_moves_numbers_and_reconstructions_only():
    """One reduction of B * D for each reconstruction, beside counts."""
    setup = _setup((1, 8), n_latents=1024)
    rng = np.random.default_rng(0)
    params = {
        "w_enc_ld": rng.normal(size=(1024, D)),
        "w_dec_ld": rng.normal(size=(1024, D)),
        "b_dec_d": np.zeros(D),
        "b_enc_l": np.zeros(1024),
        "threshold": np.zeros(()),
    }

    def run(params, rows_bd, counters):
        return differentiate_batch(setup, params, (rows_bd, rows_bd), counters)

    lowered = jax.jit(run).lower(
        place(setup, params, np.float32),
        jnp.float32(make_rows()),
        make_counters(np.arange(1024) % 2 == 0),
    )
    moved = collectives(lowered.compile())
    gathers = [size for kind, size in moved if kind == "all-gather"]
    assert gathers == [B * 8]  # of each row's values that are equal to AuxK's least
    n_reduced = sum(size for kind, size in moved if kind == "all-reduce")
    assert 2 * B * D <= n_reduced <= 2 * B * D + 2 * D + 4 * B + 16
    assert {kind for kind, _ in moved} == {"all-gather", "all-reduce"}


def _whole_numbers():
    params, rows_bd = whole_numbers()
    return params | {"threshold": np.zeros(())}, rows_bd
