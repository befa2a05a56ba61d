"""The JumpReLU SAE (Rajamanoharan et al. 2024, arXiv:2407.14435).

    pre = h + b_enc
    f   = ReLU(pre) where pre > θ, else 0
    L0  = sum_l 1[pre > θ]
    L   = nmse + λ mean_b L0          or   nmse + λ (mean_b L0 / target_l0 - 1)^2

Neither f nor L0 has a gradient in the threshold θ; straight-through ones come from a
rectangle of width ε (`bandwidth`) around it, K(u) = 1[|u| < 1/2], on pre-activations,
so that latents just below their threshold are trained too:

    df/dθ = -(θ/ε) K((pre - θ)/ε),     dL0/dθ = -(1/ε) K((pre - θ)/ε)

L0 has no gradient in pre. θ is a parameter itself, not its logarithm: a short run can
then move it far from its start; where it falls below 0 it counts as 0. Decoder rows
have unit norm; Adam with b1 = 0 is the paper's.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sae_jax.config import SaeConfig
from sae_jax.firing import Counters
from sae_jax.saes.base import Batch, DenseSae, Weights, new_bias, new_param
from sae_jax.saes.penalised import penalised_loss
from sae_jax.saes.tiles import Sums, sum_over_latents


@jax.custom_jvp
def jumprelu(pre_bl: jax.Array, threshold_l: jax.Array, bandwidth: float) -> jax.Array:
    """ReLU(pre) where pre is above the threshold, else 0."""
    return jnp.where(_is_active(pre_bl, threshold_l), pre_bl, 0)


@jumprelu.defjvp
def _jumprelu_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (pre_bl, threshold_l, bandwidth), (dpre_bl, dthreshold_l, _) = primals, tangents
    jump_l = nnx.relu(threshold_l) / bandwidth
    through_bl = jnp.where(_is_active(pre_bl, threshold_l), dpre_bl, 0)
    near_bl = _is_near(pre_bl, threshold_l, bandwidth)
    along_bl = through_bl - jnp.where(near_bl, jump_l * dthreshold_l, 0)
    return jumprelu(pre_bl, threshold_l, bandwidth), along_bl


@jax.custom_jvp
def step(pre_bl: jax.Array, threshold_l: jax.Array, bandwidth: float) -> jax.Array:
    """1 where pre is above the threshold, else 0: summed over latents, L0."""
    return _is_active(pre_bl, threshold_l).astype(pre_bl.dtype)


@step.defjvp
def _step_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (pre_bl, threshold_l, bandwidth), (_, dthreshold_l, _) = primals, tangents
    near_bl = _is_near(pre_bl, threshold_l, bandwidth)
    along_bl = -jnp.where(near_bl, dthreshold_l / bandwidth, 0)
    return step(pre_bl, threshold_l, bandwidth), along_bl


class JumpReluSae(DenseSae):
    """Learned thresholds and an L0 penalty."""

    def __init__(self, config: SaeConfig, *place: Any):
        super().__init__(config, *place)
        if config.use_b_enc:
            self.b_enc_l = new_bias(self.w_enc_ld)
        zero_l = jnp.zeros_like(self.w_enc_ld[:, 0])
        start_l = zero_l + config.initial_threshold
        self.threshold_l = new_param("threshold_l", start_l)

    @staticmethod
    def unit_norm(config: SaeConfig) -> tuple[str, ...]:
        return ("w_dec_ld",)

    def activate(self, h_bl: jax.Array, weights: Weights) -> jax.Array:
        pre_bl = h_bl + weights.get("b_enc_l", 0)
        return jumprelu(pre_bl, weights["threshold_l"], self.config.bandwidth)

    def loss(
        self, batch: Batch, counters: Counters
    ) -> tuple[jax.Array, dict[str, Any]]:
        normed_bd, targets_bd = self.normalize_batch(batch)
        sums, fired_l = sum_over_latents(self, self._on_tile, normed_bd)
        penalty = jnp.mean(sums["penalty"])
        if self.config.target_l0 is not None:
            penalty = jnp.square(penalty / self.config.target_l0 - 1)
        return penalised_loss(self, sums, fired_l, targets_bd, counters, penalty)

    def _on_tile(
        self, normed_bd: jax.Array, weights: Weights
    ) -> tuple[Sums, jax.Array]:
        h_bl = self.project(normed_bd, weights)
        code_bl = self.activate(h_bl, weights)
        pre_bl = h_bl + weights.get("b_enc_l", 0)
        step_bl = step(pre_bl, weights["threshold_l"], self.config.bandwidth)
        sums = {
            "recon_bd": self.decode_part(code_bl, weights),
            "penalty": jnp.sum(step_bl, axis=1),
        }
        return sums, code_bl > self.config.firing_threshold


def _is_active(pre_bl: jax.Array, threshold_l: jax.Array) -> jax.Array:
    return pre_bl > nnx.relu(threshold_l)


def _is_near(
    pre_bl: jax.Array, threshold_l: jax.Array, bandwidth: float
) -> jax.Array:
    return jnp.abs(pre_bl - threshold_l) < bandwidth / 2
