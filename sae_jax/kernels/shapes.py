"""What every kernel asks of its arguments, and how it declares its results."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import ManualAxisType
from jax.typing import DTypeLike

MOST_KEPT = 4  # levels that a kernel holds per bucket

Ref = Any  # an array in memory that a kernel reads or writes


class Refused(ValueError):
    """A kernel does not take these shapes or dtypes, which plain JAX does."""


def check_candidates(
    x_bd: jax.Array, w_ld: jax.Array, bias_l: jax.Array, n_buckets: int, kept: int
) -> None:
    """ValueError unless the arguments of `bucket_candidates` fit together."""
    if x_bd.shape[1] != w_ld.shape[1] or w_ld.shape[:1] != bias_l.shape:
        raise ValueError(
            f"rows {x_bd.shape}, encoder {w_ld.shape} and bias {bias_l.shape} do not "
            "fit: pass [B, D], [L, D] and [L]"
        )
    if x_bd.dtype != w_ld.dtype:
        raise ValueError(
            f"rows are {x_bd.dtype} and the encoder is {w_ld.dtype}: cast both to the "
            "compute dtype"
        )
    if not 1 <= kept <= MOST_KEPT:
        raise Refused(f"kept is {kept}: choose from 1 to {MOST_KEPT}")
    if n_buckets < 1:
        raise ValueError(f"n_buckets is {n_buckets}: choose at least 1")


def product_precision(dtype: DTypeLike) -> lax.Precision:
    """Full float32 for float32 factors; narrower ones are multiplied as they are."""
    is_float32 = jnp.dtype(dtype) == jnp.float32
    return lax.Precision.HIGHEST if is_float32 else lax.Precision.DEFAULT


def declare(
    shape: tuple[int, ...], dtype: DTypeLike, *inputs: jax.Array
) -> jax.ShapeDtypeStruct:
    """A result that varies over every mesh axis that one of the inputs varies over.

    `jax.shard_map` checks this, and cannot see it through a kernel. Refused where an
    input is wider than the float32 that kernels sum in.
    """
    for x in inputs:
        if x.dtype.itemsize > 4:
            raise Refused(f"an array is {x.dtype}: cast it to float32")
    axes = [jax.typeof(x).manual_axis_type.varying for x in inputs]
    varying = ManualAxisType(varying=frozenset().union(*axes))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)
