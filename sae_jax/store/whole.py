"""Which files of a store are there and, on a disk, of their full size.

The rest of the damage is found when a file is read. What is missing of a complete
store a harvest makes anew, all but its text.
"""

import errno
from collections.abc import Iterable, Iterator

from sae_jax.store.folder import Folder
from sae_jax.store.layout import (
    MANIFEST,
    ArrayLayout,
    Manifest,
    list_recorded,
    list_row_arrays,
    list_text_arrays,
    statistics_name,
)


def is_whole(folder: Folder, manifest: Manifest) -> bool:
    """Whether a complete store has all that a harvest can make anew."""
    names = [statistics_name(site) for site in manifest.sites]
    names += [f"{array.name}/zarr.json" for array in list_row_arrays(manifest)]
    n_safe = len(list_safe(folder, manifest))
    return n_safe == len(manifest.row_shards) and all(map(folder.read, names))


def list_safe(folder: Folder, manifest: Manifest) -> set[int]:
    """The row shards of which every file and record is there."""
    recorded = list_recorded(folder, manifest)
    files = [
        (array, shard, manifest.row_shards[shard].rows)
        for array in list_row_arrays(manifest)
        for shard in recorded
    ]
    shards = {array.shard_file(shard): shard for array, shard, _ in files}
    return recorded - {shards[file] for file, _ in find_bad_files(folder, files)}


def list_files(manifest: Manifest) -> list[tuple[ArrayLayout, int, int]]:
    """(array, shard, filled length) of every file of every array."""
    texts = [shard["contexts"] for shard in manifest.text_shards]
    rows = [shard.rows for shard in manifest.row_shards]
    return [
        (array, index, length)
        for arrays, lengths in (
            (list_text_arrays(manifest), texts),
            (list_row_arrays(manifest), rows),
        )
        for array in arrays
        for index, length in enumerate(lengths)
    ]


def find_bad_files(
    folder: Folder, files: Iterable[tuple[ArrayLayout, int, int]]
) -> Iterator[tuple[str, str]]:
    """The name of each file that is not there or, on a disk, not of its full size; and
    what it is instead."""
    names = None if folder.is_local else set(folder.list())
    if names is not None and MANIFEST not in names:
        # tensorstore takes the answer of gs:// to who may not list for an empty list.
        raise PermissionError(
            errno.EACCES,
            f"{folder}: {MANIFEST} can be read, and is not listed: get the right to "
            "list the bucket",
        )
    for array, shard, length in files:
        file, expected = array.shard_file(shard), array.shard_bytes(length)
        size = _find_size(folder, file, expected, names)
        if size is None:
            yield file, "is missing"
        elif size != expected:
            yield file, f"has {size} bytes, not {expected}"


def _find_size(
    folder: Folder, file: str, expected: int, names: set[str] | None
) -> int | None:
    """A bucket only lists its `names`; what is cut short there is found on reading."""
    if names is not None:
        return expected if file in names else None
    try:
        return (folder.path / file).stat().st_size
    except FileNotFoundError:
        return None
