"""Writing a store, so that a stop at any moment loses one shard at most.

    writer = StoreWriter(folder, manifest)        # begins, or goes on
    writer.write_text(blocks, ...)                # unless writer.manifest.is_packed
    for index in writer.missing_shards():
        writer.write_shard(index, acts, positions)
    writer.finish()

First the text, by one process, which fixes the rows of every shard; then the shards of
rows, of which process p of P writes p, p + P, ... A shard's files are written whole and
synced, then a record with the sums of its rows for the statistics: a shard that lacks
it, or a file, is written again, and a complete store with such a shard is complete no
more. Whoever finds all records merges them, in the order of the shards, and makes the
store complete. So a harvest by any number of processes, stopped or not, leaves the same
bytes.
"""

import contextlib
import dataclasses
import errno
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np

from sae_jax.files import check_space, is_full_disk, lock_folder
from sae_jax.store import statistics
from sae_jax.store.begin import choose_manifest
from sae_jax.store.folder import Folder, raise_plainly
from sae_jax.store.layout import (
    DOCUMENTS,
    MANIFEST,
    ArrayLayout,
    Manifest,
    acts_name,
    list_row_arrays,
    list_text_arrays,
    record_name,
    scales_name,
    statistics_name,
)
from sae_jax.store.quantise import Stored
from sae_jax.store.records import merge_records
from sae_jax.store.text import Contexts, is_row
from sae_jax.store.whole import is_whole, list_safe

_MOST_CONTEXTS = 2**31  # positions of rows count them in int32
_MB = 10**6


