"""Sparse autoencoders of language-model activations in JAX.

    sae = sae_jax.load("run/")
    code = sae.encode(acts)      # acts [..., D]: K latents of each row
    recon = sae.decode(code)

Dimensions, everywhere: B rows in a batch, D model width, L latents, K chosen,
S latent shards, T tokens. Importing this package starts no JAX backend.
"""

from sae_jax.config import TrainConfig
from sae_jax.evals import EvaluateConfig, evaluate
from sae_jax.loop import train
from sae_jax.run import load
from sae_jax.saes import SparseCode
from sae_jax.store import open_store
from sae_jax.subjects import load_subject

__all__ = [
    "EvaluateConfig",
    "SparseCode",
    "TrainConfig",
    "evaluate",
    "load",
    "load_subject",
    "open_store",
    "train",
]
