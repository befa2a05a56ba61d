"""The whole recipe, from a new state on, against formulas written down elsewhere.

The default config in float64 NumPy; a run against plain autodiff; where the encoder
starts; what counts as firing; and which weights are loaded.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import small_sae
import synthetic

from sae_jax import config as configs
from sae_jax import run, state
from sae_jax.checkpoint import Checkpoints
from sae_jax.config import DataConfig, MeshConfig, SaeConfig, TrainConfig
from sae_jax.mesh import make_mesh
from sae_jax.normalize import Normalization
from sae_jax.state import Setup
from sae_jax.step import make_step

D, B, N_FEATURES = 64, 256, 256
NORMALIZATION = Normalization("center_unit_norm")


def _normed(rows_bd: np.ndarray) -> oracle.Array:
    return oracle.normalize(NORMALIZATION.kind, rows_bd)[0]


def _planted_rows(seed: int, n_rows: int = B) -> np.ndarray:
    """Rows [n, D] float32: eight of the planted unit directions each, and noise."""
    features = np.random.default_rng(9).normal(size=(N_FEATURES, D))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    rows_bd = 0.02 * rng.normal(size=(n_rows, D)) + 0.3
    for _ in range(8):
        size_b1 = rng.uniform(0.5, 1.5, size=(n_rows, 1))
        rows_bd += features[rng.integers(N_FEATURES, size=n_rows)] * size_b1
    return rows_bd.astype(np.float32)


@pytest.mark.parametrize("dead_after_rows", [10**7, B], ids=["default", "AuxK"])
def test_ten_steps_of_the_default_config_are_the_formulas(dead_after_rows):
    """In float32, where Adam's first steps follow little but the gradients' signs.

    What is left is mostly the rounding of 1 - 0.999^t, which moves every element alike.
    """
    sae = SaeConfig()
    assert (sae.n_latents, sae.k) == (4096, 32)
    sae = dataclasses.replace(sae, d_model=D, k_aux=configs.k_aux(sae, D))
    data = DataConfig(batch_rows=B)
    config = TrainConfig(sae, data=data, dead_after_rows=dead_after_rows)
    setup = Setup(config, NORMALIZATION, make_mesh(MeshConfig(1, 1)), "site", "0")
    sample_bd = _planted_rows(1000, 1024)
    train_state = state.create(setup, jnp.asarray(sample_bd))
    settings = oracle.Settings(
        k=32,
        k_aux=32,
        loss_scale=oracle.loss_scale(_normed(sample_bd)),
        dead_after_steps=dead_after_rows // B,
        learning_rate=2e-4 * 2,
    )
    start = {name: np.float64(a) for name, a in train_state.params.items()}
    want, step, aux_losses = oracle.initial_state(start), make_step(setup), []
    for seed in range(10):
        rows_bd = _planted_rows(seed)
        want, out = oracle.train_step(want, _normed(rows_bd), settings)
        train_state, metrics = step(train_state, jnp.asarray(rows_bd))
        np.testing.assert_allclose(metrics["loss"], out.total, rtol=1e-5)
        aux_losses.append(out.aux)
    assert any(aux_losses) == (dead_after_rows == B)
    np.testing.assert_array_equal(
        train_state.counters.steps_since_l, want.steps_since_l
    )
    for name, value in train_state.params.items():
        moved = np.float64(value) - start[name]
        want_moved = want.params[name] - start[name]
        error = np.linalg.norm(moved - want_moved)
        assert error < 1e-4 * np.linalg.norm(want_moved), name


def _autodiff_loss(params, normed_bd, is_dead_l, config, loss_scale):
    """The paper's loss with dense arrays and a mask; None but jnp and its gradients."""
    pre_bl = (normed_bd - params["b_dec_d"]) @ params["w_enc_ld"].T + params["b_enc_l"]

    def best(pre_bl, k):
        least_b1 = jax.lax.top_k(pre_bl, k)[0][:, -1:]
        return jnp.where(pre_bl >= least_b1, jnp.maximum(pre_bl, 0), 0)

    z_bl = best(pre_bl, config.k)
    residual_bd = normed_bd - (z_bl @ params["w_dec_ld"] + params["b_dec_d"])
    nmse = loss_scale * jnp.mean(residual_bd**2)
    residual_bd = jax.lax.stop_gradient(residual_bd)
    dead_bl = jnp.where(is_dead_l, pre_bl, -1e9)
    aux_error_bd = residual_bd - best(dead_bl, config.k_aux) @ params["w_dec_ld"]
    spread = jnp.sum((residual_bd - residual_bd.mean(0)) ** 2)
    aux = jnp.where(is_dead_l.any(), jnp.sum(aux_error_bd**2) / spread, 0)
    return nmse + config.aux_coefficient * aux, (z_bl > 0).any(0)


