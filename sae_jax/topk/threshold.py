"""The n-th largest of all values of a batch, on all shards, by counting.

Floats that are not negative order as their bit patterns do. So the n-th largest is the
largest pattern that at least n values reach, and its bits are found from the highest
down: one pass and one sum of a number over the mesh for each bit. No values move.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

_MOST = 2**30  # counts above this are known to float32 precision only


def nth_largest(values_bl: jax.Array, n: int, axes: str | Sequence[str]) -> jax.Array:
    """The n-th largest of the values, exactly, on every shard; 0 if there are fewer.

    Inside `jax.shard_map`; no gradient passes.

    Args:
        values_bl: this shard's, float32 or float64, none of them negative.
        n: at most 2**30.
        axes: mesh axes that the values are spread over.
    """
    if n > _MOST:
        raise ValueError(f"n = {n} is more than {_MOST}: give a smaller batch")
    width = 8 * values_bl.dtype.itemsize
    whole = jnp.dtype(f"int{width}")
    bits_bl = lax.bitcast_convert_type(lax.stop_gradient(values_bl), whole)

    def set_bit(i: jax.Array, reached: jax.Array) -> jax.Array:
        # The highest bit is the sign, and never set.
        candidate = reached | (jnp.ones((), whole) << (width - 2 - i).astype(whole))
        is_reached = _are_at_least(bits_bl >= candidate, n, axes)
        return jnp.where(is_reached, candidate, reached)

    reached = lax.fori_loop(0, width - 1, set_bit, jnp.zeros((), whole))
    return lax.bitcast_convert_type(reached, values_bl.dtype)


def _are_at_least(
    is_true_bl: jax.Array, n: int, axes: str | Sequence[str]
) -> jax.Array:
    """Whether n are true on all shards together, however many there are."""
    per_row_b = jnp.sum(is_true_bl, axis=1, dtype=jnp.int32)
    # Near n the sum of integers is exact; far above, it may have wrapped around.
    roughly = lax.psum(jnp.sum(per_row_b, dtype=jnp.float32), axes)
    exactly = lax.psum(jnp.sum(per_row_b, dtype=jnp.int32), axes)
    return (roughly > 1.5 * _MOST) | (exactly >= n)
