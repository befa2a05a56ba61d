"""TopK to a fixed threshold after training (Gao et al. 2024, A.3.2).

A TopK SAE keeps the K largest pre-activations of each row. With one threshold θ for all
rows and latents instead, the number of active latents follows the row, and a latent can
be computed alone. What comes out is a JumpReLU SAE whose thresholds are all θ. Plain
TopK bears this for a mean L0 up to its K; Multi-TopK also beyond.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from sae_jax import topk
from sae_jax.config import CHOOSE_K, SaeConfig
from sae_jax.mesh import DATA, LATENT
from sae_jax.saes.base import ROWS, Sae
from sae_jax.saes.batch_topk import BatchTopKSae
from sae_jax.saes.jumprelu import JumpReluSae
from sae_jax.saes.topk import TopKSae


def fit_threshold(sae: TopKSae | BatchTopKSae, acts_bd: jax.Array, l0: float) -> float:
    """The θ at which rows [..., D], in activation space, have this mean L0.

    The data axis of the SAE's mesh must divide the number of rows.
    """
    _refuse_others(sae)
    acts_bd = acts_bd.reshape(-1, sae.d_model)
    n_kept = round(l0 * len(acts_bd))
    if not 0 < n_kept <= len(acts_bd) * sae.n_latents:
        raise ValueError(
            f"l0 = {l0} on {len(acts_bd)} rows: must be above 0 and at most n_latents "
            f"= {sae.n_latents}"
        )
    (least, next_to_it), n_above_b = _find_largest(sae, acts_bd, n_kept)
    if least == 0:
        mean = np.asarray(n_above_b).mean(dtype=np.float64)
        most = math.floor(1000 * mean) / 1000  # down, so that it can be given
        raise ValueError(
            f"l0 = {l0}: these {len(acts_bd)} rows have fewer latents above 0 than "
            f"that; give at most {most}"
        )
    # Halfway, so that `encode` agrees though it may round in another order.
    return float((least + next_to_it) / 2)


def with_fixed_threshold(
    sae: TopKSae | BatchTopKSae, threshold: float, max_active: int | None = None
) -> JumpReluSae:
    """The same SAE, but every latent above `threshold` is active.

    Args:
        sae: is left as it is; the new SAE shares its weights.
        threshold: in the SAE's normalised space, from `fit_threshold`.
        max_active: most latents in a code of `encode`; 512 when not given.
    """
    _refuse_others(sae)
    if threshold < 0:
        raise ValueError(f"threshold = {threshold}: must be at least 0")
    weights, _ = sae.weights()
    params = {name: value for name, value in weights.items() if name != "threshold"}
    params["threshold_l"] = jnp.full_like(weights["w_dec_ld"][:, 0], threshold)
    config = _as_jumprelu(sae.config, threshold, max_active)
    with jax.set_mesh(sae.mesh):
        abstract = nnx.eval_shape(
            lambda: JumpReluSae(
                config,
                sae.normalization,
                sae.mesh,
                sae.site,
                jax.random.key(0),
                weights["b_dec_d"],
            )
        )
    graph, _ = nnx.split(abstract)
    return nnx.merge(graph, nnx.State(params))


@functools.partial(jax.jit, static_argnames="n_kept")
def _find_largest(
    sae: Sae, acts_bd: jax.Array, n_kept: int
) -> tuple[list[jax.Array], jax.Array]:
    """The least pre-activation that is kept, the next to it, and how many latents of
    each row are above 0."""

    def on_shard(normed_bd, weights):  # type: ignore[no-untyped-def]
        pre_bl = nnx.relu(sae.project(normed_bd, weights) + weights.get("b_enc_l", 0))
        n_above_b = lax.psum(jnp.sum(pre_bl > 0, axis=1, dtype=jnp.int32), LATENT)
        around = (n_kept, n_kept + 1)
        return [topk.nth_largest(pre_bl, n, (DATA, LATENT)) for n in around], n_above_b

    mapped = sae.on_shards(on_shard, (ROWS,), (P(), P(DATA)))
    return mapped(sae.normalize(acts_bd)[0])


def _refuse_others(sae: Sae) -> None:
    if sae.config.architecture not in CHOOSE_K:
        raise ValueError(
            f"this SAE is {sae.config.architecture}: one threshold takes the place of "
            f"a choice of K, which only {' and '.join(CHOOSE_K)} make"
        )


def _as_jumprelu(
    config: SaeConfig, threshold: float, max_active: int | None
) -> SaeConfig:
    return SaeConfig(
        architecture="jumprelu",
        d_model=config.d_model,
        n_latents=config.n_latents,
        normalization=config.normalization,
        use_b_enc=config.use_b_enc,
        subtract_b_dec=config.subtract_b_dec,
        firing_threshold=config.firing_threshold,
        compute_dtype=config.compute_dtype,
        sparsity_coefficient=0.0,
        initial_threshold=threshold,
        max_active=max_active,
    )
