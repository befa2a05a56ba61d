"""Which buckets: the cheapest two-stage choice that reaches its recall.

For `bucketed`, the fewest candidates n_buckets * kept whose expected recall
(`topk.recall`) is at least the target. For `exact`, the fewest for which few rows have
to be chosen for again: a row may need it where a bucket holds more than `kept` of the
K. Small dictionaries, and a K that buckets do not pay for, are sorted whole, and have
no buckets.

A latent shard that may hand over fewer than K candidates (`capacity_factor`) loses some
of them too. The expected recall is that of both together: the share that the buckets of
all shards find, times the share that the shards can hand over.
"""

import dataclasses
import math
from collections.abc import Callable

from sae_jax.topk.recall import bucketed_recall, crowded_rows, shard_capacity

_MOST_KEPT = 4
_LEAST_BUCKETS = 128  # the lanes of a TPU's vector
_LEAST_BUCKET_SIZE = 8  # below, sorting all latents is as fast
_AGAIN = 1 / 128  # of all rows, that the exact method may expect to choose for twice

# Rows and latents of a tile: on a CPU it has to stay in cache, elsewhere it bounds
# memory, at 256 MiB.
_CPU_TILE = (1024, 2048)
_LARGE_TILE = (8192, 8192)


@dataclasses.dataclass(frozen=True)
class Choice:
    """How every latent shard chooses its candidates."""

    method: str
    k: int  # candidates of a shard
    n_buckets: int  # of a shard; 0: all its latents are sorted
    kept: int  # of each bucket
    tile_rows: int
    tile_latents: int  # a multiple of n_buckets
    n_latents: int  # of all shards together
    recall_target: float  # of what a shard hands over, for `approx`
    recall: float  # expected, of the whole choice


def plan(
    k: int,
    n_latents: int,
    n_shards: int = 1,
    method: str = "exact",
    recall_target: float = 0.99,
    capacity_factor: float | None = None,
    platform: str = "cpu",
) -> Choice:
    """How K of L latents on S latent shards are chosen.

    ValueError, with both numbers, where the expected recall is below the target.
    """
    n_own = n_latents // n_shards
    k_in, handed_over = min(k, n_own), 1.0
    if capacity_factor is not None:
        k_in = min(k_in, shard_capacity(k, n_shards, capacity_factor))
        handed_over = bucketed_recall(n_latents, k, n_shards, k_in)

    def found(n_buckets: int, kept: int) -> float:
        return bucketed_recall(n_latents, k, n_buckets * n_shards, kept)

    n_buckets, kept, asked, recall = 0, 0, recall_target, handed_over
    if method == "exact":
        n_buckets, kept = _fewest(
            n_own, k_in, lambda *buckets: crowded_rows(n_own, k_in, *buckets) <= _AGAIN
        )
    elif method == "bucketed":
        n_buckets, kept = _fewest(
            n_own, k_in, lambda *buckets: handed_over * found(*buckets) >= recall_target
        )
        recall *= found(n_buckets, kept) if n_buckets else 1
    elif platform == "tpu" and handed_over >= recall_target:
        # Elsewhere `approx` is exact. Both losses together may reach the target.
        asked, recall = recall_target / handed_over, recall_target
    if capacity_factor is not None and recall < recall_target:
        least = _least_factor(k, n_latents, n_shards, recall_target)
        raise ValueError(
            f"the expected recall of sae.selection = {method!r} with "
            f"sae.capacity_factor = {capacity_factor} on {n_shards} latent shards is "
            f"{recall:.4f}, below sae.recall_target = {recall_target}: raise the "
            f"factor to {least:g} or more, or lower the target"
        )
    tile_rows, tile_latents = _CPU_TILE if platform == "cpu" else _LARGE_TILE
    return Choice(
        method=method,
        k=k_in,
        n_buckets=n_buckets,
        kept=kept,
        tile_rows=tile_rows,
        tile_latents=_fit(tile_latents, k_in, n_own, n_buckets or 1),
        n_latents=n_latents,
        recall_target=asked,
        recall=recall,
    )


def _least_factor(k: int, n_latents: int, n_shards: int, target: float) -> float:
    """The capacity factor, rounded up, from which the shards hand over enough."""
    for kept in range(1, k):
        if bucketed_recall(n_latents, k, n_shards, kept) >= target:
            return math.ceil(1000 * kept * n_shards / k) / 1000
    return n_shards


def _fewest(
    n_own: int, k: int, is_enough: Callable[[int, int], bool]
) -> tuple[int, int]:
    """n_buckets and kept of the fewest candidates that are enough; (0, 0) if none."""
    options = []
    for kept in range(1, _MOST_KEPT + 1):
        n_buckets = _LEAST_BUCKETS
        while n_own >= _LEAST_BUCKET_SIZE * kept * n_buckets:
            if n_buckets * kept >= 2 * k and is_enough(n_buckets, kept):
                options.append((n_buckets * kept, kept, n_buckets))
                break
            n_buckets *= 2
    if not options:
        return 0, 0
    _, kept, n_buckets = min(options)
    return n_buckets, kept


def _fit(tile: int, k: int, n_own: int, unit: int) -> int:
    """About `tile` latents, K at least, in equal tiles that are a multiple of unit."""
    size = max(k, -(-n_own // -(-n_own // tile)))
    return min(-(-size // unit) * unit, n_own // unit * unit)
