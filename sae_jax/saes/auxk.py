"""AuxK: dead latents explain what live ones leave over (Gao et al. 2024, A.2).

    e = x - x̂, held constant
    z = ReLU(the k_aux largest pre-activations of dead latents)
    AuxK = |e - z W_dec|^2 / |e - mean e|^2

Live latents are left out altogether, so that no place is lost to them. A dead latent
that is chosen with a negative pre-activation adds nothing and learns nothing, as in the
paper: it has to wait for a row on which it is positive. k_aux is fixed and a
branch on the device skips everything when no latent is dead, so nothing waits for the
host. Which latents are dead is decided before the step.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax import losses, sparse, topk
from sae_jax.config import k_aux
from sae_jax.firing import Counters
from sae_jax.mesh import DATA, LATENT
from sae_jax.saes.base import Sae, Weights


def reconstruct(
    sae: Sae, pre_bl: jax.Array, is_dead_l: jax.Array, weights: Weights
) -> jax.Array:
    """A shard's part [B, D] of the residual's reconstruction, without b_dec."""
    w_dec_ld = lax.pcast(weights["w_dec_ld"], DATA, to="varying")

    def from_dead(pre_bl, is_dead_l, w_dec_ld):  # type: ignore[no-untyped-def]
        dead_bl = jnp.where(is_dead_l, pre_bl, -jnp.inf)
        k = k_aux(sae.config, sae.d_model)
        values_bk, indices_bk, _ = topk.choose_own(dead_bl, k, LATENT)
        return sparse.decode(values_bk, indices_bk, w_dec_ld, sae.dtype)

    def nothing(pre_bl, is_dead_l, w_dec_ld):  # type: ignore[no-untyped-def]
        zeros_bd = jnp.zeros((pre_bl.shape[0], w_dec_ld.shape[1]), pre_bl.dtype)
        return lax.pcast(zeros_bd, (DATA, LATENT), to="varying")

    return lax.cond(
        lax.psum(is_dead_l.sum(), LATENT) > 0,
        from_dead,
        nothing,
        pre_bl,
        is_dead_l,
        w_dec_ld,
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
