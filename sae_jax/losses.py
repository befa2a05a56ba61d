"""Loss terms and the errors that are reported, as pure functions of arrays.

    main  = loss_scale * mean (x - x̂)^2,   loss_scale = 1 / mean (x - mean x)^2
    AuxK  = sum (e - ê)^2 / sum (e - mean e)^2,   e = x - x̂ with its gradient stopped

`loss_scale` is measured once on a sample of normalised rows, so the main loss is the
normalised mean square error against predicting the data mean. AuxK's denominator is
measured on every batch, for the residual shrinks during training; ê is decoded from
dead latents alone, without b_dec, which e no longer contains (Gao et al. 2024, A.2).
"""

import jax
import jax.numpy as jnp


def mean_square_error(recon_bd: jax.Array, target_bd: jax.Array) -> jax.Array:
    """Mean over all elements of (x̂ - x)^2."""
    return jnp.mean(jnp.square(recon_bd - target_bd))


def loss_scale(sample_bd: jax.Array) -> jax.Array:
    """1 / the mean square error of predicting the sample's mean."""
    return 1 / mean_square_error(sample_bd.mean(0), sample_bd)


def aux_loss(
    residual_bd: jax.Array, aux_recon_bd: jax.Array, is_any_dead: jax.Array
) -> jax.Array:
    """AuxK: how much of the residual the dead latents do not explain.

    Exactly 0, with zero gradient, when no latent is dead, and when the quotient is
    not a finite number (a residual without variance, an overflow).
    """
    residual_bd = jax.lax.stop_gradient(residual_bd)
    error_bd = residual_bd - aux_recon_bd
    power = jnp.sum(jnp.square(residual_bd - residual_bd.mean(0)))
    is_defined = is_any_dead & jnp.isfinite(jnp.sum(jnp.square(error_bd)) / power)
    # Chosen before the quotient, so that no NaN is on the way of a gradient.
    error_bd = jnp.where(is_defined, error_bd, 0)
    return jnp.sum(jnp.square(error_bd)) / jnp.where(is_defined, power, 1)
