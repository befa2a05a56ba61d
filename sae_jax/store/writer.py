"""Writing a store shard by shard, so that a stop at any moment loses one shard at most.

The files of a shard are written whole (tensorstore renames a finished file into
place) and synced; then a new manifest, which counts the shard, takes the place of the
old one. What the manifest does not count is written again. The statistics are summed
in the order of the shards and travel in the manifest, so a harvest that was stopped
and went on leaves the same bytes as one that was not.
"""

import contextlib
import dataclasses
import errno
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from sae_jax.files import (
    LOCK_FILE,
    PARTIAL,
    check_space,
    lock_folder,
    refuse_remote,
    write_whole,
)
from sae_jax.store.layout import (
    DOCUMENTS,
    MANIFEST,
    ArrayLayout,
    Manifest,
    acts_name,
    list_arrays,
    read_manifest,
    statistics_file,
)

# A harvest goes on with a store only if these are the same.
SETTINGS = (
    "subject",
    "tokenizer",
    "corpus",
    "sites",
    "context_length",
    "heldout_every",
    "max_rows",
    "seed",
    "rows_per_shard",
    "rows_per_chunk",
    "rows",
)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_MB = 10**6
# In a folder where a new store may begin.
_OURS = {LOCK_FILE, MANIFEST + PARTIAL}


@dataclasses.dataclass(frozen=True)
class Shard:
    """The rows of one shard: acts [n, D] bfloat16 by site, the rest [n / T, T]."""

    acts: Mapping[str, np.ndarray]
    tokens: np.ndarray
    documents: np.ndarray


def read_begun(path: str | Path) -> Manifest | None:
    """The manifest of the store begun at `path`; None where a new one may begin.

    Raises ValueError if anything else is there.
    """
    refuse_remote(path)
    folder = Path(path)
    if (folder / MANIFEST).exists():
        return read_manifest(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(path)!r} is a file: give a new folder")
    if folder.is_dir():
        others = {file.name for file in folder.iterdir()} - _OURS
        if others:
            raise ValueError(
                f"{str(path)!r} is not a store and not empty (it has {min(others)!r}): "
                "give a new folder"
            )
    return None


def check_same_settings(
    path: str | Path, begun: Manifest, settings: Mapping[str, Any]
) -> None:
    """ValueError, naming the field, if the store was begun with another setting."""
    for name, value in settings.items():
        old, new = getattr(begun, name), value
        if name == "subject":
            old, new = _drop_name(old), _drop_name(new)
        if name in SETTINGS and old != new:
            raise ValueError(
                f"the store at {str(path)!r} was begun with {name} = {old!r}, this "
                f"harvest has {new!r}: give another --out, or delete the folder"
            )


