"""Choosing the K largest pre-activations of each row.

One file a method, and `merge` for latents that are partitioned over devices.
"""

from sae_jax.topk.exact import choose
from sae_jax.topk.merge import keep_global, merge_codes

__all__ = ["choose", "keep_global", "merge_codes"]
