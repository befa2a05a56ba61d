"""AuxK: dead latents explain what live ones leave over (Gao et al. 2024, A.2).

    e = x - x̂, held constant
    z = ReLU(the k_aux largest pre-activations of dead latents)
    AuxK = |e - z W_dec|^2 / |e - mean e|^2

Live latents are left out altogether, so that no place is lost to them. A dead latent
that is chosen with a negative pre-activation adds nothing and learns nothing, as in the
paper: it has to wait for a row on which it is positive. Which latents are dead is
decided before the step; how their part is computed is in `sae_jax.dead_latents`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax import dead_latents, losses
from sae_jax.config import k_aux
from sae_jax.firing import Counters
from sae_jax.mesh import DATA, LATENT
from sae_jax.saes.base import Sae, Weights


def own_weights(
    sae: Sae, normed_bd: jax.Array, weights: Weights
) -> tuple[jax.Array, dead_latents.Weights]:
    """What the encoder multiplies, and the weights of a shard; b_enc is in the bias.

    All vary over the whole mesh.
    """
    rows_bd, w_enc_ld, bias_l = sae.encoder(normed_bd, weights)
    if "b_enc_l" in weights:
        bias_l += weights["b_enc_l"]
    return rows_bd, dead_latents.Weights(w_enc_ld, bias_l, weights["w_dec_ld"])


def reconstruct(
    sae: Sae,
    rows_bd: jax.Array,
    weights: dead_latents.Weights,
    is_dead_l: jax.Array,
) -> tuple[jax.Array, dead_latents.Weights]:
    """A shard's part [B, D] of the residual's reconstruction, without b_dec.

    Args:
        sae: the SAE.
        rows_bd, weights: from `own_weights`.
        is_dead_l: the shard's.

    Returns:
        The part, and the weights that all else in the step has to use.
    """
    k = k_aux(sae.config, sae.d_model)
    is_dead_l = lax.pcast(is_dead_l, DATA, to="varying")
    return dead_latents.reconstruct(
        rows_bd, weights, is_dead_l, k, LATENT, sae.dtype
    )


def loss(
    recon_bd: jax.Array,
    aux_recon_bd: jax.Array,
    targets_bd: jax.Array,
    counters: Counters,
) -> jax.Array:
    """AuxK, not yet weighted by its coefficient."""
    is_any_dead = jnp.any(counters.is_dead_l)
    return losses.aux_loss(targets_bd - recon_bd, aux_recon_bd, is_any_dead)
