"""A checksum of an array's bits that is the same on every mesh.

    sum of mix(bits + c1 row + c2 column)   over all elements, modulo 2^32

`mix` is one to one, so any change of one element shows; others, also of places, do but
for one chance in 2^32. Whole numbers add up alike in every order.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

_ROW, _COLUMN = 0x9E3779B1, 0x85EBCA77  # odd, with bits all over
_CHUNK_SIZE = 2**19  # elements that are summed at a time: they stay in cache


def sum_bits(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The checksum, uint32, on every device; to be called inside `jax.jit`.

    Args:
        array: elements of 32 bits.
        sharding: where they live; rows alone are spread.
    """
    axes = next(iter(sharding.spec), None)

    def add_up(part: jax.Array) -> jax.Array:
        first = lax.axis_index(axes) * len(part) if axes else 0
        total = _sum_rows(part, first)
        return lax.psum(total, axes) if axes else total

    return jax.shard_map(
        add_up, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=PartitionSpec()
    )(array)


def _sum_rows(array: jax.Array, first: jax.Array | int) -> jax.Array:
    """The sum over an array whose rows begin with the row `first` of the whole.

    Some rows at a time: on a CPU all mixed bits would be written to memory first.
    """
    array = jnp.atleast_1d(array)
    n_rows = len(array)
    rows = min(n_rows, max(1, _CHUNK_SIZE * n_rows // array.size))

    def add(start: jax.Array | int, size: int) -> jax.Array:
        part = lax.dynamic_slice_in_dim(array, start, size)
        return jnp.sum(_mix(part, first + start), dtype=jnp.uint32)

    n_chunks, n_left = divmod(n_rows, rows)
    zero = jnp.full_like(array, 0, dtype=jnp.uint32, shape=())
    total = lax.fori_loop(0, n_chunks, lambda i, t: t + add(i * rows, rows), zero)
    return total + add(n_rows - n_left, n_left) if n_left else total


def _mix(array: jax.Array, first: jax.Array | int) -> jax.Array:
    """The bits with their places, by the last part of MurmurHash3."""
    bits = lax.bitcast_convert_type(array, jnp.uint32).reshape(len(array), -1)
    rows, columns = (lax.broadcasted_iota(jnp.uint32, bits.shape, i) for i in (0, 1))
    rows += jnp.asarray(first, jnp.uint32)
    bits += rows * jnp.uint32(_ROW) + columns * jnp.uint32(_COLUMN)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
