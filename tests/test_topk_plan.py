"""Which buckets the planner takes, and what it promises of them."""

import itertools
import re

import numpy as np
import pytest

from sae_jax import topk
from sae_jax.topk.plan import _CPU_TILE, _LARGE_TILE
from sae_jax.topk.recall import crowded_rows

KEPT = (1, 2, 3, 4)
LEAST_BUCKETS, LEAST_SIZE = 128, 8
AGAIN = 1 / 128  # of the rows, that the exact method may expect to choose for twice

bucketed_plans = pytest.mark.parametrize(
    ("n_latents", "k", "target"),
    [
        *itertools.product([2**14, 2**17, 2**20], [32, 64, 256], [0.9, 0.95, 0.99]),
        (2**17, 64, 0.999),
        (2**17, 128, 0.5),  # never fewer than 2 K candidates
        (2**17 - 8, 64, 0.99),  # buckets do not divide the latents
        (50_000, 100, 0.95),
        (2048, 32, 0.9),
        (1024, 1, 0.9),
        (2**17, 4096, 0.99),
        (2**24, 512, 0.99),
    ],
)


def _options(n_latents: int, k: int) -> list[tuple[int, int]]:
    """Every n_buckets and kept that there may be, those of fewest candidates first."""
    numbers = [LEAST_BUCKETS * 2**i for i in range(20)]
    options = [
        (n_buckets, kept)
        for n_buckets, kept in itertools.product(numbers, KEPT)
        if n_buckets * kept >= 2 * k and n_latents >= LEAST_SIZE * kept * n_buckets
    ]
    return sorted(options, key=lambda option: (option[0] * option[1], option[1]))


@bucketed_plans
def test_the_fewest_candidates_that_reach_the_recall_are_taken(n_latents, k, target):
    choice = topk.plan(k, n_latents, method="bucketed", recall_target=target)
    enough = [
        option
        for option in _options(n_latents, k)
        if topk.bucketed_recall(n_latents, k, *option) >= target
    ]
    assert (choice.n_buckets, choice.kept) == (enough or [(0, 0)])[0]
    assert choice.recall >= target
    if enough:
        assert choice.recall == topk.bucketed_recall(n_latents, k, *enough[0])
    else:
        assert choice.recall == 1
    assert choice.k == k and choice.n_latents == n_latents


@bucketed_plans
def test_the_exact_method_seldom_has_to_choose_again(n_latents, k, target):
    choice = topk.plan(k, n_latents)
    enough = [
        option
        for option in _options(n_latents, k)
        if crowded_rows(n_latents, k, *option) <= AGAIN
    ]
    assert (choice.n_buckets, choice.kept) == (enough or [(0, 0)])[0]
    assert choice.recall == 1


@pytest.mark.parametrize(
    ("k", "target", "n_buckets", "kept"),
    [
        (32, 0.95, 128, 2),
        (32, 0.99, 128, 2),
        (64, 0.95, 128, 2),
        (64, 0.99, 128, 3),
        (128, 0.95, 128, 3),
        (128, 0.99, 128, 4),
        (256, 0.95, 128, 4),
        (256, 0.99, 256, 4),
    ],
)
def test_the_smallest_second_stages_of_the_table(k, target, n_buckets, kept):
    """The least of each row of the table in test_topk_recall.py."""
    choice = topk.plan(k, 2**17, method="bucketed", recall_target=target)
    assert (choice.n_buckets, choice.kept) == (n_buckets, kept)