@functools.partial(jax.jit, static_argnums=4)
def _autodiff_step(carry, normed_bd, loss_scale, dead_after_steps, config):
    """The same step once more, unsharded, with Adam by hand."""
    params, mean, square, steps_since_l, t = carry
    differentiate = jax.value_and_grad(_autodiff_loss, has_aux=True)
    is_dead_l = steps_since_l >= dead_after_steps
    (loss, fired_l), g = differentiate(
        params, normed_bd, is_dead_l, config.sae, loss_scale
    )
    w_dec_ld = params["w_dec_ld"]
    g["w_dec_ld"] -= jnp.sum(g["w_dec_ld"] * w_dec_ld, 1, keepdims=True) * w_dec_ld
    rate, t = config.optimizer.learning_rate, t + 1
    mean = {name: 0.9 * mean[name] + 0.1 * g[name] for name in g}
    square = {name: 0.999 * square[name] + 0.001 * g[name] ** 2 for name in g}
    params = {
        name: params[name]
        - rate
        * (mean[name] / (1 - 0.9**t))
        / (jnp.sqrt(square[name] / (1 - 0.999**t)) + 6.25e-10)
        for name in g
    }
    norm_l1 = jnp.linalg.norm(params["w_dec_ld"], axis=1, keepdims=True)
    params["w_dec_ld"] /= norm_l1
    steps_since_l = jnp.where(fired_l, 0, steps_since_l + 1)
    return (params, mean, square, steps_since_l, t), loss


def _small_run() -> tuple[Setup, state.TrainState]:
    sae = SaeConfig(d_model=synthetic.D_MODEL, n_latents=128, k=3, k_aux=8)
    config = synthetic.make_config(sae=sae)
    setup = Setup(config, NORMALIZATION, make_mesh(MeshConfig(2, 4)), "site", "0")
    return setup, state.create(setup, jnp.asarray(synthetic.sample_rows(512, seed=99)))


def _compare_with_autodiff(n_steps: int):
    """Both runs' losses, then their parameters; the package's on mesh (2, 4)."""
    setup, train_state = _small_run()
    scale = float(train_state.counters.loss_scale)
    params = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), train_state.params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    carry = (params, zeros, zeros, jnp.zeros(128, jnp.int32), jnp.float32(0))
    step, losses, want_losses, n_dead = make_step(setup), [], [], []
    for seed in range(n_steps):
        rows_bd = synthetic.sample_rows(64, seed)
        normed_bd = _normed(rows_bd).astype(np.float32)
        carry, want = _autodiff_step(
            carry, normed_bd, scale, setup.config.dead_after_steps, setup.config
        )
        train_state, metrics = step(train_state, jnp.asarray(rows_bd))
        losses.append(metrics["loss"].item())
        want_losses.append(want.item())
        n_dead.append(metrics["n_dead"].item())
    assert len(set(n_dead)) > 3  # AuxK acted, and latents came back
    return losses, want_losses, setup.sae(train_state.params), carry[0]


def test_a_run_starts_as_plain_autodiff_does():
    losses, want_losses, sae, want = _compare_with_autodiff(100)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    assert losses[-1] < 0.7 * losses[0]
    np.testing.assert_allclose(sae.w_dec_ld[...], want["w_dec_ld"], atol=2e-3)


@pytest.mark.slow
def test_a_long_run_ends_as_plain_autodiff_does():
    *_, sae, want = _compare_with_autodiff(1000)
    normed_bd = _normed(synthetic.sample_rows(2048, seed=10**6))

    def nmse(params):
        params = {name: np.float64(a) for name, a in params.items()}
        recon_bd = oracle.decode(params, *oracle.encode(params, normed_bd, 3))
        return oracle.main_loss(recon_bd, normed_bd, oracle.loss_scale(normed_bd))

    assert nmse(sae.weights()[0]) == pytest.approx(nmse(want), rel=5e-3)


def _new(setup: Setup) -> state.TrainState:
    return state.create(setup, jnp.asarray(small_sae.make_rows(n_rows=64)))


