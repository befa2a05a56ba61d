"""Keeping the best few of a stream."""

import jax
import jax.numpy as jnp

Best = list[tuple[jax.Array, jax.Array]]  # values and indices, the best first


def insert(best: Best, values: jax.Array, indices: jax.Array) -> Best:
    """`best` of what it has seen and of one more value a place.

    Of equal values the one seen first stays above: NaN and -inf never enter.
    """
    is_above = [values > kept for kept, _ in best]
    after = []
    for level, (kept, kept_indices) in enumerate(best):
        # What enters this level: the new value, or what it pushed out from above.
        entering, entering_indices = values, indices
        if level:
            above, above_indices = best[level - 1]
            entering = jnp.where(is_above[level - 1], above, values)
            entering_indices = jnp.where(is_above[level - 1], above_indices, indices)
        after.append(
            (
                jnp.where(is_above[level], entering, kept),
                jnp.where(is_above[level], entering_indices, kept_indices),
            )
        )
    return after
