"""Architectures, one file each, behind one interface.

An architecture is an `nnx.Module` that holds parameters with their placement and
offers `encode`, `decode`, `encode_dense` and `loss(batch, counters)`
(`sae_jax.saes.base`); the training step knows nothing else about it. `ARCHITECTURES`
maps `sae.architecture` to its class.
"""

from sae_jax.saes.base import Sae
from sae_jax.saes.batch_topk import BatchTopKSae
from sae_jax.saes.code import SparseCode
from sae_jax.saes.fixed_threshold import fit_threshold, with_fixed_threshold
from sae_jax.saes.gated import GatedSae
from sae_jax.saes.jumprelu import JumpReluSae
from sae_jax.saes.prolu import ProluSae
from sae_jax.saes.relu import ReluSae
from sae_jax.saes.relu_decoder_norm import ReluDecoderNormSae
from sae_jax.saes.topk import TopKSae

ARCHITECTURES: dict[str, type[Sae]] = {
    "topk": TopKSae,
    "batch_topk": BatchTopKSae,
    "relu": ReluSae,
    "relu_decoder_norm": ReluDecoderNormSae,
    "prolu": ProluSae,
    "gated": GatedSae,
    "jumprelu": JumpReluSae,
}

__all__ = [
    "ARCHITECTURES",
    "BatchTopKSae",
    "GatedSae",
    "JumpReluSae",
    "ProluSae",
    "ReluDecoderNormSae",
    "ReluSae",
    "Sae",
    "SparseCode",
    "TopKSae",
    "fit_threshold",
    "with_fixed_threshold",
]
