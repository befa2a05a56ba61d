"""The ProLU SAE with an L1 penalty (Taggart 2024, "ProLU: a nonlinearity for SAEs").

    f = h where h > 0 and h + b_enc > 0, else 0
    L = nmse + λ mean_b sum_l f_bl

A bias that only decides whether a latent is active does not shrink its value, and so
has no gradient. The straight-through one takes the step H(h + b) to rise with slope 1
wherever the latent is active:

    df/dh = 1 + h,   df/db_enc = h      where f > 0, else 0

Decoder rows have unit norm. Dead latents can be resampled, as with `relu`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sae_jax.config import SaeConfig
from sae_jax.firing import Counters
from sae_jax.saes.base import Batch, DenseSae, Weights, new_bias
from sae_jax.saes.penalised import l1_loss


@jax.custom_jvp
def prolu(h_bl: jax.Array, b_l: jax.Array) -> jax.Array:
    """h where both h and h + b are above 0, else 0."""
    return jnp.where((h_bl > 0) & (h_bl + b_l > 0), h_bl, 0)


@prolu.defjvp
def _prolu_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (h_bl, b_l), (dh_bl, db_l) = primals, tangents
    f_bl = prolu(h_bl, b_l)
    return f_bl, jnp.where(f_bl > 0, dh_bl + f_bl * (dh_bl + db_l), 0)


class ProluSae(DenseSae):
    """ProLU and L1."""

    def __init__(self, config: SaeConfig, *place: Any):
        super().__init__(config, *place)
        self.b_enc_l = new_bias(self.w_enc_ld)

    @staticmethod
    def unit_norm(config: SaeConfig) -> tuple[str, ...]:
        return ("w_dec_ld",)

    def activate(self, h_bl: jax.Array, weights: Weights) -> jax.Array:
        return prolu(h_bl, weights["b_enc_l"])

    def loss(
        self, batch: Batch, counters: Counters
    ) -> tuple[jax.Array, dict[str, Any]]:
        return l1_loss(self, batch, counters)
