"""The Gated SAE (Rajamanoharan et al. 2024, arXiv:2404.16014).

    π = h + b_gate                                      which latents are active
    f = 1[π > 0] * ReLU(exp(r_mag) h + b_mag)           and how strongly
    L = nmse + λ mean_b sum_l ReLU(π_bl) + nmse of x̂_gate
    x̂_gate = ReLU(π) W_dec + b_dec                      W_dec and b_dec held constant

One projection h serves both paths: the magnitude's encoder is tied to the gate's by
exp(r_mag). The penalty bears on the gate alone, so magnitudes do not shrink. The gate's
step has no gradient; its bias learns from the penalty and from x̂_gate, which in turn
moves neither W_dec nor b_dec: unlike in the paper's listing, b_dec is constant in this
term also where the encoder subtracts it. Decoder rows have unit norm; Adam with b1 = 0
is the paper's. Dead latents can be resampled, as with `relu`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from sae_jax import losses
from sae_jax.config import SaeConfig
from sae_jax.firing import Counters
from sae_jax.matmul import matmul
from sae_jax.saes.base import Batch, DenseSae, Weights, new_bias
from sae_jax.saes.penalised import penalised_loss
from sae_jax.saes.tiles import Sums, sum_over_latents


class GatedSae(DenseSae):
    """A gate with an L1 penalty, and magnitudes without."""

    def __init__(self, config: SaeConfig, *place: Any):
        super().__init__(config, *place)
        self.b_gate_l = new_bias(self.w_enc_ld)
        self.b_mag_l = new_bias(self.w_enc_ld)
        self.r_mag_l = new_bias(self.w_enc_ld)

    @staticmethod
    def unit_norm(config: SaeConfig) -> tuple[str, ...]:
        return ("w_dec_ld",)

    def activate(self, h_bl: jax.Array, weights: Weights) -> jax.Array:
        magnitude_bl = jnp.exp(weights["r_mag_l"]) * h_bl + weights["b_mag_l"]
        is_open_bl = h_bl + weights["b_gate_l"] > 0
        return jnp.where(is_open_bl, nnx.relu(magnitude_bl), 0)

    def loss(
        self, batch: Batch, counters: Counters
    ) -> tuple[jax.Array, dict[str, Any]]:
        normed_bd, targets_bd = self.normalize_batch(batch)
        sums, fired_l = sum_over_latents(self, self._on_tile, normed_bd)
        gate_recon_bd = sums["gate_recon_bd"] + lax.stop_gradient(self.b_dec_d[...])
        aux_loss = counters.loss_scale * losses.mean_square_error(
            gate_recon_bd, targets_bd
        )
        return penalised_loss(
            self, sums, fired_l, targets_bd, counters, aux_loss=aux_loss
        )

    def _on_tile(
        self, normed_bd: jax.Array, weights: Weights
    ) -> tuple[Sums, jax.Array]:
        constant = weights | {"w_dec_ld": lax.stop_gradient(weights["w_dec_ld"])}
        rows_bd, w_enc_ld, bias_l = self.encoder(normed_bd, weights)
        constant_h_bl = matmul(rows_bd, w_enc_ld.T, self.dtype)
        h_bl = constant_h_bl + bias_l
        code_bl = self.activate(h_bl, weights)
        gate_bl = nnx.relu(constant_h_bl + weights["b_gate_l"])
        sums = {
            "recon_bd": self.decode_part(code_bl, weights),
            "penalty": jnp.sum(nnx.relu(h_bl + weights["b_gate_l"]), axis=1),
            "gate_recon_bd": self.decode_part(gate_bl, constant),
        }
        return sums, code_bl > self.config.firing_threshold
