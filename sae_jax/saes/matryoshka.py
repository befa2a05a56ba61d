"""Matryoshka: nested dictionaries trained at once (Bussmann et al. 2025, 2503.17547).

    L = mean_p nmse of x̂_p,   x̂_p from the chosen latents below prefixes[p], and b_dec

The choice is made once, over all latents. So the first latents must explain rows
without the later ones and keep to what is general. The mean, where others take a sum,
keeps the loss at the scale of nmse whatever the number of prefixes. Latents between
two prefixes are a group; a prefix is a running sum of groups.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax import losses
from sae_jax.mesh import LATENT
from sae_jax.saes.base import Sae


def split(sae: Sae, values: jax.Array, columns: jax.Array) -> list[jax.Array]:
    """A shard's values by the group of their latents: 0 in all groups but their own.

    Args:
        sae: has the prefixes.
        values: [B, N].
        columns: of each value, the latent within the shard, [B, N] or [N].
    """
    n_own = sae.n_latents // sae.mesh.shape[LATENT]
    latents = columns + lax.axis_index(LATENT) * n_own
    prefixes = sae.config.prefixes
    return [
        jnp.where((latents >= first) & (latents < stop), values, 0)
        for first, stop in zip((0, *prefixes), prefixes)
    ]


def main_loss(
    sae: Sae, recons: dict[str, jax.Array], targets_bd: jax.Array, scale: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """nmse, or with prefixes its mean over them; and each nmse by name.

    Args:
        sae: has b_dec, and the prefixes if there are any.
        recons: "recon_bd", x̂; with prefixes "groups_gbd", what each group adds to it.
        targets_bd: rows in the SAE's space.
        scale: `loss_scale`.
    """
    nmse = scale * losses.mean_square_error(recons["recon_bd"], targets_bd)
    prefixes = sae.config.prefixes[:-1]
    if not prefixes:
        return nmse, {"nmse": nmse}
    # The last prefix is x̂ itself.
    recons_gbd = jnp.cumsum(recons["groups_gbd"][:-1], axis=0) + sae.b_dec_d[...]
    by_prefix = [scale * losses.mean_square_error(r, targets_bd) for r in recons_gbd]
    names = [f"nmse_prefix_{prefix}" for prefix in prefixes]
    metrics = {"nmse": nmse} | dict(zip(names, by_prefix))
    return sum(by_prefix, nmse) / (1 + len(by_prefix)), metrics
