"""The training step: the same on every mesh, and the checks before a run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic

from sae_jax import loader, state
from sae_jax.config import DataConfig, MeshConfig, OptimizerConfig, SaeConfig
from sae_jax.mesh import batch_sharding, make_mesh
from sae_jax.step import make_step
from sae_jax.store import open_store


def _start(store, mesh, **fields):
    setup = synthetic.make_setup(synthetic.make_config(**fields), mesh, store)
    return setup, state.create(setup, jnp.asarray(synthetic.sample_rows(512, seed=99)))


def _run(store, mesh, n_steps):
    setup, train_state = _start(store, mesh)
    step = make_step(setup)
    sources = loader.find_sources(setup.config.data, [store])
    batches = loader.train_batches(sources, setup.config.data, mesh, 0, 0, n_steps)
    history = []
    for acts_bd in batches:
        train_state, metrics = step(train_state, acts_bd)
        history.append({name: value.item() for name, value in metrics.items()})
    return train_state, history


@pytest.fixture(scope="module")
def unsharded(planted_store):
    return _run(open_store(planted_store), make_mesh(MeshConfig(1, 1)), 100)


def test_runs_agree_on_every_mesh(mesh, planted_store, unsharded):
    expected_state, expected = unsharded
    train_state, history = _run(open_store(planted_store), mesh, 100)
    for name in ("loss", "nmse", "l0"):
        np.testing.assert_allclose(
            [row[name] for row in history],
            [row[name] for row in expected],
            rtol=1e-5,
            err_msg=name,
        )
    # The case is worth nothing unless AuxK acted.
    assert max(row["aux_loss"] for row in history) > 0
    np.testing.assert_array_equal(
        train_state.counters.steps_since_l, expected_state.counters.steps_since_l
    )


@pytest.mark.slow
def test_long_runs_end_alike_on_every_mesh(mesh, planted_store):
    store = open_store(planted_store)
    ends = []
    for run_mesh in (make_mesh(MeshConfig(1, 1)), mesh):
        train_state, _ = _run(store, run_mesh, 1000)
        sae = _start(store, run_mesh)[0].sae(train_state.params)
        ends.append(synthetic.heldout_nmse(store, sae))
    assert ends[1] == pytest.approx(ends[0], rel=5e-3)


def test_a_step_keeps_types_placement_and_unit_norm(mesh, planted_store):
    setup, before = _start(open_store(planted_store), mesh)
    expected = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), before)
    placement = jax.tree.map(lambda leaf: leaf.sharding, state.abstract(setup))
    acts_bd = jax.device_put(synthetic.sample_rows(64), batch_sharding(mesh))
    after, _ = make_step(setup)(before, acts_bd)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == expected
    for leaf, sharding in zip(jax.tree.leaves(after), jax.tree.leaves(placement)):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    norms = np.linalg.norm(np.asarray(after.params["w_dec_ld"], np.float64), axis=1)
    np.testing.assert_allclose(norms, 1, atol=3e-7)


def test_a_new_state_is_partitioned_over_latents(planted_store):
    _, train_state = _start(open_store(planted_store), make_mesh(MeshConfig(2, 4)))
    for leaf in train_state.params["w_enc_ld"], train_state.params["w_dec_ld"]:
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(32, 16)}
    # Data shards share what is not needed to compute gradients.
    for leaf in train_state.ema["w_dec_ld"], train_state.optimizer.mu["w_enc_ld"]:
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(16, 16)}


@pytest.mark.parametrize("shape", [(2, 4), (8, 1)])
def test_a_shared_optimizer_does_the_same(shape, planted_store):
    mesh, ends = make_mesh(MeshConfig(*shape)), []
    for is_shared in (True, False):
        config = synthetic.make_config(
            mesh=MeshConfig(*shape, shard_optimizer=is_shared),
            optimizer=OptimizerConfig(learning_rate=3e-3, clip_norm=0.5),
        )
        setup = synthetic.make_setup(config, mesh, open_store(planted_store))
        train_state = state.create(setup, synthetic.sample_rows(512, seed=99))
        step = make_step(setup)
        for seed in range(5):
            rows_bd = synthetic.sample_rows(64, seed)
            acts_bd = jax.device_put(rows_bd, batch_sharding(mesh))
            train_state, metrics = step(train_state, acts_bd)
        ends.append(jax.device_get((train_state, metrics)))
    for one, other in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-7)


def test_latents_that_do_not_divide_cannot_share_an_optimizer(planted_store):
    sae = SaeConfig(n_latents=132, k=3, k_aux=8)
    store, mesh = open_store(planted_store), make_mesh(MeshConfig(2, 4))
    setup = synthetic.make_setup(synthetic.make_config(sae=sae), mesh, store)
    assert not setup.shards_optimizer
    config = synthetic.make_config(sae=sae, mesh=MeshConfig(2, 4, True))
    with pytest.raises(ValueError, match="132 latents among 8 devices"):
        synthetic.make_setup(config, mesh, store)


def test_training_lowers_the_error(unsharded):
    _, history = unsharded
    assert history[-1]["nmse"] < 0.6 * history[0]["nmse"]


@pytest.mark.parametrize(
    "shape, fields, message",
    [
        ((1, 8), dict(sae=SaeConfig(n_latents=100, k=3)), "sae.n_latents = 100 .* 8"),
        (
            (8, 1),
            dict(data=DataConfig(batch_rows=60, lanes=4, window_chunks=2)),
            "data.batch_rows = 60 .* mesh.data = 8",
        ),
        ((1, 1), dict(sae=SaeConfig(d_model=8, k=3)), "sae.d_model = 8, but .* 16"),
        (
            (1, 1),
            dict(data=DataConfig(batch_rows=64, site="resid_post.9")),
            "resid_post.9",
        ),
        ((1, 1), dict(data=DataConfig(batch_rows=512, lanes=512)), "lanes"),
        (
            (1, 8),
            dict(sae=SaeConfig(n_latents=128, k=8, capacity_factor=1.0)),
            "expected recall .* 0.6.* below sae.recall_target = 0.99",
        ),
    ],
)
def test_bad_runs_are_refused_before_they_start(shape, fields, message, planted_store):
    config = synthetic.make_config(**fields)
    with pytest.raises(ValueError, match=message) as caught:
        mesh = make_mesh(MeshConfig(*shape))
        synthetic.make_setup(config, mesh, open_store(planted_store))
    assert "\n" not in str(caught.value)


def test_held_out_rows_are_never_trained_on(tmp_path):
    store = open_store(synthetic.write_store(tmp_path / "store", train_shards=0))
    with pytest.raises(ValueError, match="held-out rows, which training refuses"):
        mesh = make_mesh(MeshConfig(1, 1))
        synthetic.make_setup(synthetic.make_config(), mesh, store)


def test_derived_fields_are_set(planted_store):
    config = synthetic.make_config()
    config = dataclasses.replace(config, sae=SaeConfig(n_latents=64, k=3))
    mesh = make_mesh(MeshConfig(1, 1))
    setup = synthetic.make_setup(config, mesh, open_store(planted_store))
    assert setup.config.sae.d_model == 16
    assert setup.config.sae.k_aux == 8
    assert setup.config.data.site == setup.site == synthetic.SITE
