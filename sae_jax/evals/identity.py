"""What tells one SAE from another, and one file from another.

The bits of all weights, each times a number that depends on its place, are summed as
whole numbers modulo 2^32: alike in every order of summing, so on every mesh.
"""

import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax.evals.context import Sae

_FIRST, _SECOND = 0x9E3779B1, 0x85EBCA77  # odd, with bits all over


def identify(sae: Sae) -> str:
    """16 hex digits of the SAE's weights, settings and normalisation."""
    sums = {name: int(total) for name, total in jax.device_get(_sum_bits(sae)).items()}
    described = (sorted(sums.items()), repr(sae.config), repr(sae.normalization))
    return hashlib.sha256(repr(described).encode()).hexdigest()[:16]


def identify_file(path: str | Path) -> str:
    """16 hex digits of the file's contents."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


@jax.jit
def _sum_bits(sae: Sae) -> dict[str, jax.Array]:
    return {name: _sum(weight) for name, weight in sae.weights()[0].items()}


def _sum(weight: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(weight.astype(jnp.float32), jnp.uint32)
    bits = bits.reshape(bits.shape[0] if bits.ndim else 1, -1)
    rows, columns = (lax.broadcasted_iota(jnp.uint32, bits.shape, i) for i in (0, 1))
    factors = (rows * jnp.uint32(_FIRST) + columns * jnp.uint32(_SECOND)) | 1
    return jnp.sum(bits * factors, dtype=jnp.uint32)