@pytest.mark.parametrize(
    ("mesh_shape", "subtract_b_dec"), [((1, 1), False), ((2, 4), True)]
)
def test_the_encoder_is_rescaled_as_the_oracle_does(x64, mesh_shape, subtract_b_dec):
    setup, rescaled = (
        small_sae.make_setup(mesh_shape, subtract_b_dec=subtract_b_dec, **fields)
        for fields in ({}, {"rescale_encoder": True})
    )
    start, rescaled = _new(setup).params, _new(rescaled).params
    key = jax.random.fold_in(jax.random.key(setup.config.seed), 1)
    vectors_bd = np.asarray(jax.random.normal(key, (256, small_sae.D)))
    unit_bd = oracle.unit_norm_rows(vectors_bd)
    settings = small_sae.oracle_settings(setup)
    start = jax.device_get(start)
    want_ld = oracle.encoder_rescale(start, unit_bd, settings)
    np.testing.assert_allclose(rescaled["w_enc_ld"], want_ld, rtol=1e-10)
    assert np.abs(want_ld / start["w_enc_ld"] - 1).min() > 0.1
    for name in ("w_dec_ld", "b_dec_d", "b_enc_l"):
        np.testing.assert_array_equal(rescaled[name], start[name])


@pytest.mark.parametrize(
    "sae",
    [
        {"norm_weighted": True},
        {"architecture": "relu_decoder_norm"},
        {"architecture": "gated"},
    ],
    ids=["norm-weighted topk", "relu_decoder_norm", "gated"],
)
def test_a_rescaled_start_rebuilds_random_vectors_at_their_length(sae):
    setup = small_sae.make_setup(rescale_encoder=True, **sae)
    sae = setup.sae(_new(setup).params)
    unit_bd = np.random.default_rng(3).normal(size=(4096, small_sae.D))
    unit_bd = oracle.unit_norm_rows(unit_bd).astype(np.float32)
    b_dec_d = sae.b_dec_d[...]
    # This SAE's space is that of its rows.
    rebuilt_bd = sae.decode(sae.encode(b_dec_d + unit_bd))
    length = np.linalg.norm(rebuilt_bd - b_dec_d, axis=1).mean()
    assert length == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("architecture", ["topk", "gated"])
def test_only_values_above_the_firing_threshold_reset_the_counter(architecture):
    sae = dict(architecture=architecture, firing_threshold=1.0)
    setup = small_sae.make_setup((2, 4), **sae)
    before, rows_bd = _new(setup), jnp.float32(small_sae.make_rows())
    steps_since_l = jnp.arange(small_sae.L, dtype=jnp.int32) % 5
    before = before._replace(
        counters=before.counters._replace(steps_since_l=steps_since_l)
    )
    code_bl = np.asarray(setup.sae(before.params).encode_dense(rows_bd))
    fired_l = (code_bl > 1).any(0)
    assert fired_l.any() and ((code_bl > 0).any(0) & ~fired_l).any()
    after, metrics = make_step(setup)(before, rows_bd)
    np.testing.assert_array_equal(
        after.counters.steps_since_l, np.where(fired_l, 0, steps_since_l + 1)
    )
    assert metrics["l0"] == pytest.approx((code_bl > 1).sum(1).mean(), rel=1e-6)
    assert metrics["n_dead"] == (np.arange(small_sae.L) % 5 >= 3).sum()


@pytest.mark.parametrize(
    "sae",
    [
        {"architecture": "jumprelu", "bandwidth": 1.0},  # every threshold moves
        {"architecture": "relu_decoder_norm"},
        {"architecture": "batch_topk"},
    ],
    ids=lambda sae: sae["architecture"],
)
def test_averages_of_every_parameter_are_saved_and_loaded(sae, tmp_path):
    setup, history = small_sae.make_setup((2, 4), **sae), []
    train_state, step = _new(setup), make_step(setup)
    for seed in range(2):
        train_state, _ = step(train_state, jnp.float32(small_sae.make_rows(seed)))
        history.append(jax.tree.map(np.float64, jax.device_get(train_state.params)))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, train_state, setup)
    checkpoints.close()
    averaged = run.load(tmp_path).weights()[0]
    raw = run.load(tmp_path, weights="raw").weights()[0]
    for name, last in history[1].items():
        want = (0.9 * history[0][name] + last) / 1.9  # ema_decay is 0.9
        if name in setup.unit_norm:
            want = oracle.unit_norm_rows(want)
        np.testing.assert_allclose(averaged[name], want, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(raw[name], np.float32(last))
        assert np.abs(raw[name] - averaged[name]).max() > 1e-5
    norm_l = np.linalg.norm(averaged["w_dec_ld"], axis=1)
    is_unit_l = np.abs(norm_l - 1) < 1e-6
    assert is_unit_l.all() == (sae["architecture"] != "relu_decoder_norm")
