"""Sparse autoencoders of language-model activations in JAX.

    sae = sae_jax.load("run/")
    code = sae.encode(acts)      # acts [..., D]: K latents of each row
    recon = sae.decode(code)

Dimensions, everywhere: B rows in a batch, D model width, L latents, K chosen,
S latent shards, T tokens. Importing this package starts no JAX backend, and each name
is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {
    "EvaluateConfig": "evals",
    "SparseCode": "saes",
    "TrainConfig": "config",
    "evaluate": "evals",
    "load": "run",
    "load_subject": "subjects",
    "open_store": "store",
    "train": "loop",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'sae_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"sae_jax.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
