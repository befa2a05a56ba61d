"""How many of the K largest an approximate choice finds, on average.

Two-stage choice cuts the L latents into buckets of m = L / n_buckets, keeps the `kept`
largest of each, and takes the K largest of these. If the K winners are placed over the
buckets at random, one bucket holds R of them, with

    P(R = r) = C(K, r) C(L - K, m - r) / C(L, m)                  (hypergeometric)
    recall   = 1 - n_buckets / K * E[max(R - kept, 0)]

(Samaga et al. 2025, arXiv 2506.04165). A latent shard that hands over only a few
candidates is a bucket. Where latents that fire together lie together, as after sorting
by frequency, contiguous buckets find fewer than this; interleaved ones need not.
"""

import numpy as np
from numpy.typing import NDArray


def bucketed_recall(n_latents: int, k: int, n_buckets: int, kept: int) -> float:
    """Expected part of the K largest that is found; exactly 1 if none can be lost.

    Where the buckets do not divide the latents, some hold one latent more.
    ValueError unless 1 <= k <= n_latents, 1 <= n_buckets <= n_latents and kept >= 1.
    """
    if not 1 <= k <= n_latents:
        raise ValueError(f"k is {k}: choose from 1 to the {n_latents} latents")
    if not 1 <= n_buckets <= n_latents:
        raise ValueError(
            f"n_buckets is {n_buckets}: choose from 1 to the {n_latents} latents"
        )
    if kept < 1:
        raise ValueError(f"kept is {kept}: keep at least 1 latent of each bucket")

    def lost(size: int) -> float:
        winners_r, probability_r = _winners_in_bucket(n_latents, k, size)
        return float(np.maximum(winners_r - kept, 0) @ probability_r)

    size, n_larger = divmod(n_latents, n_buckets)
    all_lost = (n_buckets - n_larger) * lost(size)
    all_lost += n_larger * lost(size + 1) if n_larger else 0
    return 1 - all_lost / k


def crowded_rows(n_latents: int, k: int, n_buckets: int, kept: int) -> float:
    """Part of the rows, at most, in which a bucket holds more than `kept` winners."""
    size = -(-n_latents // n_buckets)
    winners_r, probability_r = _winners_in_bucket(n_latents, k, size)
    return float(n_buckets * probability_r[winners_r > kept].sum())


def sharded_recall(
    n_latents: int, k: int, n_shards: int, capacity_factor: float
) -> float:
    """`bucketed_recall` of latent shards that hand over `shard_capacity` candidates."""
    kept = shard_capacity(k, n_shards, capacity_factor)
    return bucketed_recall(n_latents, k, n_shards, kept)


def shard_capacity(k: int, n_shards: int, capacity_factor: float) -> int:
    """Candidates per latent shard: K * capacity_factor / S, rounded down, at most K.

    This is the rule of OpenAI's released code. ValueError where it would give none.
    """
    capacity = int(k * capacity_factor // n_shards)
    if capacity < 1:
        raise ValueError(
            f"k * capacity_factor = {k} * {capacity_factor} gives none of the "
            f"{n_shards} latent shards a candidate: raise capacity_factor, or use "
            "fewer latent shards"
        )
    return min(k, capacity)


def _winners_in_bucket(
    n_latents: int, k: int, size: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The possible counts of winners in one bucket, and their probabilities.

    Built from the ratios P(r + 1) / P(r), in logs, and then made to sum to 1: this
    keeps the digits that differences of log-gammas of large numbers lose.
    """
    r = np.arange(max(0, k + size - n_latents), min(k, size) + 1)
    before = r[:-1]
    log_ratios = np.log(k - before) + np.log(size - before)
    log_ratios -= np.log(before + 1) + np.log(n_latents - k - size + before + 1)
    log_weight_r = np.concatenate([[0.0], np.cumsum(log_ratios)])
    weight_r = np.exp(log_weight_r - log_weight_r.max())
    return r, weight_r / weight_r.sum()
