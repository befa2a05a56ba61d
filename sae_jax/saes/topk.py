"""The TopK SAE (Gao et al. 2024, section 2.3).

    pre = h + b_enc
    z   = ReLU(the K largest of pre, zero elsewhere)
    L   = nmse + aux_coefficient * AuxK                 AuxK: `sae_jax.saes.auxk`

Decoder rows have unit norm. Three options change the loss or the choice:

    multi_topk     L + nmse of x̂ at 4 K / 8     a code that is good at any K (A.3.2)
    prefixes       nmse averaged over nested dictionaries (`sae_jax.saes.matryoshka`)
    norm_weighted  free decoder rows, latents chosen by pre |w_dec| (Llama Scope, He et
                   al. 2024): the same SAE with W_enc |w_dec|, b_enc |w_dec| and
                   W_dec / |w_dec|, whose values the code then holds

Each latent shard chooses its own candidates, tile by tile (`sae_jax.topk.encoder`), and
decodes what it won of them: one step moves the candidates of one choice, counts for
AuxK's, and one sum of [B, D] per reconstruction. Nothing of size [B, L] is ever held.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sae_jax import dead_latents, losses, sparse, topk
from sae_jax.config import SaeConfig, most_chosen
from sae_jax.firing import Counters
from sae_jax.mesh import DATA, LATENT
from sae_jax.saes import auxk, matryoshka
from sae_jax.saes.base import LATENTS, ROWS, Batch, Sae, Weights, new_bias


class TopKSae(Sae):
    """Exactly K latents a row."""

    def __init__(self, config: SaeConfig, *place: Any):
        super().__init__(config, *place)
        if config.use_b_enc:
            self.b_enc_l = new_bias(self.w_enc_ld)

    @staticmethod
    def unit_norm(config: SaeConfig) -> tuple[str, ...]:
        return () if config.norm_weighted else ("w_dec_ld",)

    @property
    def k(self) -> int:
        return self.config.k

    def with_k(self, k: int) -> "TopKSae":
        """The same SAE, choosing K latents; it shares this one's weights."""
        other = nnx.merge(*nnx.split(self))
        other.config = dataclasses.replace(self.config, k=k, multi_topk=False)
        return other

    def choose(
        self, normed_bd: jax.Array, weights: Weights, k: int
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        rows_bd, own = auxk.own_weights(self, normed_bd, weights)
        values_bk, columns_bk, _ = self._choose(rows_bd, own, k)
        return values_bk, columns_bk, None

    def loss(
        self, batch: Batch, counters: Counters
    ) -> tuple[jax.Array, dict[str, Any]]:
        normed_bd, targets_bd = self.normalize_batch(batch)
        recons, fired_l, counts = self._autoencode(normed_bd)
        loss, metrics = matryoshka.main_loss(
            self, recons, targets_bd, counters.loss_scale
        )
        if self.config.multi_topk:
            at_4k = losses.mean_square_error(recons["recon_4k_bd"], targets_bd)
            metrics["multi_topk_nmse"] = counters.loss_scale * at_4k
            loss += metrics["multi_topk_nmse"] / 8
        aux = {"metrics": metrics | counts, "fired_l": fired_l, "assigned": {}}
        return loss, aux | {"residual_bd": targets_bd - recons["recon_bd"]}

    def _autoencode(
        self, normed_bd: jax.Array
    ) -> tuple[dict[str, jax.Array], jax.Array, dict[str, jax.Array]]:
        """Reconstructions by name, which latents fired, and scalars of the choice."""

        def on_shard(normed_bd, weights):  # type: ignore[no-untyped-def]
            rows_bd, own = auxk.own_weights(self, normed_bd, weights)
            values_bk, columns_bk, parts, n_resorted = self._reconstruct(rows_bd, own)
            recons = lax.psum(parts, LATENT)
            recons["recon_bd"] += weights["b_dec_d"]
            if self.config.multi_topk:
                recons["recon_4k_bd"] += weights["b_dec_d"]
            fires_bk = values_bk > self.config.firing_threshold
            fired_l = jnp.zeros(own.bias_l.shape, jnp.int32)
            fired_l = fired_l.at[columns_bk].max(fires_bk.astype(jnp.int32))
            l0 = jnp.sum(fires_bk) / normed_bd.shape[0]
            counts = {
                "l0": lax.pmean(lax.psum(l0, LATENT), DATA),
                "n_resorted": lax.psum(n_resorted, (DATA, LATENT)),
            }
            return recons, lax.pmax(fired_l, DATA) > 0, counts

        placed = {"recon_bd": ROWS}
        if self.config.multi_topk:
            placed["recon_4k_bd"] = ROWS
        if self.config.prefixes:
            placed["groups_gbd"] = P(None, DATA, None)
        counted = {"l0": P(), "n_resorted": P()}
        mapped = self.on_shards(on_shard, (ROWS,), (placed, LATENTS, counted))
        return mapped(normed_bd)

    def _choose(
        self, rows_bd: jax.Array, own: dead_latents.Weights, k: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A shard's candidates for K: values, columns, and rows chosen for again."""
        choice = plan_choice(self.config, self.mesh, k)
        return topk.encode(
            rows_bd, own.w_enc_ld, own.bias_l, choice, self.dtype, self.kernels
        )

    def _reconstruct(
        self, rows_bd: jax.Array, own: dead_latents.Weights
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array], jax.Array]:
        """A shard's own values and columns [B, K], its parts of each x̂, n_resorted."""
        k_most = most_chosen(self.config)
        values_bk, columns_bk, n_resorted = self._choose(rows_bd, own, k_most)
        values_bk = nnx.relu(values_bk)
        ks = (k_most, self.k) if self.config.multi_topk else (self.k,)
        are_best = topk.are_best(values_bk, ks, LATENT, self.config.exchange)
        values_bk = jnp.where(are_best[0], values_bk, 0)

        def decode(values_bk: jax.Array) -> jax.Array:
            return sparse.decode(
                values_bk, columns_bk, own.w_dec_ld, self.dtype, self.kernels
            )

        parts = {}
        if self.config.multi_topk:
            parts["recon_4k_bd"] = decode(values_bk)
            # Candidates descend, so the K best of all shards come first in each.
            values_bk = jnp.where(are_best[1], values_bk, 0)[:, : self.k]
            columns_bk = columns_bk[:, : self.k]
        if self.config.prefixes:
            groups_gbk = matryoshka.split(self, values_bk, columns_bk)
            parts["groups_gbd"] = jnp.stack([decode(v) for v in groups_gbk])
            parts["recon_bd"] = jnp.sum(parts["groups_gbd"], axis=0)
        else:
            parts["recon_bd"] = decode(values_bk)
        return values_bk, columns_bk, parts, n_resorted


def plan_choice(config: SaeConfig, mesh: Mesh, k: int) -> topk.Choice:
    """How each latent shard of the mesh chooses; ValueError where it finds too few."""
    return topk.plan(
        k,
        config.n_latents,
        mesh.shape[LATENT],
        config.selection,
        config.recall_target,
        config.capacity_factor,
        mesh.devices.flat[0].platform,
    )
