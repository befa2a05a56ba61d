"""Choosing the K largest pre-activations of each row.

`encoder` is what training uses: encoder and choice in one pass, by the method and the
buckets of `plan`. `exact` and `bucketed` are the choice itself, `recall` says how much
an approximate one finds, `merge` chooses among latents that are partitioned over
devices, and `threshold` once for a whole batch.
"""

from sae_jax.topk.encoder import encode
from sae_jax.topk.exact import choose
from sae_jax.topk.merge import are_best, merge_codes
from sae_jax.topk.plan import Choice, plan
from sae_jax.topk.recall import bucketed_recall, shard_capacity, sharded_recall
from sae_jax.topk.threshold import nth_largest

__all__ = [
    "Choice",
    "are_best",
    "bucketed_recall",
    "choose",
    "encode",
    "merge_codes",
    "nth_largest",
    "plan",
    "shard_capacity",
    "sharded_recall",
]
