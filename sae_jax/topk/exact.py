"""Exact choice by `jax.lax.top_k`: values descend, ties go to the lowest index."""

import jax
from jax import lax


def choose(pre_bl: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The min(k, L) largest of each row and their columns: values, indices [B, K]."""
    values_bk, indices_bk = lax.top_k(pre_bl, min(k, pre_bl.shape[-1]))
    # On a CPU XLA sorts all of a row if it sees that a part of these is used.
    return lax.optimization_barrier(values_bk), lax.optimization_barrier(indices_bk)
