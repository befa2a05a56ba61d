"""How the TopK SAE chooses, approximately and over latent shards, on several meshes."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import synthetic
from compare import check_code, check_loss, differentiate
from small_sae import (
    B,
    K,
    K_AUX,
    LOSS_SCALE,
    make_params,
    make_rows,
    make_setup,
    place,
    random_dead,
)

from sae_jax import state
from sae_jax.config import MeshConfig, SaeConfig
from sae_jax.mesh import make_mesh
from sae_jax.saes.topk import plan_choice
from sae_jax.state import Setup
from sae_jax.step import make_step
from sae_jax.store import open_store

# So many that each latent shard has buckets, and recall so high that 16 rows lose
# nothing: what is found is then what the oracle has.
OWN = 2048
TARGET = 0.9995


def _setup(mesh_shape, method: str, **sae) -> Setup:
    n_latents = OWN * mesh_shape[1]
    sae |= {"n_latents": n_latents, "selection": method, "recall_target": TARGET}
    setup = make_setup(mesh_shape, **sae)
    choice = plan_choice(setup.config.sae, setup.mesh, K)
    assert choice.method == method
    assert bool(choice.n_buckets) == (method != "approx")
    return setup


@pytest.mark.parametrize(
    ("mesh_shape", "method", "sae"),
    [
        ((1, 1), "bucketed", {}),
        pytest.param((8, 1), "approx", {}, marks=pytest.mark.slow),
        ((1, 8), "exact", {"capacity_factor": 8.0}),
        ((2, 4), "bucketed", {"capacity_factor": 4.0, "multi_topk": True}),
        ((1, 8), "bucketed", {"prefixes": (100, 5000, 8 * OWN)}),
    ],
)
def test_loss_and_gradients_are_the_oracles(x64, mesh_shape, method, sae):
    """Where nothing is lost: also of Multi-TopK, and of prefixes."""
    setup = _setup(mesh_shape, method, **sae)
    n_latents = setup.config.sae.n_latents
    params, dead_l = make_params(n_latents=n_latents), random_dead(99, n_latents)
    check_loss(setup, params, make_rows(), dead_l)


@pytest.mark.parametrize(
    ("mesh_shape", "method"),
    [((1, 1), "bucketed"), ((1, 8), "exact"), ((2, 4), "bucketed"), ((2, 4), "approx")],
)
def test_encode_and_decode_are_the_oracles(x64, mesh_shape, method):
    setup = _setup(mesh_shape, method)
    params = make_params(n_latents=setup.config.sae.n_latents)
    rows_bd = make_rows(n_rows=13)
    sae = setup.sae(place(setup, params))
    code = sae.encode(jnp.asarray(rows_bd))
    check_code(code, oracle.pre_activations(params, rows_bd, True), K, rtol=1e-12)
    want_bd = oracle.decode(params, *oracle.encode(params, rows_bd, K))
    np.testing.assert_allclose(sae.decode(code), want_bd, rtol=1e-10, atol=1e-12)


def _best_of_shards(pre_bl, n_shards: int, capacity: int) -> np.ndarray:
    """Pre-activations of what the shards hand over, and -inf elsewhere."""
    by_shard = pre_bl.reshape(len(pre_bl), n_shards, -1)
    least = -np.sort(-by_shard, axis=2)[:, :, capacity - 1 : capacity]
    return np.where(by_shard >= least, by_shard, -np.inf).reshape(pre_bl.shape)


@pytest.mark.parametrize(("mesh_shape", "factor"), [((1, 8), 2.0), ((2, 4), 1.5)])
def test_a_latent_shard_hands_over_its_capacity(x64, mesh_shape, factor):
    """The K best of these are what is chosen, in codes as in training."""
    k, n_shards = 16, mesh_shape[1]
    sae = {"k": k, "n_latents": 128, "capacity_factor": factor}
    setup = make_setup(mesh_shape, recall_target=0.5, **sae)
    params, rows_bd = make_params(n_latents=128), make_rows()
    pre_bl = oracle.pre_activations(params, rows_bd, True)
    capacity = int(k * factor) // n_shards
    handed_bl = _best_of_shards(pre_bl, n_shards, capacity)
    chosen = oracle.choose(handed_bl, k)
    assert chosen != oracle.choose(pre_bl, k)  # something is lost
    code = setup.sae(place(setup, params)).encode(jnp.asarray(rows_bd))
    check_code(code, handed_bl, k, rtol=1e-12)
    z_bl = oracle.chosen_values(handed_bl, chosen)
    _, aux, _ = differentiate(setup, params, rows_bd, random_dead(0, 128))
    np.testing.assert_array_equal(aux["fired_l"], (z_bl > 0).any(0))
    recon_bd = z_bl @ params["w_dec_ld"] + params["b_dec_d"]
    want = oracle.main_loss(recon_bd, rows_bd, LOSS_SCALE)
    np.testing.assert_allclose(aux["metrics"]["nmse"], want, rtol=1e-10)
    np.testing.assert_allclose(aux["metrics"]["l0"], (z_bl > 0).sum() / B, rtol=1e-12)


def test_a_capacity_that_loses_too_much_is_refused():
    setup = make_setup((1, 8), n_latents=128, k=16, capacity_factor=1.0)
    sae = setup.sae(place(setup, make_params(n_latents=128), np.float32))
    with pytest.raises(ValueError, match="below sae.recall_target = 0.99"):
        sae.encode(jnp.float32(make_rows()))


@pytest.mark.parametrize(
    ("method", "capacity_factor"),
    [("bucketed", None), ("bucketed", 2.0), ("exact", 2.0)],
)
def test_recall_over_latent_shards_is_the_expected_one(method, capacity_factor):
    n_latents, k, d_model = 2**13, 32, 64
    sae = {"k": k, "n_latents": n_latents, "d_model": d_model, "k_aux": K_AUX}
    sae |= {"capacity_factor": capacity_factor, "recall_target": 0.9}
    setup = make_setup((1, 8), selection=method, **sae)
    rng = np.random.default_rng(0)
    params = {
        "w_enc_ld": oracle.unit_norm_rows(rng.normal(size=(n_latents, d_model))),
        "w_dec_ld": np.zeros((n_latents, d_model)),
        "b_dec_d": np.zeros(d_model),
        "b_enc_l": np.zeros(n_latents),
    }
    rows_bd = np.float32(rng.normal(size=(2048, d_model)))
    model = setup.sae(place(setup, params, np.float32))
    expected = plan_choice(setup.config.sae, setup.mesh, k).recall
    assert 0.9 <= expected < 1
    pre_bl = rows_bd @ np.float32(params["w_enc_ld"]).T
    least_b1 = -np.partition(-pre_bl, k - 1, axis=1)[:, k - 1 : k]
    found_bk = np.take_along_axis(pre_bl, np.asarray(model.encode(rows_bd).indices), 1)
    recall = (found_bk >= least_b1 - 1e-5).mean()
    assert recall == pytest.approx(expected, abs=2e-3)


def test_rows_that_are_chosen_for_again_are_counted_on_every_shard(x64):
    setup, n_latents = _setup((2, 4), "exact"), 4 * OWN
    params, dead_l = make_params(n_latents=n_latents), random_dead(0, n_latents)
    _, aux, _ = differentiate(setup, params, make_rows(), dead_l)
    assert aux["metrics"]["n_resorted"] == 0
    params["w_enc_ld"][:], params["b_enc_l"][:] = 0, 1
    check_loss(setup, params, make_rows(), dead_l)
    _, aux, _ = differentiate(setup, params, make_rows(), dead_l)
    assert aux["metrics"]["n_resorted"] == 4 * B


@pytest.mark.slow
def test_a_step_reports_the_rows_that_are_chosen_for_again(planted_store):
    sae = SaeConfig(n_latents=OWN, k=3, k_aux=8)
    store, mesh = open_store(planted_store), make_mesh(MeshConfig(1, 1))
    setup = synthetic.make_setup(synthetic.make_config(sae=sae), mesh, store)
    before = state.create(setup, jnp.asarray(synthetic.sample_rows(512, seed=99)))
    step, rows_bd = make_step(setup), jnp.asarray(synthetic.sample_rows(64))
    after, metrics = step(before, rows_bd)
    assert metrics["n_resorted"] < 8
    after.params["w_enc_ld"] *= 0
    after.params["b_enc_l"] *= 0
    _, metrics = step(after, rows_bd)
    assert metrics["n_resorted"] == 64
