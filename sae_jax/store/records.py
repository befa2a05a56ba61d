"""A store's files of statistics: the sums of each shard, and what they add up to."""

from collections.abc import Iterable

from sae_jax.store import statistics
from sae_jax.store.folder import Folder
from sae_jax.store.layout import (
    CURE_OF_ROWS,
    MISSING,
    Manifest,
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
    row_shards = manifest.row_shards
    for shard in sorted(shards):
        found = read_record(folder, shard, site)
        if row_shards[shard].split == "train":
            sums = sums + found
    return sums


def read_record(folder: Folder, shard: int, site: str) -> Sums:
    """The sums of a shard's rows; ValueError that names the file."""
    name = record_name(shard, site)
    data = folder.read(name)
    try:
        return statistics.read_sums(data or b"")
    except _BROKEN as error:
        raise ValueError(
            f"cannot read {folder.name_file(name)}: "
            f"{MISSING if data is None else error}; {CURE_OF_ROWS}"
        ) from error


def read_site_statistics(folder: Folder, site: str) -> Statistics:
    """Of all train rows of a complete store; ValueError that names the file."""
    name = statistics_name(site)
    data, file = folder.read(name), folder.name_file(name)
    if data is None:
        raise ValueError(f"{file} is missing: {CURE_OF_ROWS}")
    try:
        return statistics.read_statistics(data)
    except _BROKEN as error:
        raise ValueError(f"cannot read {file}: {error}; {CURE_OF_ROWS}") from error
