"""Resampling against the same in plain NumPy, by frequency, and in runs."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import small_sae
import synthetic
from small_sae import D, L

from sae_jax import loop, resample, state, writers
from sae_jax.config import MeshConfig, OptimizerConfig, SaeConfig
from sae_jax.normalize import Normalization
from sae_jax.resample import make_resample

PER_LATENT = ("w_enc_ld", "w_dec_ld", "b_enc_l", "b_gate_l", "b_mag_l", "r_mag_l")
N_DEAD = 12


def _make_setup(mesh_shape, architecture: str):
    normalization = Normalization("layer_norm")
    return small_sae.make_setup(mesh_shape, normalization, architecture=architecture)


def _acts(seed: int = 4, n_rows: int = 64) -> oracle.Array:
    return 5 + 3 * np.random.default_rng(seed).normal(size=(n_rows, D))


def _make_state(setup, dead_l, seed: int = 0) -> state.TrainState:
    """A state in which nothing is zero or one by itself."""
    start = state.create(setup, jnp.asarray(_acts()))
    rng = np.random.default_rng(seed)

    def spoil(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.ndim == 0:
            return leaf
        noise = rng.uniform(0.2, 1, size=leaf.shape)
        return jax.device_put(leaf + noise.astype(leaf.dtype), leaf.sharding)

    steps_since_l = np.where(dead_l, small_sae.DEAD_AFTER, np.arange(len(dead_l)) % 3)
    counters = start.counters._replace(
        steps_since_l=jax.device_put(
            np.int32(steps_since_l), start.counters.steps_since_l.sharding
        )
    )
    spoilt = jax.tree.map(spoil, (start.params, start.ema, start.optimizer))
    return state.TrainState(*spoilt, counters)


def _draw_rows(code_bl, params, normed_bd, uniform_l) -> np.ndarray:
    """The row of each latent: the inverse of the sum of squared losses."""
    error_bd = code_bl @ params["w_dec_ld"] + params["b_dec_d"] - normed_bd
    upto_b = np.cumsum((error_bd**2).sum(1) ** 2)
    return np.array([np.argmax(upto_b >= u * upto_b[-1]) for u in uniform_l])


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4)])
@pytest.mark.parametrize("architecture", ["relu", "gated"])
def test_dead_latents_restart_and_nothing_else_moves(x64, mesh_shape, architecture):
    setup, dead_l = _make_setup(mesh_shape, architecture), small_sae.random_dead(N_DEAD)
    before, seed = _make_state(setup, dead_l), 7
    code_bl = np.asarray(setup.sae(before.params).encode_dense(_acts()))
    kept = jax.device_get(before)
    after = make_resample(setup)(before, _acts(), seed)
    uniform_l = np.asarray(jax.random.uniform(jax.random.key(seed), (L,)))
    old = kept.params
    normed_bd = oracle.normalize("layer_norm", _acts())[0]
    rows_l = _draw_rows(code_bl, old, normed_bd, uniform_l)
    start_ld = oracle.unit_norm_rows(normed_bd[rows_l] - old["b_dec_d"])
    live_norm = np.linalg.norm(old["w_enc_ld"][~dead_l], axis=1).mean()
    want = {"w_dec_ld": start_ld, "w_enc_ld": 0.2 * live_norm * start_ld}
    for name, value in after.params.items():
        if name == "b_dec_d":
            np.testing.assert_array_equal(value, old[name])
            continue
        value = np.asarray(value)
        np.testing.assert_array_equal(value[~dead_l], old[name][~dead_l], err_msg=name)
        started = want.get(name, np.zeros_like(value))[dead_l]
        np.testing.assert_allclose(value[dead_l], started, rtol=1e-9, err_msg=name)
    _check_moments(kept.optimizer, after.optimizer, dead_l)
    steps_since_l = np.where(dead_l, 0, kept.counters.steps_since_l)
    np.testing.assert_array_equal(after.counters.steps_since_l, steps_since_l)
    jax.tree.map(np.testing.assert_array_equal, after.ema, kept.ema)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.abstract(setup))
    for leaf, sharding in zip(jax.tree.leaves(after), jax.tree.leaves(shardings)):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def _check_moments(old, new, dead_l) -> None:
    np.testing.assert_array_equal(new.count, old.count)
    for was, now in ((old.mu, new.mu), (old.nu, new.nu)):
        assert was.keys() == now.keys() and "b_dec_d" in was
        for name, value in now.items():
            forgotten = np.array(was[name])
            assert forgotten.all()  # or nothing would be seen
            if name in PER_LATENT:
                forgotten[dead_l] = 0
            np.testing.assert_array_equal(value, forgotten, err_msg=name)


@pytest.mark.parametrize("n_dead", [0, L])
def test_none_or_all_of_the_latents_may_be_dead(n_dead):
    """With none nothing changes; with all there is no live norm, and 1 is taken."""
    setup, dead_l = _make_setup((2, 4), "relu"), small_sae.random_dead(n_dead)
    before = _make_state(setup, dead_l)
    kept = jax.device_get(before)
    after = make_resample(setup)(before, _acts(), 0)
    if n_dead == 0:
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), kept)
        return
    for name, norm in (("w_dec_ld", 1), ("w_enc_ld", 0.2)):
        norm_l = np.linalg.norm(after.params[name], axis=1)
        np.testing.assert_allclose(norm_l, norm, rtol=1e-6)


def test_rows_are_drawn_in_proportion_to_their_squared_loss():
    """Seen by which row each of 4096 latents starts from."""
    n_latents, n_rows = 4096, 8
    setup = small_sae.make_setup(architecture="relu", n_latents=n_latents)
    dead_l = np.ones(n_latents, bool)
    # A silent SAE rebuilds every row as b_dec.
    before = _make_state(setup, dead_l)
    silent = {name: 0 * a for name, a in before.params.items()}
    before = before._replace(params=silent)
    rows_bd = np.random.default_rng(0).normal(size=(n_rows, D))
    size_b1 = np.linspace(0.6, 1.4, n_rows)[:, None]
    rows_bd = size_b1 * oracle.unit_norm_rows(rows_bd)
    after = make_resample(setup)(before, np.float32(rows_bd), 3)
    cosine_lb = after.params["w_dec_ld"] @ oracle.unit_norm_rows(rows_bd).T
    np.testing.assert_allclose(cosine_lb.max(axis=1), 1, rtol=1e-5)
    n_drawn_b = np.bincount(cosine_lb.argmax(axis=1), minlength=n_rows)
    share_b = size_b1[:, 0] ** 4 / (size_b1**4).sum()  # the loss is the size squared
    expected_b = n_latents * share_b
    chi_square = ((n_drawn_b - expected_b) ** 2 / expected_b).sum()
    assert chi_square < 24.3  # 1 in 1000 for 7 degrees of freedom


def _config(store, **fields):
    """24 steps; resampled after steps 8 (where it is saved) and 16, not after 24."""
    sae = SaeConfig(architecture="relu", n_latents=128, sparsity_coefficient=1.0)
    defaults = dict(mesh=MeshConfig(1, 1), resample_every_rows=8 * 64, n_resamples=2)
    defaults |= dict(optimizer=OptimizerConfig(learning_rate=0.03))
    return synthetic.make_config(store, sae=sae, **(defaults | fields))


@pytest.fixture
def resampled(monkeypatch):
    """(step, dead latents, seed) of each resampling of the runs of a test."""
    calls = []

    def make_and_watch(setup):
        compiled = make_resample(setup)

        def watch(train_state, acts_bd, seed):
            counters = train_state.counters
            calls.append((int(counters.steps), int(counters.is_dead_l.sum()), seed))
            return compiled(train_state, acts_bd, seed)

        return watch

    monkeypatch.setattr(resample, "make_resample", make_and_watch)
    return calls


def test_a_resampled_run_that_was_stopped_goes_on_to_the_same_bits(
    resampled, planted_store, tmp_path
):
    config = _config(planted_store)
    expected = jax.device_get(loop.train(config, tmp_path / "undisturbed"))
    (step, n_dead, key), (last_step, last_n_dead, last_key) = resampled
    assert (step, last_step) == (8, 16)
    assert n_dead > 0 and last_n_dead > 0 and key != last_key
    with pytest.raises(synthetic.Killed):
        loop.train(config, tmp_path / "run", synthetic.KillAt(14))
    # The checkpoint of step 8 holds latents that were resampled already.
    final = jax.device_get(loop.train(config, tmp_path / "run"))
    assert resampled[2:] == [resampled[0], resampled[1]]
    jax.tree.map(np.testing.assert_array_equal, final, expected)


def test_resampling_changes_what_comes_after_it_only(planted_store, tmp_path):
    runs = {}
    for every in (None, 8 * 64):
        config = _config(planted_store, rows=10 * 64, resample_every_rows=every)
        loop.train(config, tmp_path / str(every))
        rows = writers.read_json_lines(tmp_path / str(every) / "metrics.jsonl")
        runs[every] = [(row["loss"], row["n_dead"]) for row in rows]
    assert runs[None][:8] == runs[512][:8]
    assert runs[None][8][0] != runs[512][8][0]
    assert runs[None][8][1] > runs[512][8][1] == 0
