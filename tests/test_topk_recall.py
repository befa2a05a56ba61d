"""Expected recall against tables, a count of all placements, and simulation."""

import itertools

import numpy as np
import pytest

from sae_jax import topk
from sae_jax.topk.recall import _winners_in_bucket


@pytest.mark.parametrize(
    ("log2_n", "k", "shards", "factor", "capacity", "recall"),
    [
        (15, 32, 4, 4, 32, 1.0),
        (15, 32, 4, 8, 32, 1.0),
        (17, 32, 8, 4, 16, 1.0),
        (17, 32, 8, 2, 8, 0.9950),
        (20, 32, 32, 4, 4, 0.9966),
        (20, 32, 64, 4, 2, 0.9697),
        (21, 64, 16, 4, 16, 1.0),
        (24, 256, 64, 4, 16, 1.0),
        (24, 256, 128, 4, 8, 0.9999),
        (24, 256, 512, 4, 2, 0.9676),
        (24, 256, 512, 2, 1, 0.7875),
    ],
)
def test_recall_over_latent_shards(log2_n, k, shards, factor, capacity, recall):
    assert topk.shard_capacity(k, shards, factor) == capacity
    got = topk.sharded_recall(2**log2_n, k, shards, factor)
    assert got == pytest.approx(recall, abs=1e-4)


@pytest.mark.parametrize("log2_n", [17, 20, 24])
@pytest.mark.parametrize("k", [32, 64, 128, 256])
@pytest.mark.parametrize(
    ("candidates_per_k", "recall"), [(16, 0.970), (32, 0.985), (128, 0.996)]
)
def test_recall_of_approx_max_k(log2_n, k, candidates_per_k, recall):
    """The output sizes that XLA chooses for targets of 0.90, 0.95 and 0.99."""
    buckets = candidates_per_k * k
    got = topk.bucketed_recall(2**log2_n, k, buckets, 1)
    # The table is of large n; buckets of four latents lose a little less.
    assert got == pytest.approx(recall, abs=1e-3 if log2_n > 17 else 2e-3)
    # The classical bound ((B - 1) / B)^(K - 1) allows twice the loss, and more where
    # buckets are so small that two winners seldom fit in one.
    bound = ((buckets - 1) / buckets) ** (k - 1)
    ratio = (1 - buckets / 2**log2_n) / 2
    assert (1 - got) / (1 - bound) == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize(
    ("k", "target", "cells"),
    [
        (32, 0.95, [(512, 0.970), (256, 0.992), (384, 1.0), (512, 1.0)]),
        (32, 0.99, [(2048, 0.993), (256, 0.992), (384, 1.0), (512, 1.0)]),
        (64, 0.95, [(1024, 0.970), (256, 0.969), (384, 0.996), (512, 1.0)]),
        (64, 0.99, [(4096, 0.993), (512, 0.991), (384, 0.996), (512, 1.0)]),
        (128, 0.95, [(2048, 0.970), (512, 0.968), (384, 0.978), (512, 0.996)]),
        (128, 0.99, [(8192, 0.993), (1024, 0.991), (768, 0.996), (512, 0.996)]),
        (256, 0.95, [(4096, 0.970), (1024, 0.968), (768, 0.977), (512, 0.963)]),
        (256, 0.99, [(16384, 0.993), (2048, 0.991), (1536, 0.996), (1024, 0.996)]),
    ],
)
def test_smallest_second_stage_for_a_target(k, target, cells):
    """Stage-two sizes for 1 to 4 kept of each bucket, buckets a power of two >= 128."""
    for kept, (size, recall) in enumerate(cells, start=1):
        buckets = size // kept
        got = topk.bucketed_recall(2**17, k, buckets, kept)
        assert got == pytest.approx(recall, abs=1e-3) and got >= target
        if buckets > 128:
            assert topk.bucketed_recall(2**17, k, buckets // 2, kept) < target


@pytest.mark.parametrize("k", [1, 3, 8, 11, 12])
@pytest.mark.parametrize("buckets", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("kept", [1, 2, 5])
def test_recall_is_the_mean_over_all_placements(k, buckets, kept):
    found = [
        sum(min(chosen.count(b), kept) for b in range(buckets)) / k
        for places in itertools.combinations(range(12), k)
        for chosen in [[place % buckets for place in places]]
    ]
    want = sum(found) / len(found)
    assert topk.bucketed_recall(12, k, buckets, kept) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("n_latents", "k", "buckets", "kept"),
    [(4096, 64, 128, 1), (4096, 64, 32, 3), (4096, 512, 64, 8)],
)
def test_recall_of_a_simulated_choice(n_latents, k, buckets, kept):
    """Interleaved buckets of random scores, then the K best of those kept."""
    rng, n_rows = np.random.default_rng(0), 3000
    recall_b = np.empty(n_rows)
    for row in range(n_rows):
        scores_l = rng.permutation(n_latents)  # the K largest are those >= L - K
        in_bucket = np.sort(scores_l.reshape(-1, buckets), axis=0)
        found = np.sort(in_bucket[-kept:], axis=None)[-k:]
        recall_b[row] = np.count_nonzero(found >= n_latents - k) / k
    error = recall_b.std(ddof=1) / np.sqrt(n_rows)
    got = topk.bucketed_recall(n_latents, k, buckets, kept)
    assert abs(got - recall_b.mean()) < 4 * error
    assert error < 1e-3


@pytest.mark.parametrize(("k", "buckets"), [(4096, 2), (4096, 2**20), (1, 2**24)])
def test_large_numbers_keep_their_digits(k, buckets):
    """Mean and variance of the winners in a bucket are the hypergeometric's."""
    n_latents, size = 2**24, 2**24 // buckets
    r, probability_r = _winners_in_bucket(n_latents, k, size)
    mean = r @ probability_r
    assert mean == pytest.approx(k / buckets, rel=1e-12)
    variance = (r - mean) ** 2 @ probability_r
    want = k / buckets * (1 - 1 / buckets) * (n_latents - k) / (n_latents - 1)
    assert variance == pytest.approx(want, rel=1e-12)


def test_recall_is_exactly_one_when_nothing_can_be_lost():
    for n_latents, k, buckets, kept in [
        (2**24, 4096, 512, 4096),  # as many as can be wanted
        (2**24, 4096, 2**22, 4),  # whole buckets
        (2**24, 64, 2**24, 1),  # every latent is a bucket
        (48, 48, 6, 8),
    ]:
        assert topk.bucketed_recall(n_latents, k, buckets, kept) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((64, 65, 4, 1), "k is 65: .* 64 latents"),
        ((64, 0, 4, 1), "k is 0"),
        ((64, 8, 65, 1), "n_buckets is 65: .* 64 latents"),
        ((64, 8, 0, 1), "n_buckets is 0"),
        ((64, 8, 4, 0), "kept is 0"),
    ],
)
def test_bad_numbers_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        topk.bucketed_recall(*arguments)


def test_a_capacity_of_less_than_one_candidate_is_refused():
    assert topk.shard_capacity(32, 64, 2) == 1
    with pytest.raises(ValueError, match=r"32 \* 2 .* 128 latent .*raise capacity_f"):
        topk.sharded_recall(2**20, 32, 128, 2)
