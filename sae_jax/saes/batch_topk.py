"""The BatchTopK SAE (Bussmann et al. 2024, arXiv:2412.06410).

    pre = h + b_enc
    z   = ReLU(pre) where it is among the K B largest of the whole batch, else 0
    L   = nmse + aux_coefficient * AuxK                 AuxK: `sae_jax.saes.auxk`

Rows share K B latents as they need them; K is their mean. The least value that is kept,
over all rows and latent shards, is found by counting alone (`topk.threshold`): no
pre-activations move. Values that tie with it are all kept.

A row met alone has no batch, so `encode` keeps what reaches a running average of that
least value, the parameter `threshold`: the first step's, then a tenth of each. It
gets no gradient. Decoder rows have unit norm; `prefixes` makes it a Matryoshka SAE
(`sae_jax.saes.matryoshka`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from sae_jax import topk
from sae_jax.config import SaeConfig
from sae_jax.firing import Counters
from sae_jax.matmul import matmul
from sae_jax.mesh import DATA, LATENT
from sae_jax.saes import auxk, matryoshka
from sae_jax.saes.base import (
    LATENTS,
    ROWS,
    Batch,
    DenseSae,
    Weights,
    new_bias,
    new_param,
)

_THRESHOLD_RATE = 0.1


class BatchTopKSae(DenseSae):
    """K latents a row on average over a batch."""

    def __init__(self, config: SaeConfig, *place: Any):
        super().__init__(config, *place)
        if config.use_b_enc:
            self.b_enc_l = new_bias(self.w_enc_ld)
        self.threshold = new_param("threshold", jnp.zeros((), self.b_dec_d.dtype))

    @staticmethod
    def unit_norm(config: SaeConfig) -> tuple[str, ...]:
        return ("w_dec_ld",)

    def activate(self, h_bl: jax.Array, weights: Weights) -> jax.Array:
        z_bl = nnx.relu(h_bl + weights.get("b_enc_l", 0))
        return jnp.where(z_bl >= weights["threshold"], z_bl, 0)

    def loss(
        self, batch: Batch, counters: Counters
    ) -> tuple[jax.Array, dict[str, Any]]:
        normed_bd, targets_bd = self.normalize_batch(batch)
        recons, fired_l, l0, least = self._autoencode(normed_bd)
        loss, metrics = matryoshka.main_loss(
            self, recons, targets_bd, counters.loss_scale
        )
        threshold = self._next_threshold(least, counters)
        return loss, {
            "metrics": metrics | {"l0": l0, "threshold": threshold},
            "fired_l": fired_l,
            "assigned": {"threshold": threshold},
            "residual_bd": targets_bd - recons["recon_bd"],
        }

    def _autoencode(
        self, normed_bd: jax.Array
    ) -> tuple[dict[str, jax.Array], jax.Array, jax.Array, jax.Array]:
        """Reconstructions by name, which latents fired, mean L0, and the least kept."""
        n_kept = self.config.k * normed_bd.shape[0]

        def on_shard(normed_bd, weights):  # type: ignore[no-untyped-def]
            rows_bd, own = auxk.own_weights(self, normed_bd, weights)
            z_bl = nnx.relu(matmul(rows_bd, own.w_enc_ld.T, self.dtype) + own.bias_l)
            least = topk.nth_largest(z_bl, n_kept, (DATA, LATENT))
            z_bl = jnp.where(z_bl >= least, z_bl, 0)
            parts = self._reconstruct(z_bl, own.w_dec_ld)
            recons = lax.psum(parts, LATENT)
            recons["recon_bd"] += weights["b_dec_d"]
            fires_bl = z_bl > self.config.firing_threshold
            fired_l = lax.pmax(jnp.any(fires_bl, axis=0).astype(jnp.int32), DATA) > 0
            l0 = lax.psum(jnp.sum(fires_bl) / normed_bd.shape[0], LATENT)
            return recons, fired_l, lax.pmean(l0, DATA), least

        placed = {"recon_bd": ROWS}
        if self.config.prefixes:
            placed["groups_gbd"] = P(None, DATA, None)
        mapped = self.on_shards(on_shard, (ROWS,), (placed, LATENTS, P(), P()))
        return mapped(normed_bd)

    def _reconstruct(
        self, z_bl: jax.Array, w_dec_ld: jax.Array
    ) -> dict[str, jax.Array]:
        """A shard's part of each x̂, without b_dec."""
        if not self.config.prefixes:
            return {"recon_bd": matmul(z_bl, w_dec_ld, self.dtype)}
        groups = matryoshka.split(self, z_bl, jnp.arange(z_bl.shape[1]))
        groups_gbd = jnp.stack([matmul(z, w_dec_ld, self.dtype) for z in groups])
        return {"groups_gbd": groups_gbd, "recon_bd": jnp.sum(groups_gbd, axis=0)}

    def _next_threshold(self, least: jax.Array, counters: Counters) -> jax.Array:
        old = self.threshold[...]
        running = old + _THRESHOLD_RATE * (least - old)
        return lax.stop_gradient(jnp.where(counters.steps == 0, least, running))
