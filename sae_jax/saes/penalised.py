"""The loss of architectures that are made sparse by a penalty.

    L = nmse + λ_t * penalty + further terms
    λ_t = sparsity_coefficient * min(1, (t + 1) / sparsity_warmup_steps)

nmse is the mean square error over that of predicting the data mean, so λ weighs the
penalty against a share of variance, whatever the scale and the width of the rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax import losses
from sae_jax.firing import Counters
from sae_jax.saes.base import Batch, DenseSae, Weights
from sae_jax.saes.tiles import Sums, sum_over_latents


def l1_loss(
    sae: DenseSae,
    batch: Batch,
    counters: Counters,
    weigh: Callable[[Weights], jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """What `Sae.loss` returns where the penalty is the sum of a row's values.

    `weigh(weights)` [L] multiplies the values there; 1 when not given.
    """

    def on_tile(normed_bd: jax.Array, weights: Weights) -> tuple[Sums, jax.Array]:
        code_bl = sae.activate(sae.project(normed_bd, weights), weights)
        weighed_bl = code_bl * weigh(weights) if weigh else code_bl
        sums = {
            "recon_bd": sae.decode_part(code_bl, weights),
            "penalty": jnp.sum(weighed_bl, axis=1),
        }
        return sums, code_bl > sae.config.firing_threshold

    normed_bd, targets_bd = sae.normalize_batch(batch)
    sums, fired_l = sum_over_latents(sae, on_tile, normed_bd)
    return penalised_loss(sae, sums, fired_l, targets_bd, counters)


def penalised_loss(
    sae: DenseSae,
    sums: Sums,
    fired_l: jax.Array,
    targets_bd: jax.Array,
    counters: Counters,
    penalty: jax.Array | None = None,
    **further: jax.Array,
) -> tuple[jax.Array, dict[str, Any]]:
    """What `Sae.loss` returns.

    Args:
        sae, targets_bd, counters, fired_l: of this step.
        sums: over latents; read are "recon_bd", "l0" and "penalty".
        penalty: the penalty, where it is not the mean of its sum over rows.
        further: terms that are added as they are, and reported by their names.
    """
    recon_bd = sums["recon_bd"] + sae.b_dec_d[...]
    nmse = counters.loss_scale * losses.mean_square_error(recon_bd, targets_bd)
    penalty = jnp.mean(sums["penalty"]) if penalty is None else penalty
    assert sae.config.sparsity_coefficient is not None  # the config's check
    sparsity_loss = (
        sae.config.sparsity_coefficient * counters.sparsity_scale * penalty
    )
    loss = nmse + sparsity_loss + sum(further.values())
    metrics = {
        "nmse": nmse,
        "sparsity_loss": sparsity_loss,
        **further,
        "l0": jnp.mean(sums["l0"]),
    }
    return loss, {"metrics": metrics, "fired_l": fired_l, "assigned": {}}
