"""The geometric median: the point with the least sum of distances to all rows.

    m <- sum_b x_b / |x_b - m|  /  sum_b 1 / |x_b - m|        (Weiszfeld's iteration)

started at the mean. The decoder bias starts there: unlike the mean it is not pulled
away by the few rows of huge norm that language models produce (Gao et al. 2024, A.1).
"""

import jax
import jax.numpy as jnp

_STEPS = 100
_LEAST_DISTANCE = 1e-10  # a row on the median itself must not divide by zero


def geometric_median(rows_bd: jax.Array) -> jax.Array:
    """The geometric median [D] of the rows."""

    def refine(_: jax.Array, median_d: jax.Array) -> jax.Array:
        distances_b = jnp.linalg.norm(rows_bd - median_d, axis=-1)
        weights_b = 1 / jnp.maximum(distances_b, _LEAST_DISTANCE)
        return weights_b @ rows_bd / weights_b.sum()

    return jax.lax.fori_loop(0, _STEPS, refine, rows_bd.mean(0))
