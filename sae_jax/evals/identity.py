"""What tells one SAE from another, on every mesh, and one file from another."""

import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from sae_jax.checksum import sum_bits
from sae_jax.evals.context import Sae


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
    weights, specs = sae.weights()
    return {
        name: sum_bits(weight.astype(jnp.float32), NamedSharding(sae.mesh, specs[name]))
        for name, weight in weights.items()
    }
