"""The n-th largest of many values, on all shards, by counting.

Floats that are not negative order as their bit patterns do. So the n-th largest is the
largest pattern that at least n values reach, and its bits are found from the highest
down: one pass and one sum of counts over the mesh for each bit. No values move.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

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
    bits_bl = as_bits(lax.stop_gradient(values_bl))
    bits = find_largest(
        lambda bits: _are_at_least(bits_bl >= bits, n, axes),
        jnp.zeros((), bits_bl.dtype),
    )
    return lax.bitcast_convert_type(bits, values_bl.dtype)


def find_largest(
    is_reached: Callable[[jax.Array], jax.Array],
    zeros: jax.Array,
    is_wanted: ArrayLike = True,
) -> jax.Array:
    """The bits of the largest float, of each element, that is reached.

    Args:
        is_reached: tells for candidates, like `zeros`, which are reached: whenever one
            is, all that are smaller must be.
        zeros: int32 or int64, the answer where nothing above it is reached.
        is_wanted: False leaves it at that, without a pass.
    """
    one, highest = jnp.ones((), zeros.dtype), 8 * zeros.dtype.itemsize - 2

    def set_bit(i: jax.Array, bits: jax.Array) -> jax.Array:
        # The bit above the highest is the sign, and never set.
        more = bits | (one << (highest - i).astype(zeros.dtype))
        return jnp.where(is_reached(more), more, bits)

    n_bits = jnp.where(is_wanted, highest + 1, 0)
    return lax.fori_loop(0, n_bits, set_bit, zeros)


def as_bits(values: jax.Array) -> jax.Array:
    """Integers that order as these floats do, none of which may be negative."""
    return lax.bitcast_convert_type(values, jnp.dtype(f"int{8 * values.itemsize}"))


def _are_at_least(
    is_true_bl: jax.Array, n: int, axes: str | Sequence[str]
) -> jax.Array:
    """Whether n are true on all shards together, however many there are."""
    per_row_b = jnp.sum(is_true_bl, axis=1, dtype=jnp.int32)
    # Near n the sum of integers is exact; far above, it may have wrapped around.
    roughly = lax.psum(jnp.sum(per_row_b, dtype=jnp.float32), axes)
    exactly = lax.psum(jnp.sum(per_row_b, dtype=jnp.int32), axes)
    return (roughly > 1.5 * _MOST) | (exactly >= n)
