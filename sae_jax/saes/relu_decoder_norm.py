"""The ReLU SAE of Anthropic's April 2024 update: L1 weighted by decoder norms.

    f = ReLU(h + b_enc)
    L = nmse + λ mean_b sum_l f_bl |w_dec_l|

Decoder rows are free and start with norm 0.1, encoder rows equal to them; both biases
start at 0, and b_dec is not subtracted from the encoder's input. The update ("Update on
how we train SAEs", Circuits Updates, April 2024) sets λ = 5 on squared errors of rows
with mean square norm D, hence about 5 / D on our nmse, warmed up over the first 5 % of
the steps; the learning rate falls to zero over the last 20 %.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sae_jax.config import SaeConfig
from sae_jax.firing import Counters
from sae_jax.normalize import Normalization
from sae_jax.saes.base import Batch, DenseSae, Weights, new_bias, new_param
from sae_jax.saes.penalised import l1_loss

_START_NORM = 0.1


class ReluDecoderNormSae(DenseSae):
    """ReLU, and L1 weighted by the norms of free decoder rows."""

    def __init__(
        self,
        config: SaeConfig,
        normalization: Normalization,
        mesh: Mesh,
        site: str,
        key: jax.Array,
        b_dec_d: jax.Array,
    ):
        super().__init__(
            config, normalization, mesh, site, key, jnp.zeros_like(b_dec_d)
        )
        for name in ("w_enc_ld", "w_dec_ld"):
            unit_ld = getattr(self, name)[...]
            setattr(self, name, new_param(name, _START_NORM * unit_ld))
        if config.use_b_enc:
            self.b_enc_l = new_bias(self.w_enc_ld)

    @staticmethod
    def unit_norm(config: SaeConfig) -> tuple[str, ...]:
        return ()

    def activate(self, h_bl: jax.Array, weights: Weights) -> jax.Array:
        return nnx.relu(h_bl + weights.get("b_enc_l", 0))

    def loss(
        self, batch: Batch, counters: Counters
    ) -> tuple[jax.Array, dict[str, Any]]:
        return l1_loss(self, batch, counters, _find_norms)


def _find_norms(weights: Weights) -> jax.Array:
    return jnp.linalg.norm(weights["w_dec_ld"], axis=1)