class TextBlocks(Protocol):
    """Contexts to write. When all were taken: the names of the documents, by id, and
    by split the rows, in whole chunks, and the tokens that are in no context. On the
    way `rows` are those found so far, never more than in the end."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def rows(self) -> dict[str, int]: ...

    @property
    def dropped_tokens(self) -> dict[str, int]: ...

    def __iter__(self) -> Iterator[Contexts]: ...


class StoreWriter:
    """Begins a store, or goes on with the one there; `process` of `n_processes`.

    Nobody else can write as this process, on a disk, until the writer is closed: by
    `close`, `finish` or `with`. Raises ValueError if the store there was begun with
    other settings, if something else is there or if another process has this part.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        process: int = 0,
        n_processes: int = 1,
    ):
        self.folder = folder
        self._part = process, n_processes
        self._lock = None
        if folder.is_local:
            choose_manifest(folder, manifest)  # before anything is made there
            folder.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(folder.path, process)
        self._pending: tuple[int, list[Any], dict[str, statistics.Sums]] | None = None
        self._arrays: dict[str, Any] = {}
        try:
            # Again: another process may have written, and ended, since.
            self.manifest = choose_manifest(folder, manifest)
            if self.manifest.complete and not is_whole(folder, self.manifest):
                # Nobody may read it as complete while files are made anew.
                with self._full_disk_named():
                    self._replace_manifest(complete=False, statistics={})
            self._check_space(self.manifest)
            if process == 0 and not self.manifest.is_packed:
                # The manifest first: a folder that has anything in it has a manifest.
                with self._full_disk_named():
                    self._replace_manifest()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets others write. What is not safe yet will be written again."""
        try:
            for write in self._pending[1] if self._pending else ():
                write.exception()  # waits
        finally:
            self._pending = None
            if self._lock is not None:
                self._lock.close()

    def write_text(
        self, blocks: TextBlocks, on_rows: Callable[[int], None] | None = None
    ) -> None:
        """Writes the contexts as they come, and then plans the shards of rows.

        `on_rows` is told how many rows were found so far.
        """
        manifest = self.manifest
        shards: list[dict[str, Any]] = []
        arrays = list_text_arrays(manifest)
        with self._full_disk_named():
            for array in arrays:  # of a packing that was stopped
                self.folder.delete_all(f"{array.name}/")
            # Cut to size when the number of files is known.
            most = _MOST_CONTEXTS // manifest.contexts_per_shard
            self._open(arrays, most)
            for block in blocks:
                if len(shards) == most:
                    raise ValueError(
                        f"the text gives more than the {_MOST_CONTEXTS:,} contexts "
                        f"that {str(self.folder)!r} can have: lower --max_rows, or "
                        "raise --context_length"
                    )
                self._write_block(len(shards), block)
                is_kept = is_row(block.tokens, block.documents, manifest.excluded_ids)
                shards.append({
                    "split": block.split,
                    "contexts": len(block.tokens),
                    "rows": int(is_kept.sum()),
                })
                if on_rows is not None:
                    on_rows(sum(blocks.rows.values()))
            for array in arrays:
                self.folder.delete(f"{array.name}/zarr.json")
            self._open(arrays, len(shards))
            names = json.dumps(list(blocks.names), indent=0, ensure_ascii=False)
            self.folder.write(DOCUMENTS, names)
        found: dict[str, Any] = {
            "text_shards": shards,
            "rows": dict(blocks.rows),
            "n_documents": len(blocks.names),
            "dropped_tokens": dict(blocks.dropped_tokens),
            "is_packed": True,
        }
        self._check_space(dataclasses.replace(self.manifest, **found))
        with self._full_disk_named():
            self._replace_manifest(**found)

    def missing_shards(self) -> list[int]:
        """This process's shards of rows that are not safe yet."""
        process, n_processes = self._part
        safe = list_safe(self.folder, self.manifest)
        shards = range(process, len(self.manifest.row_shards), n_processes)
        return [shard for shard in shards if shard not in safe]

    def write_shard(
        self,
        index: int,
        stored: Mapping[str, Stored],
        positions: np.ndarray,
    ) -> None:
        """Starts to write a shard, once the one before it is safe.

        `stored` has the rows of each site and `positions` their (sequence, position),
        int32 [n, 2]. The arrays must not change until the next call.
        """
        self._commit()
        planned = self.manifest.row_shards[index]
        if len(positions) != planned.rows:
            raise ValueError(
                f"shard {index} has {len(positions)} rows, not {planned.rows}"
            )
        contents = {"positions": positions}
        for site, values in stored.items():
            contents[acts_name(site)] = values.rows
            if values.scales is not None:
                contents[scales_name(site)] = values.scales
        layouts = list_row_arrays(self.manifest)
        with self._full_disk_named():
            if "positions" not in self._arrays:
                self._open(layouts, len(self.manifest.row_shards))
            writes = [
                self._start_write(array, index, contents[array.name])
                for array in layouts
            ]
        self._pending = index, writes, {}
        for site, values in stored.items():  # while the files are written
            sums = statistics.add_up(
                values.decode(), positions[:, 1], self.manifest.context_length
            )
            _refuse_not_finite(site, sums)
            self._pending[2][site] = sums

    def finish(self) -> bool:
        """Makes the store complete if every process's shards are safe; else False."""
        self._commit()
        n_shards = len(self.manifest.row_shards)
        if len(list_safe(self.folder, self.manifest)) < n_shards:
            self.close()
            return False
        summary = {}
        with self._full_disk_named():
            if "positions" not in self._arrays:  # their metadata may be missing
                self._open(list_row_arrays(self.manifest), n_shards)
            for site in self.manifest.sites:
                sums = merge_records(self.folder, self.manifest, site, range(n_shards))
                found = statistics.finish(sums)
                self.folder.write(statistics_name(site), statistics.to_bytes(found))
                summary[site] = {
                    "rows": found.rows,
                    "mean_norm": found.mean_norm,
                    "mean_square_norm": found.mean_square_norm,
                }
            self._replace_manifest(statistics=summary, complete=True)
        self.close()
        return True

    def _check_space(self, manifest: Manifest) -> None:
        if self.folder.is_local and manifest.is_packed and not manifest.complete:
            needed = _count_missing_bytes(self.folder, manifest)
            what = f"the store {str(self.folder)!r}"
            cure = "lower --max_rows or --max_gb, or give another --out"
            check_space(self.folder.path, needed, what, cure)

    def _write_block(self, index: int, block: Contexts) -> None:
        start = index * self.manifest.contexts_per_shard
        for name, values in (("tokens", block.tokens), ("documents", block.documents)):
            self._arrays[name][start : start + len(values)].write(values).result()

    def _start_write(self, array: ArrayLayout, shard: int, values: np.ndarray) -> Any:
        if len(values) < array.shard_length:
            # What a stopped harvest left would be read and merged; it may be damaged.
            self.folder.delete(array.shard_file(shard))
        start = shard * array.shard_length
        part = array.select(self._arrays[array.name], start, start + len(values))
        return part.write(
            array.fill_chunks(values), can_reference_source_data_indefinitely=True
        )

    def _commit(self) -> None:
        if self._pending is None:
            return
        index, writes, sums = self._pending
        with self._full_disk_named():
            for write in writes:
                write.result()
            self._pending = None
            for site, values in sums.items():
                name = record_name(index, site)
                self.folder.write(name, statistics.to_bytes(values))

    def _open(self, layouts: Iterable[ArrayLayout], n_shards: int) -> None:
        for array in layouts:
            self._arrays[array.name] = array.open(self.folder, n_shards, is_new=True)

    def _replace_manifest(self, **changes: Any) -> None:
        manifest = dataclasses.replace(self.manifest, **changes)
        text = json.dumps(dataclasses.asdict(manifest), indent=2)
        self.folder.write(MANIFEST, text + "\n")
        self.manifest = manifest

    @contextlib.contextmanager
    def _full_disk_named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if not is_full_disk(error):
                raise_plainly(self.folder, error)
            missing = "before its text was packed"
            if self.manifest.is_packed:
                needed = _count_missing_bytes(self.folder, self.manifest)
                missing = f"with {-(-needed // _MB)} MB still to write"
            raise OSError(
                errno.ENOSPC,
                f"the disk of {str(self.folder)!r} is full, {missing}: make room and "
                "run the same harvest again to go on",
            ) from error


def _count_missing_bytes(folder: Folder, manifest: Manifest) -> int:
    safe = list_safe(folder, manifest)
    shards = enumerate(manifest.row_shards)
    missing = [shard.rows for index, shard in shards if index not in safe]
    return sum(
        array.shard_bytes(rows)
        for array in list_row_arrays(manifest)
        for rows in missing
    )


def _refuse_not_finite(site: str, sums: statistics.Sums) -> None:
    if not statistics.is_finite(sums):
        raise ValueError(
            f"site {site} gave an activation that is infinite or not a number: the "
            "subject's weights or its dtype cannot be right"
        )