class StoreWriter:
    """Begins a store, or goes on with the one at `path`: its next shard is
    `manifest.shards_written`.

    Nobody else can write there until it is closed: by `close`, `finish` or `with`.
    Raises ValueError if the store there was begun with other settings, if something
    else is there or if another process writes it, and OSError (ENOSPC) if the disk
    cannot hold the rest.
    """

    def __init__(self, path: str | Path, manifest: Manifest, document_names: list[str]):
        self.path = Path(path)
        self.manifest = _choose(path, manifest)
        self._layouts = list_arrays(self.manifest)
        cure = "lower --max_rows, or give another --out"
        check_space(path, self._missing_bytes(), f"the store {str(path)!r}", cure)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(path)
        self._writes: list[Any] = []
        try:
            # Again: another process may have written, and ended, since.
            self.manifest = _choose(path, manifest)
            self._sums = self.manifest.sums
            self._begin(document_names)
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
            for write in self._writes:
                write.exception()  # waits
        finally:
            self._writes = []
            self._lock.close()

    def write_shard(self, shard: Shard) -> None:
        """Starts to write the next shard, once the one before it is safe.

        The arrays must not change until the next call.
        """
        self._commit()
        index = self.manifest.shards_written
        start = index * self.manifest.rows_per_shard
        planned = self.manifest.shards[index]
        n_sequences, t = shard.tokens.shape
        if n_sequences * t != planned["rows"]:
            raise ValueError(
                f"shard {index} has {n_sequences * t} rows, not {planned['rows']}"
            )
        sequences = start // t + np.arange(n_sequences, dtype=np.int32)
        positions = np.stack(
            np.broadcast_arrays(sequences[:, None], np.arange(t, dtype=np.int32)), -1
        )
        contents = {acts_name(site): acts for site, acts in shard.acts.items()}
        contents["positions"] = positions.reshape(-1, 2)
        contents["tokens"] = shard.tokens
        contents["documents"] = shard.documents
        with self._full_disk_named():
            self._writes = [
                self._start_write(array, index, contents[array.name])
                for array in self._layouts
            ]
        self._sums = {
            site: _add_sums(self.manifest.sums.get(site), site, acts, planned["split"])
            for site, acts in shard.acts.items()
        }

    def finish(self) -> None:
        """Makes the store complete."""
        self._commit()
        statistics = {}
        with self._full_disk_named():
            for site, sums in self.manifest.sums.items():
                rows = max(sums["rows"], 1)  # a store may be wholly held out
                mean_file = io.BytesIO()
                np.save(mean_file, np.asarray(sums["rows_d"]) / rows)
                file = statistics_file(self.path, site)
                file.parent.mkdir(exist_ok=True)
                write_whole(file, mean_file.getvalue())
                statistics[site] = {
                    "rows": sums["rows"],
                    "mean_norm": sums["norm"] / rows,
                    "mean_square_norm": sums["square_norm"] / rows,
                }
            self._replace_manifest(statistics=statistics, sums={}, complete=True)
        self.close()

    def _begin(self, document_names: list[str]) -> None:
        # The manifest first: a folder that has anything in it has a manifest.
        with self._full_disk_named():
            self._replace_manifest()
            names = json.dumps(document_names, indent=0, ensure_ascii=False)
            write_whole(self.path / DOCUMENTS, names)
            n_shards = len(self.manifest.shards)
            self._arrays = {
                array.name: array.open(self.path, n_shards, create=True)
                for array in self._layouts
            }

    def _start_write(self, array: ArrayLayout, shard: int, values: np.ndarray) -> Any:
        # What a stopped harvest left would be read and merged; it may be damaged.
        array.shard_file(self.path, shard).unlink(missing_ok=True)
        start = shard * array.shard_length
        return self._arrays[array.name][start : start + len(values)].write(
            np.ascontiguousarray(values), can_reference_source_data_indefinitely=True
        )

    def _commit(self) -> None:
        if not self._writes:
            return
        with self._full_disk_named():
            for write in self._writes:
                write.result()
            self._writes = []
            n_written = self.manifest.shards_written + 1
            self._replace_manifest(shards_written=n_written, sums=self._sums)

    def _replace_manifest(self, **changes: Any) -> None:
        manifest = dataclasses.replace(self.manifest, **changes)
        text = json.dumps(dataclasses.asdict(manifest), indent=2)
        write_whole(self.path / MANIFEST, text + "\n")
        self.manifest = manifest

    def _missing_bytes(self) -> int:
        manifest = self.manifest
        return sum(
            array.shard_bytes(
                shard["rows"] * array.shard_length // manifest.rows_per_shard
            )
            for shard in manifest.shards[manifest.shards_written :]
            for array in self._layouts
        )

    @contextlib.contextmanager
    def _full_disk_named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if not _is_full_disk(error):
                raise
            manifest = self.manifest
            raise OSError(
                errno.ENOSPC,
                f"the disk of {str(self.path)!r} is full, with "
                f"{manifest.shards_written} of {len(manifest.shards)} shards written: "
                f"free {-(-self._missing_bytes() // _MB)} MB and run the same harvest "
                "again to go on",
            ) from error


def _choose(path: str | Path, planned: Manifest) -> Manifest:
    """The manifest to go on with: that of the store begun there, or the planned."""
    begun = read_begun(path)
    if begun is None:
        return planned
    check_same_settings(path, begun, dataclasses.asdict(planned))
    return begun


def _drop_name(subject: Mapping[str, str]) -> dict[str, str]:
    """What a subject is; its name may be a path."""
    return {key: value for key, value in subject.items() if key != "name"}


def _add_sums(
    sums: Mapping[str, Any] | None, site: str, acts: np.ndarray, split: str
) -> dict[str, Any]:
    """The running sums of a site, with the rows of a train shard added, in float64."""
    rows_d, norm, square_norm = np.zeros(acts.shape[1]), 0.0, 0.0
    sums = sums or dict(rows=0, rows_d=rows_d.tolist(), norm=0.0, square_norm=0.0)
    for start in range(0, len(acts), 1024):  # float64 of the whole is four times it
        acts_bd = acts[start : start + 1024].astype(np.float64)
        squares_b = np.einsum("bd,bd->b", acts_bd, acts_bd)
        rows_d += acts_bd.sum(0)
        norm += float(np.sqrt(squares_b).sum())
        square_norm += float(squares_b.sum())
    if not np.isfinite(square_norm):
        raise ValueError(
            f"site {site} gave an activation that is infinite or not a number: the "
            "subject's weights or its dtype cannot be right"
        )
    if split != "train":
        return dict(sums)
    return {
        "rows": sums["rows"] + len(acts),
        "rows_d": (np.asarray(sums["rows_d"]) + rows_d).tolist(),
        "norm": sums["norm"] + norm,
        "square_norm": sums["square_norm"] + square_norm,
    }


def _is_full_disk(error: OSError | ValueError) -> bool:
    if isinstance(error, OSError):
        return error.errno in _DISK_FULL
    # tensorstore gives the number in its text.
    return any(f"os_error_code='{number}'" in str(error) for number in _DISK_FULL)
