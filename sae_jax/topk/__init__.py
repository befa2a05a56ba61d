"""Choosing the K largest pre-activations of each row.

One file a method, `merge` for latents that are partitioned over devices, `threshold`
for one choice over a whole batch, `recall` for how much an approximate choice finds.
"""

from sae_jax.topk.exact import choose
from sae_jax.topk.merge import choose_own, merge_codes, rank_global
from sae_jax.topk.recall import bucketed_recall, shard_capacity, sharded_recall
from sae_jax.topk.threshold import nth_largest

__all__ = [
    "bucketed_recall",
    "choose",
    "choose_own",
    "merge_codes",
    "nth_largest",
    "rank_global",
    "shard_capacity",
    "sharded_recall",
]