@pytest.mark.parametrize("method", ["exact", "bucketed", "approx"])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("k", "n_latents", "n_shards"),
    [
        (1, 1, 1),
        (7, 7, 1),
        (32, 2048, 1),
        (2200, 4200, 1),
        (5000, 21_000, 1),
        (9000, 17_000, 1),
        (64, 50_000, 1),
        (64, 2**17 + 8, 8),
        (256, 2**15, 8),
        (4096, 2**17, 1),
        (64, 2**24, 128),
        (30, 64, 8),
    ],
)
def test_tiles_fit_the_latents_the_buckets_and_k(
    method, platform, k, n_latents, n_shards
):
    choice = topk.plan(k, n_latents, n_shards, method, 0.9, platform=platform)
    n_own = n_latents // n_shards
    assert choice.k == min(k, n_own) <= choice.tile_latents <= n_own
    unit = max(choice.n_buckets, 1)
    assert choice.tile_latents % unit == 0
    tile = (_CPU_TILE if platform == "cpu" else _LARGE_TILE)[1]
    usual = max(tile, choice.k)
    assert choice.tile_latents < usual + unit
    n_tiles = -(-n_own // choice.tile_latents)
    assert n_tiles <= -(-n_own // usual) + (n_own % unit > 0)


# Recall over latent shards ------------------------------------------------------------


@pytest.mark.parametrize("n_shards", [1, 2, 8])
@pytest.mark.parametrize("capacity_factor", [None, 2.0, 4.0])
@pytest.mark.parametrize("method", ["exact", "bucketed"])
def test_the_recall_of_shards_is_that_of_buckets_and_capacity(
    method, n_shards, capacity_factor
):
    n_latents, k, target = 2**16, 64, 0.95
    args = k, n_latents, n_shards, method, target, capacity_factor
    choice = topk.plan(*args)
    handed_over = found = 1.0
    if capacity_factor:
        handed_over = topk.sharded_recall(n_latents, k, n_shards, capacity_factor)
        assert choice.k == topk.shard_capacity(k, n_shards, capacity_factor)
    if method == "bucketed":
        buckets = choice.n_buckets * n_shards
        found = topk.bucketed_recall(n_latents, k, buckets, choice.kept)
    assert choice.recall == pytest.approx(handed_over * found, rel=1e-12)
    assert choice.recall >= target
    assert choice.n_buckets * choice.kept >= 2 * choice.k


def test_buckets_make_up_for_what_a_capacity_loses():
    args = 32, 2**17, 8, "bucketed", 0.99
    alone, with_capacity = topk.plan(*args), topk.plan(*args, capacity_factor=2.0)
    lost = 1 - topk.sharded_recall(2**17, 32, 8, 2.0)
    assert 0 < lost < 0.01
    assert with_capacity.recall >= 0.99
    assert with_capacity.k < alone.k == 32


@pytest.mark.parametrize("method", ["exact", "bucketed", "approx"])
def test_a_recall_below_the_target_is_refused_with_both_numbers(method):
    recall = topk.sharded_recall(2**17, 64, 8, 1.25)
    words = rf"'{method}' .*= 1.25 on 8 .* {recall:.4f}, below .*target = 0.99: raise"
    with pytest.raises(ValueError, match=words) as caught:
        topk.plan(64, 2**17, 8, method, 0.99, 1.25)
    assert "\n" not in str(caught.value)
    least = float(re.search("to ([0-9.]+) or more", str(caught.value))[1])
    topk.plan(64, 2**17, 8, method, 0.99, least)
    topk.plan(64, 2**17, 8, method, recall - 1e-3, 1.25)


@pytest.mark.parametrize(("k", "n_shards"), [(32, 7), (30, 11), (64, 48), (5, 3)])
@pytest.mark.parametrize("target", [0.9, 0.999, 1.0])
def test_the_capacity_that_a_refusal_names_is_enough(k, n_shards, target):
    n_latents = n_shards * 2048
    with pytest.raises(ValueError, match="raise the factor to") as caught:
        topk.plan(k, n_latents, n_shards, "exact", target, n_shards / k)
    least = float(re.search("to ([0-9.]+) or more", str(caught.value))[1])
    topk.plan(k, n_latents, n_shards, "exact", target, least)


@pytest.mark.parametrize("method", ["exact", "bucketed", "approx"])
def test_a_capacity_of_no_candidate_is_refused(method):
    with pytest.raises(ValueError, match=r"8 \* 0.5 gives none of the 8 latent shards"):
        topk.plan(8, 2**14, 8, method, 0.1, 0.5)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_approx_is_as_good_as_asked_for_on_tpus_and_exact_elsewhere(platform):
    choice = topk.plan(64, 2**17, 1, "approx", 0.9, platform=platform)
    assert choice.recall == (0.9 if platform == "tpu" else 1)
    assert choice.recall_target == 0.9 and choice.n_buckets == 0


def test_approx_makes_up_for_what_a_capacity_loses():
    choice = topk.plan(32, 2**17, 8, "approx", 0.98, 2.0, "tpu")
    handed_over = topk.sharded_recall(2**17, 32, 8, 2.0)
    assert choice.recall == 0.98 < handed_over < 1
    assert choice.recall_target == pytest.approx(0.98 / handed_over, rel=1e-12)
    with pytest.raises(ValueError, match="raise the factor to"):
        topk.plan(32, 2**17, 8, "approx", handed_over + 1e-3, 2.0, "tpu")


# The formulas -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_latents", "k", "n_buckets", "kept"),
    [(11, 4, 3, 1), (11, 4, 3, 2), (12, 5, 5, 1), (13, 6, 4, 2), (7, 3, 6, 1)],
)
def test_uneven_buckets_find_the_mean_over_all_placements(
    n_latents, k, n_buckets, kept
):
    found = [
        sum(min(chosen.count(b), kept) for b in range(n_buckets)) / k
        for places in itertools.combinations(range(n_latents), k)
        for chosen in [[place % n_buckets for place in places]]
    ]
    got = topk.bucketed_recall(n_latents, k, n_buckets, kept)
    assert got == pytest.approx(np.mean(found), rel=1e-12)


@pytest.mark.parametrize("n_latents", [11, 12])
@pytest.mark.parametrize(("k", "n_buckets", "kept"), [(4, 3, 1), (5, 3, 2), (6, 4, 2)])
def test_the_part_of_crowded_rows_counts_buckets_over_all_placements(
    n_latents, k, n_buckets, kept
):
    """Exactly where buckets are of equal size, at most elsewhere."""
    crowded = [
        sum(chosen.count(b) > kept for b in range(n_buckets))
        for places in itertools.combinations(range(n_latents), k)
        for chosen in [[place % n_buckets for place in places]]
    ]
    bound, want = crowded_rows(n_latents, k, n_buckets, kept), np.mean(crowded)
    if n_latents % n_buckets:
        assert want < bound < 1.5 * want
    else:
        assert bound == pytest.approx(want, rel=1e-12)


def _winners_bn(n_latents: int, k: int, n_buckets: int, n_rows: int) -> np.ndarray:
    """How many of K winners at random places each bucket has, [B, n_buckets]."""
    rng = np.random.default_rng(0)
    scores_bl = rng.random((n_rows, n_latents), np.float32)
    places_bk = np.argpartition(scores_bl, k, axis=1)[:, :k]
    counts_bn = np.zeros((n_rows, n_buckets), int)
    np.add.at(counts_bn, (np.arange(n_rows)[:, None], places_bk % n_buckets), 1)
    return counts_bn


@pytest.mark.parametrize(
    ("n_latents", "k", "n_buckets", "kept"),
    [(1000, 32, 128, 1), (1500, 64, 128, 2), (1030, 100, 256, 1)],
)
def test_uneven_buckets_find_what_a_simulation_does(n_latents, k, n_buckets, kept):
    winners_bn = _winners_bn(n_latents, k, n_buckets, 10_000)
    found_b = np.minimum(winners_bn, kept).sum(axis=1) / k
    got = topk.bucketed_recall(n_latents, k, n_buckets, kept)
    assert found_b.std() / np.sqrt(len(found_b)) < 5e-4
    assert got == pytest.approx(found_b.mean(), abs=1e-3)


@pytest.mark.parametrize(
    ("n_latents", "k", "n_buckets", "kept"),
    [(1024, 16, 128, 2), (1500, 32, 128, 3), (2048, 64, 256, 3), (1024, 32, 128, 2)],
)
def test_the_part_of_crowded_rows_is_a_close_bound(n_latents, k, n_buckets, kept):
    winners_bn = _winners_bn(n_latents, k, n_buckets, 8000)
    is_crowded_b = winners_bn.max(axis=1) > kept
    error = is_crowded_b.std() / np.sqrt(len(is_crowded_b))
    bound = crowded_rows(n_latents, k, n_buckets, kept)
    assert is_crowded_b.mean() - 4 * error < bound
    # What it counts twice: rows with two such buckets; and all buckets as the largest.
    is_twice_b = (winners_bn > kept).sum(axis=1) - is_crowded_b
    size = -(-n_latents // n_buckets)
    uneven = (size * n_buckets / n_latents) ** (kept + 1)
    assert bound < uneven * (is_crowded_b.mean() + is_twice_b.mean() + 4 * error)


def test_no_row_is_crowded_where_buckets_hold_all_winners():
    assert crowded_rows(1024, 4, 128, 4) == 0
    assert crowded_rows(128, 64, 128, 1) == 0
