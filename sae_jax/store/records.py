"""A store's files of statistics: the sums of each shard, and what they add up to."""

from collections.abc import Iterable

from sae_jax.store import statistics
from sae_jax.store.folder import Folder
from sae_jax.store.layout import (
    CURE_OF_ROWS,
    MISSING,
    Manifest,
    read_whole,
    record_name,
    statistics_name,
)
from sae_jax.store.statistics import Statistics, Sums

_BROKEN = (KeyError, OSError, TypeError, ValueError)


def merge_records(
    folder: Folder, manifest: Manifest, site: str, shards: Iterable[int]
) -> Sums:
    """The sums of all train rows of these shards, added in the order of the shards.

    Raises ValueError for any record that cannot be read, of a held-out shard too.
    """
    sums = Sums.empty(manifest.sites[site], manifest.context_length)
    row_shards, ordered = manifest.row_shards, sorted(shards)
    names = [record_name(shard, site) for shard in ordered]
    for shard, name, data in zip(ordered, names, folder.read_each(names), strict=True):
        found = _read_sums(folder, name, data)
        if row_shards[shard].split == "train":
            sums = sums + found
    return sums


def read_record(folder: Folder, shard: int, site: str) -> Sums:
    """The sums of a shard's rows; ValueError that names the file."""
    name = record_name(shard, site)
    return _read_sums(folder, name, folder.read(name))


def read_site_statistics(folder: Folder, site: str) -> Statistics:
    """Of all train rows of a complete store; ValueError that names the file."""
    name = statistics_name(site)
    data = read_whole(folder, name)
    try:
        return statistics.read_statistics(data)
    except _BROKEN as error:
        file = folder.name_file(name)
        raise ValueError(f"cannot read {file}: {error}; {CURE_OF_ROWS}") from error


def _read_sums(folder: Folder, name: str, data: bytes | None) -> Sums:
    try:
        return statistics.read_sums(data or b"")
    except _BROKEN as error:
        raise ValueError(
            f"cannot read {folder.name_file(name)}: "
            f"{MISSING if data is None else error}; {CURE_OF_ROWS}"
        ) from error
