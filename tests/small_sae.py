"""SAEs of a few latents on small meshes, and rows for them, shared by tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from flax import nnx

from sae_jax import optim
from sae_jax.config import (
    CHOOSE_K,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    SaeConfig,
    TrainConfig,
    subtracts_b_dec,
)
from sae_jax.firing import Counters
from sae_jax.mesh import make_mesh
from sae_jax.normalize import Normalization
from sae_jax.state import Setup

B, D, L, K, K_AUX = 16, 12, 32, 6, 8  # on mesh (1, 8) K is more than L/S = 4
MESHES = [(1, 1), (1, 8), (2, 4), (8, 1)]
DEAD_AFTER = 3
LOSS_SCALE = 1.7


def _config(**sae) -> TrainConfig:
    fields = {"d_model": D, "n_latents": L}
    if sae.get("architecture", "topk") in CHOOSE_K:
        fields |= {"k": K, "k_aux": K_AUX, "aux_coefficient": 0.3}
    else:
        fields |= {"sparsity_coefficient": 0.25}  # exact in float32 too
    return TrainConfig(
        sae=SaeConfig(**(fields | sae)),
        optimizer=OptimizerConfig(learning_rate=0.01, ema_decay=0.9),
        data=DataConfig(batch_rows=B, lanes=1),
        rows=100 * B,
        dead_after_rows=DEAD_AFTER * B,
    )


@functools.cache
def make_setup(mesh_shape=(1, 1), normalization=Normalization(), **sae) -> Setup:
    config = _config(**sae, normalization=normalization.kind)
    mesh = make_mesh(MeshConfig(*mesh_shape))
    return Setup(config, normalization, mesh, "resid_post.0", "0")


def oracle_settings(
    setup: Setup, steps: int = 0, warmup_steps: int = 0
) -> oracle.Settings:
    """Of the step after `steps` others, where the penalty is warmed up."""
    config, sae = setup.config, setup.config.sae
    of_step = oracle.warm_up(steps, warmup_steps)
    return oracle.Settings(
        k=sae.k,
        k_aux=sae.k_aux or 0,  # the penalised architectures have none
        loss_scale=LOSS_SCALE,
        aux_coefficient=sae.aux_coefficient,
        subtract_b_dec=subtracts_b_dec(sae),
        sparsity_coefficient=of_step * (sae.sparsity_coefficient or 0),
        bandwidth=sae.bandwidth,
        target_l0=sae.target_l0,
        multi_topk=sae.multi_topk,
        norm_weighted=sae.norm_weighted,
        prefixes=sae.prefixes,
        firing_threshold=sae.firing_threshold,
        dead_after_steps=DEAD_AFTER,
        unit_norm=bool(setup.unit_norm),
        learning_rate=config.optimizer.learning_rate,
        ema_decay=config.optimizer.ema_decay,
    )


def make_params(
    seed: int = 0, use_b_enc: bool = True, n_latents: int = L
) -> oracle.Params:
    rng = np.random.default_rng(seed)
    params = {
        "w_enc_ld": rng.normal(size=(n_latents, D)),
        "w_dec_ld": oracle.unit_norm_rows(rng.normal(size=(n_latents, D))),
        "b_dec_d": 0.3 * rng.normal(size=D),
        "b_enc_l": 0.5 * rng.normal(size=n_latents),
    }
    return params if use_b_enc else {n: a for n, a in params.items() if n != "b_enc_l"}


def whole_numbers(seed: int = 0) -> tuple[oracle.Params, oracle.Array]:
    """Parameters and rows for which float32 is exact and ties abound, also at zero."""
    rng = np.random.default_rng(seed)
    params = {
        "w_enc_ld": rng.integers(-1, 2, size=(L, D)),
        "w_dec_ld": rng.integers(-1, 2, size=(L, D)),
        "b_dec_d": rng.integers(-1, 2, size=D),
        "b_enc_l": rng.integers(-2, 1, size=L),
    }
    rows_bd = rng.integers(-1, 2, size=(B, D))
    return {n: np.float64(a) for n, a in params.items()}, np.float64(rows_bd)


def make_rows(seed: int = 1, n_rows: int = B) -> oracle.Array:
    return np.random.default_rng(seed).normal(size=(n_rows, D))


def random_dead(n_dead: int, n_latents: int = L) -> np.ndarray:
    """Dead latents, spread so that every latent shard has some."""
    return np.random.default_rng(2).permutation(n_latents) < n_dead


def make_counters(
    dead_l: np.ndarray, steps: int = 0, warmup_steps: int = 0
) -> Counters:
    steps_since_l = np.where(dead_l, DEAD_AFTER, DEAD_AFTER - 1)
    return Counters(
        jnp.int32(steps_since_l),
        jnp.int32(DEAD_AFTER),
        jnp.asarray(LOSS_SCALE),
        steps=jnp.int32(steps),
        sparsity_warmup_steps=jnp.int32(warmup_steps),
    )


def place(setup: Setup, params: oracle.Params, dtype=None) -> optim.Params:
    """Parameters on the mesh, as the SAE itself would place them."""
    with jax.set_mesh(setup.mesh):
        specs = nnx.to_pure_dict(
            nnx.get_named_sharding(nnx.state(setup.sae(params)), setup.mesh)
        )
    return {
        name: jax.device_put(np.asarray(value, dtype), specs[name])
        for name, value in params.items()
    }
