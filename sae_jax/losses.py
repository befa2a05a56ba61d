"""Loss terms and the errors that are reported, as pure functions of arrays.

    main = loss_scale * mean (x - x̂)^2,   loss_scale = 1 / mean (x - mean x)^2

`loss_scale` is measured once on a sample of normalised rows, so the main loss is the
normalised mean square error against predicting the data mean (Gao et al. 2024, A.2).
"""

import jax
import jax.numpy as jnp


def mean_square_error(recon_bd: jax.Array, target_bd: jax.Array) -> jax.Array:
    """Mean over all elements of (x̂ - x)^2."""
    return jnp.mean(jnp.square(recon_bd - target_bd))


def loss_scale(sample_bd: jax.Array) -> jax.Array:
    """1 / the mean square error of predicting the sample's mean."""
    return 1 / mean_square_error(sample_bd.mean(0), sample_bd)
