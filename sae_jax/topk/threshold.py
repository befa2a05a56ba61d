"""The n-th largest of many values, on all shards, by counting.

Floats that are not negative order as their bit patterns do. So the n-th largest is the
largest pattern that at least n values reach, and its bits are found from the highest
down, two at a time: one pass over the values, which counts for three patterns, and one
sum of counts over the mesh. No values move.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

_MOST = 2**30  # counts above this are known to float32 precision only
_AT_ONCE = 2  # bits


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

    def are_reached(patterns_p: jax.Array) -> jax.Array:
        patterns_pb = jnp.broadcast_to(patterns_p[:, None], (*patterns_p.shape, n_rows))
        return _are_at_least(count_reaching(bits_bl, patterns_pb), n, axes)

    n_rows = bits_bl.shape[0]
    bits = find_largest(are_reached, jnp.zeros((), bits_bl.dtype))
    return lax.bitcast_convert_type(bits, values_bl.dtype)


def find_largest(
    are_reached: Callable[[jax.Array], jax.Array],
    zeros: jax.Array,
    is_wanted: ArrayLike = True,
) -> jax.Array:
    """The bits of the largest float, of each element, that is reached.

    Args:
        are_reached: tells of patterns [P, *zeros.shape] which are reached: whenever one
            is, all that are smaller must be.
        zeros: int32 or int64, the answer where nothing above it is reached.
        is_wanted: False leaves it at that, without a pass.
    """
    n_bits = 8 * zeros.dtype.itemsize - 1  # the highest is the sign, and never set
    digits = jnp.arange(1, 2**_AT_ONCE, dtype=zeros.dtype)
    digits = digits.reshape(-1, *(1,) * zeros.ndim)

    def set_bits(i: jax.Array, bits: jax.Array) -> jax.Array:
        # The last time, a bit that is known is asked for again.
        shift = jnp.maximum(n_bits - _AT_ONCE * (i + 1), 0).astype(zeros.dtype)
        digit = jnp.sum(are_reached(bits + (digits << shift)), 0, dtype=zeros.dtype)
        return bits + (digit << shift)

    n_passes = jnp.where(is_wanted, -(-n_bits // _AT_ONCE), 0)
    return lax.fori_loop(0, n_passes, set_bits, zeros)


def count_reaching(bits_bl: jax.Array, patterns_pb: jax.Array) -> jax.Array:
    """How many of each row are at least as large as its patterns: [P, B] int32."""
    reach = [(bits_bl >= p_b[:, None]).astype(jnp.int32) for p_b in patterns_pb]
    # One reduction of all: several would read the rows as often.
    counts = lax.reduce(
        reach, [jnp.int32(0)] * len(reach), lambda a, b: list(map(jnp.add, a, b)), (1,)
    )
    return jnp.stack(counts)


def as_bits(values: jax.Array) -> jax.Array:
    """Integers that order as these floats do, none of which may be negative."""
    return lax.bitcast_convert_type(values, jnp.dtype(f"int{8 * values.itemsize}"))


def _are_at_least(
    counts_pb: jax.Array, n: int, axes: str | Sequence[str]
) -> jax.Array:
    """Whether rows and shards together have n, however many they have: bool [P]."""
    # Near n the sum of integers is exact; far above, it may have wrapped around.
    roughly_p = lax.psum(jnp.sum(counts_pb, axis=1, dtype=jnp.float32), axes)
    exactly_p = lax.psum(jnp.sum(counts_pb, axis=1, dtype=jnp.int32), axes)
    return (roughly_p > 1.5 * _MOST) | (exactly_p >= n)
