"""Which stores and sites a stream of rows comes from, and how many lanes each has."""

import dataclasses
import itertools
import os
from collections.abc import Sequence

import numpy as np

from sae_jax.config import DataConfig
from sae_jax.loader.order import SAMPLE, make_rng
from sae_jax.store import Statistics, Store, mix

# How far a source's share of the lanes may be from a whole number: 0.333 is a third.
_TOLERANCE = 0.01
_NEAR = 0.01  # how far a share that is offered instead may be from the one asked
_SAMPLE_CHUNKS = 64


@dataclasses.dataclass(frozen=True)
class Source:
    """A site of a store, which fills some of the lanes of every batch."""

    store: Store
    site: str
    lanes: range

    @property
    def n_chunks(self) -> int:
        return self.store.rows("train") // self.store.manifest.rows_per_chunk

    def __str__(self) -> str:
        return f"{self.site} of {self.store.path}"


def list_stores(data: DataConfig) -> list[str]:
    """The folders that `data.store` names."""
    return [path.strip() for path in data.store.split(",")]


def find_sources(data: DataConfig, stores: Sequence[Store]) -> tuple[Source, ...]:
    """The sources of a run, whose stores `list_stores` names and the caller opened.

    One store with several sites, or several stores with one, use it for all. Raises
    ValueError, one line, if they do not fit each other or the lanes, or if two are the
    same rows.
    """
    sites = [site.strip() for site in data.site.split(",")] if data.site else [None]
    n = max(len(stores), len(sites))
    if not {len(stores), len(sites)} <= {1, n}:
        raise ValueError(
            f"data.store names {len(stores)} stores and data.site {len(sites)} sites: "
            "give as many sites as stores, or one for all"
        )
    pairs = zip(
        itertools.islice(itertools.cycle(stores), n),
        itertools.islice(itertools.cycle(sites), n),
        strict=True,
    )
    ends = [0, *itertools.accumulate(_share_lanes(data, n))]
    sources = tuple(
        Source(store, store.site(site), range(*lanes))
        for (store, site), lanes in zip(pairs, itertools.pairwise(ends), strict=True)
    )
    _check_alike(sources)
    _check_apart(sources)
    return sources


def mix_statistics(sources: Sequence[Source]) -> Statistics:
    """Statistics of the stream: those of the sources, weighted by their lanes."""
    statistics = [source.store.statistics(source.site) for source in sources]
    if len(sources) == 1:
        return statistics[0]
    return mix(statistics, [len(source.lanes) for source in sources])


def sample_sources(sources: Sequence[Source], n_rows: int, seed: int) -> np.ndarray:
    """Train rows of all sources, as many of each as its lanes say, float32 [n, D]."""
    n_lanes = sum(len(source.lanes) for source in sources)
    return np.concatenate([
        sample_rows(
            source.store, source.site, n_rows * len(source.lanes) // n_lanes, seed
        )
        for source in sources
    ])


def sample_rows(store: Store, site: str | None, n_rows: int, seed: int) -> np.ndarray:
    """Train rows spread over the store, float32 [n, D]; all there are if fewer.

    The rows come from at least 64 chunks, where there are so many.
    """
    rng, length = make_rng(seed, SAMPLE), store.manifest.rows_per_chunk
    n_rows = min(n_rows, store.rows("train"))
    n_there = store.rows("train") // length
    n_chunks = min(n_there, max(_SAMPLE_CHUNKS, -(-n_rows // length)))
    chosen = np.sort(rng.choice(n_there, n_chunks, replace=False, shuffle=False))
    rows = np.sort(rng.permutation(n_chunks * length)[:n_rows])
    ranges = [(chunk * length, length) for chunk in chosen.tolist()]
    return store.read_ranges(store.site(site), ranges)[rows].astype(np.float32)


def _share_lanes(data: DataConfig, n_sources: int) -> list[int]:
    """How many lanes each source has."""
    weights = data.weights or (1.0,) * n_sources
    if len(weights) != n_sources:
        raise ValueError(
            f"data.weights = {data.weights} are {len(weights)} for {n_sources} "
            "sources: give one for each, or none to mix them evenly"
        )
    shares = [weight / sum(weights) for weight in weights]

    def is_whole(n_lanes: int) -> bool:
        return all(
            round(share * n_lanes) and abs(share * n_lanes - round(share * n_lanes))
            <= _TOLERANCE
            for share in shares
        )

    if is_whole(data.lanes):
        return [round(share * data.lanes) for share in shares]
    divisors = [n for n in range(1, data.batch_rows + 1) if data.batch_rows % n == 0]
    fitting = [n for n in divisors if is_whole(n)]
    larger = [n for n in fitting if n > data.lanes]
    raise ValueError(
        f"the weights of {n_sources} sources take "
        f"{', '.join(f'{share * data.lanes:g}' for share in shares)} of data.lanes = "
        f"{data.lanes}, not whole lanes: "
        + (
            f"give data.lanes = {(larger or fitting)[0]}"
            if fitting
            else f"no data.lanes that divides data.batch_rows = {data.batch_rows} "
            f"does; give {_offer_weights(shares, data.lanes, divisors)}"
        )
    )


def _offer_weights(shares: Sequence[float], n_lanes: int, divisors: list[int]) -> str:
    """Weights near these shares that do come to whole lanes."""
    offers = []
    if n_lanes >= len(shares):
        offers.append(f"data.weights = {_round_shares(shares, n_lanes)}")
    for n in divisors:
        if n <= n_lanes or n < len(shares):
            continue
        counts = _round_shares(shares, n)
        if all(abs(c / n - s) <= _NEAR for c, s in zip(counts, shares, strict=True)):
            offers.append(f"data.lanes = {n} with data.weights = {counts}")
            break
    return ", or, nearer, ".join(offers) or "other data.weights"


def _round_shares(shares: Sequence[float], n_lanes: int) -> tuple[int, ...]:
    """The nearest whole numbers of lanes, none zero, that come to all lanes."""
    counts = [max(1, round(share * n_lanes)) for share in shares]
    while (missing := n_lanes - sum(counts)) != 0:
        sign = 1 if missing > 0 else -1
        excess = [
            sign * (share * n_lanes - count) if count + sign > 0 else -float("inf")
            for share, count in zip(shares, counts, strict=True)
        ]
        counts[excess.index(max(excess))] += sign
    return tuple(counts)


def _check_apart(sources: Sequence[Source]) -> None:
    """Rows that came twice would count as others, and be seen twice in an epoch."""
    seen: dict[tuple[str, str], Source] = {}
    for source in sources:
        path, is_local = source.store.path, source.store.is_local
        place = os.path.realpath(path) if is_local else path, source.site
        if place in seen:
            raise ValueError(
                f"{seen[place]} and {source} are the same rows: name each store once, "
                "and say with data.weights how much of it to take"
            )
        seen[place] = source


def _check_alike(sources: Sequence[Source]) -> None:
    first = sources[0]
    for other in sources[1:]:
        widths = [source.store.width(source.site) for source in (first, other)]
        if widths[0] != widths[1]:
            raise ValueError(
                f"{first} is {widths[0]} wide, {other} is {widths[1]}: one SAE takes "
                "rows of one width; leave one out of data.store"
            )
        if first.store.dtype != other.store.dtype:
            raise ValueError(
                f"{first} is {first.store.dtype}, {other} is {other.store.dtype}: "
                "harvest both with one dtype, or leave one out of data.store"
            )
