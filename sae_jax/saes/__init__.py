"""Architectures, one file each, behind one interface.

An architecture is an `nnx.Module` that holds parameters with their placement and
offers `encode`, `decode`, `encode_dense` and `loss(batch, counters)`; the training step
knows nothing else about it. `ARCHITECTURES` maps `sae.architecture` to its class.
"""

from sae_jax.saes.code import SparseCode
from sae_jax.saes.topk import TopKSae

ARCHITECTURES = {"topk": TopKSae}

__all__ = ["ARCHITECTURES", "SparseCode", "TopKSae"]
