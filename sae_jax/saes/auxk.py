"""AuxK: dead latents explain what live ones leave over (Gao et al. 2024, A.2).

    e = x - x̂, held constant
    z = ReLU(the k_aux largest pre-activations of dead latents)
    AuxK = |e - z W_dec|^2 / |e - mean e|^2

The mean and both sums are over the whole batch: the residual shrinks during training.
b_dec is not added, as e no longer contains it. Where no latent is dead, or where e does
not vary by more than the rounding of x, AuxK is exactly 0 and trains nothing.

Live latents are left out altogether, so that no place is lost to them. A dead latent
that is chosen with a negative pre-activation adds nothing and learns nothing, as in the
paper: it has to wait for a row on which it is positive. Which latents are dead is
decided before the step.

AuxK is no part of what JAX differentiates: it needs e of all rows first, and its
gradients are added to those of the main loss in place (`sae_jax.dead_latents`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from sae_jax import dead_latents
from sae_jax.config import k_aux, subtracts_b_dec
from sae_jax.dead_latents import Gradients
from sae_jax.firing import Counters
from sae_jax.mesh import DATA, LATENT, param_spec
from sae_jax.saes.base import LATENTS, ROWS, Sae, Weights


def own_weights(
    sae: Sae, normed_bd: jax.Array, weights: Weights
) -> tuple[jax.Array, dead_latents.Weights]:
    """What the encoder multiplies, and the weights of a shard; b_enc is in the bias.

    All vary over the whole mesh.
    """
    rows_bd, w_enc_ld, bias_l = sae.encoder(normed_bd, weights)
    if "b_enc_l" in weights:
        bias_l += weights["b_enc_l"]
    return rows_bd, dead_latents.Weights(w_enc_ld, bias_l, weights["w_dec_ld"])


def add_gradients(
    sae: Sae,
    gradients: Weights,
    normed_bd: jax.Array,
    residual_bd: jax.Array,
    counters: Counters,
) -> tuple[Weights, jax.Array]:
    """The gradients with those of AuxK, times its coefficient, added; and AuxK.

    Args:
        sae: the SAE; if its choice is weighted by norm, with weights that are weighted.
        gradients: of its weights, from the main loss; they are given up.
        normed_bd: the batch's rows in the SAE's space.
        residual_bd: e of these rows.
        counters: say which latents are dead, and how much rows vary.
    """
    power = jnp.sum(jnp.square(residual_bd - residual_bd.mean(0)))
    rounding = jnp.square(jnp.finfo(residual_bd.dtype).eps) / counters.loss_scale
    is_residual = power > residual_bd.size * rounding  # False of a NaN
    is_defined = jnp.any(counters.is_dead_l) & is_residual
    power = jnp.where(is_defined, power, 1)
    scale = jnp.where(is_defined, sae.config.aux_coefficient / power, 0)
    before = Gradients(
        gradients["w_enc_ld"],
        jnp.zeros_like(gradients["w_enc_ld"][:, 0]),
        gradients["w_dec_ld"],
        jnp.zeros_like(gradients["b_dec_d"]),
    )
    after, total = _on_shards(sae)(
        normed_bd, residual_bd, counters.is_dead_l, scale, before
    )
    new = gradients | {"w_enc_ld": after.w_enc_ld, "w_dec_ld": after.w_dec_ld}
    if "b_enc_l" in gradients:
        new["b_enc_l"] = gradients["b_enc_l"] + after.bias_l
    if subtracts_b_dec(sae.config):
        new["b_dec_d"] = gradients["b_dec_d"] - after.shift_d
    return new, jnp.where(is_defined & jnp.isfinite(total), total / power, 0)


def _on_shards(sae: Sae) -> Callable[..., Any]:
    """`dead_latents.add_gradients` of (rows, e, is_dead_l, scale, gradients)."""

    def on_shard(*args: Any) -> tuple[Gradients, jax.Array]:
        normed_bd, residual_bd, is_dead_l, scale, gradients, weights = args
        rows_bd, own = own_weights(sae, normed_bd, weights)
        fixed = is_dead_l, scale, k_aux(sae.config, sae.d_model), LATENT, sae.dtype

        def add(gradients: Gradients) -> tuple[Gradients, jax.Array]:
            added, total = dead_latents.add_gradients(
                gradients, rows_bd, residual_bd, own, *fixed
            )
            return added._replace(shift_d=lax.psum(added.shift_d, LATENT)), total

        def add_over_data(_: Any, done: tuple) -> tuple[Gradients, jax.Array]:
            is_first = lax.axis_index(DATA) == 0
            once = jax.tree.map(lambda g: jnp.where(is_first, g, 0), done[0])
            return lax.psum(add(once), DATA)

        if sae.mesh.shape[DATA] == 1:
            return add(gradients)
        # Once, or not at all: gradients are not moved for nothing. A loop, unlike
        # `lax.cond`, works in place.
        nothing = gradients, jnp.zeros_like(residual_bd, shape=())
        return lax.fori_loop(0, (scale > 0).astype(jnp.int32), add_over_data, nothing)

    placed: Any = Gradients(*map(param_spec, Gradients._fields))  # type: ignore
    in_specs = ROWS, ROWS, LATENTS, P(), placed
    # The sums are the same on all shards, which the checker of replication cannot see.
    return sae.on_shards(on_shard, in_specs, (placed, P()), check_vma=False)
