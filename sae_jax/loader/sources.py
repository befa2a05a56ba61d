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
    if counts := _fit_lanes(shares, data.lanes, _TOLERANCE / data.lanes):
        return counts
    raise ValueError(
        f"the weights of {n_sources} sources take "
        f"{', '.join(f'{share * data.lanes:g}' for share in shares)} of data.lanes = "
        f"{data.lanes}, not whole lanes: {_offer(shares, data)}"
    )


def _offer(shares: Sequence[float], data: DataConfig) -> str:
    """The fewest lanes whose parts are near these shares, or else the fewest."""
    more = range(data.lanes, data.batch_rows + 1)
    for limit, n in itertools.product((_NEAR, 1.0), more):
        counts = None if data.batch_rows % n else _fit_lanes(shares, n, limit)
        if counts:
            return f"give data.lanes = {n} with data.weights = {tuple(counts)}"
    return f"raise data.batch_rows = {data.batch_rows}"


def _fit_lanes(
    shares: Sequence[float], n_lanes: int, limit: float
) -> list[int] | None:
    """These lanes shared out, at least one to each; None where the part that one gets
    is farther from its share than the limit."""
    if n_lanes < len(shares):
        return None
    counts = [1] * len(shares)
    for _ in range(n_lanes - len(shares)):
        missing = [s * n_lanes - c for s, c in zip(shares, counts, strict=True)]
        counts[missing.index(max(missing))] += 1
    parts = zip(shares, counts, strict=True)
    return counts if all(abs(s - c / n_lanes) <= limit for s, c in parts) else None


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
