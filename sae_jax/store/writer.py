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
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

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
_PARTIAL = ".partial"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_MB = 10**6


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
    folder = Path(path)
    if (folder / MANIFEST).exists():
        return read_manifest(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(path)!r} is a file: give a new folder")
    if folder.is_dir():
        others = {file.name for file in folder.iterdir()} - {_partial(MANIFEST)}
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
        if name == "subject":  # its name may be a path
            old, new = old["identity"], new["identity"]
        if name in SETTINGS and old != new:
            raise ValueError(
                f"the store at {str(path)!r} was begun with {name} = {old!r}, this "
                f"harvest has {new!r}: give another --out, or delete the folder"
            )


class StoreWriter:
    """Begins a store, or goes on with the one at `path`: its next shard is
    `manifest.shards_written`.

    Raises ValueError if the store there was begun with other settings, or if
    something else is there, and OSError (ENOSPC) if the disk cannot hold the rest.
    """

    def __init__(self, path: str | Path, manifest: Manifest, document_names: list[str]):
        begun = read_begun(path)
        if begun is not None:
            check_same_settings(path, begun, dataclasses.asdict(manifest))
        self.path = Path(path)
        self.manifest = manifest if begun is None else begun
        self._layouts = list_arrays(self.manifest)
        self._check_space()
        # The manifest first: a folder that has anything in it has a manifest.
        self.path.mkdir(parents=True, exist_ok=True)
        with self._full_disk_named():
            self._replace_manifest()
            names = json.dumps(document_names, indent=0, ensure_ascii=False)
            _write_whole(self.path / DOCUMENTS, names.encode())
            n_shards = len(self.manifest.shards)
            self._arrays = {
                array.name: array.open(self.path, n_shards, create=True)
                for array in self._layouts
            }
        self._writes: list[Any] = []
        self._sums = self.manifest.sums

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
                _write_whole(file, mean_file.getvalue())
                statistics[site] = {
                    "rows": sums["rows"],
                    "mean_norm": sums["norm"] / rows,
                    "mean_square_norm": sums["square_norm"] / rows,
                }
            self._replace_manifest(statistics=statistics, sums={}, complete=True)

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
        _write_whole(self.path / MANIFEST, text.encode() + b"\n")
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

    def _check_space(self) -> None:
        folder = self.path.absolute()
        while not folder.exists():
            folder = folder.parent
        needed, free = self._missing_bytes(), shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"{str(self.path)!r} needs {-(-needed // _MB)} MB more, its disk has "
                f"{free // _MB} MB free: lower --max_rows, or give another --out",
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


def _partial(name: str) -> str:
    return name + _PARTIAL


def _write_whole(file: Path, data: bytes) -> None:
    """Replaces `file` at once: after a stop it has the old contents, or the new."""
    partial = file.with_name(_partial(file.name))
    with open(partial, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
