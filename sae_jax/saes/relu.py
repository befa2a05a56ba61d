"""The ReLU SAE with an L1 penalty (Gao et al. 2024, equation 1).

    f = ReLU(h + b_enc)
    L = nmse + λ mean_b sum_l f_bl

Decoder rows have unit norm, or shrinking f and growing W_dec would evade the penalty.
Dead latents can be given a new start (`resample_every_rows`, `sae_jax.resample`).
"""

from typing import Any

import jax
from flax import nnx

from sae_jax.config import SaeConfig
from sae_jax.firing import Counters
from sae_jax.saes.base import Batch, DenseSae, Weights, new_bias
from sae_jax.saes.penalised import l1_loss


class ReluSae(DenseSae):
    """ReLU and L1."""

    def __init__(self, config: SaeConfig, *place: Any):
        super().__init__(config, *place)
        if config.use_b_enc:
            self.b_enc_l = new_bias(self.w_enc_ld)

    @staticmethod
    def unit_norm(config: SaeConfig) -> tuple[str, ...]:
        return ("w_dec_ld",)

    def activate(self, h_bl: jax.Array, weights: Weights) -> jax.Array:
        return nnx.relu(h_bl + weights.get("b_enc_l", 0))

    def loss(
        self, batch: Batch, counters: Counters
    ) -> tuple[jax.Array, dict[str, Any]]:
        return l1_loss(self, batch, counters)
