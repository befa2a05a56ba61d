"""Dense products whose factors are of one compute dtype, in both directions.

    y = a b        da = g b^T        db = a^T g

Every factor, g too, is rounded to the compute dtype, and every product is accumulated
and returned in float32 (float64 where the factors are). Left to itself, the backward
pass of a bfloat16 product multiplies float32 factors, at a fraction of the speed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(a: jax.Array, b: jax.Array, dtype: DTypeLike) -> jax.Array:
    """a [m, n] times b [n, p] with factors of `dtype`.

    Inside `jax.shard_map` both must vary over the same mesh axes.
    """
    return _multiply(a.astype(dtype), b.astype(dtype))


def _forward(a: jax.Array, b: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, Any]:
    a, b = a.astype(dtype), b.astype(dtype)
    return _multiply(a, b), (a, b)


def _backward(
    dtype: DTypeLike, factors: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    a, b = factors
    g = g.astype(dtype)
    return _multiply(g, b.T), _multiply(a.T, g)


def _multiply(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(
        a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32)
    )


matmul.defvjp(_forward, _backward)
