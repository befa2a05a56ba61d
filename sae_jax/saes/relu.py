"""The ReLU SAE with an L1 penalty (Gao et al. 2024, equation 1).

    f = ReLU(h + b_enc)
    L = nmse + λ mean_b sum_l f_bl

Decoder rows have unit norm, or shrinking f and growing W_dec would evade the penalty.
Dead latents can be given a new start (`resample_every_rows`, `sae_jax.resample`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sae_jax.config import SaeConfig
from sae_jax.firing import Counters
from sae_jax.saes.base import Batch, Sae, Weights, new_bias
from sae_jax.saes.penalised import penalised_loss
from sae_jax.saes.tiles import Sums, sum_over_latents


class ReluSae(Sae):
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
        normed_bd, targets_bd = self.normalize_batch(batch)
        sums, fired_l = sum_over_latents(self, self._on_tile, normed_bd)
        return penalised_loss(self, sums, fired_l, targets_bd, counters)

    def _on_tile(
        self, normed_bd: jax.Array, weights: Weights
    ) -> tuple[Sums, jax.Array]:
        code_bl = self.activate(self.project(normed_bd, weights), weights)
        sums = {
            "recon_bd": self.decode_part(code_bl, weights),
            "penalty": jnp.sum(code_bl, axis=1),
        }
        return sums, code_bl > self.config.firing_threshold
