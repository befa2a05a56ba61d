"""Looking into an activation store: what it is, how its rows lie, whether it is whole.

    inspection = inspect("store/", verify=True)
    print(format_inspection(inspection))

A store that is incomplete is looked into as far as it is written, and what is damaged
or missing is told, file by file.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sae_jax.inspection.figures import OutlierRow, SiteFigures, measure_sites
from sae_jax.progress import Progress
from sae_jax.store import NO_DOCUMENT, SPLITS, Folder, Manifest, read_manifest
from sae_jax.store.checked import CheckedFiles, Piece
from sae_jax.store.verify import verify as verify_files
from sae_jax.subjects import Subject

__all__ = ["Inspection", "OutlierRow", "SiteFigures", "SplitCounts", "inspect"]

_QUIET_BYTES = 2**27  # so many are read without a line about it
_MB = 10**6


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """Of a split: what it has, and of its `shards` of rows how many are `written`.

    `documents` is None where not all documents can be read, or none is packed yet, and
    `dropped_tokens` are those of the text that are in no context.
    """

    rows: int
    contexts: int
    documents: int | None
    dropped_tokens: int
    shards: int
    written: int


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found in the store at `path`.

    `missing_shards` are the shards of rows that are still to be written, `bytes` is by
    array, `faults` by the file's name in the store, and `bytes_verified` None unless
    all files were read.
    """

    path: str
    manifest: Manifest
    missing_shards: list[int]
    splits: dict[str, SplitCounts]
    bytes: dict[str, int]
    sites: dict[str, SiteFigures]
    faults: dict[str, str]
    bytes_verified: int | None

    @property
    def rows_written(self) -> int:
        shards = self.manifest.row_shards
        missing = sum(shards[index].rows for index in self.missing_shards)
        return sum(shard.rows for shard in shards) - missing

    @property
    def bytes_per_row(self) -> float | None:
        rows = self.rows_written
        return sum(self.bytes.values()) / rows if rows else None

    def to_json(self) -> dict[str, Any]:
        """All figures, of types that JSON has; what is not a number is None."""
        manifest = dataclasses.asdict(self.manifest)
        del manifest["text_shards"]  # a line for each file
        values = {
            "path": self.path,
            "manifest": manifest,
            "missing_shards": self.missing_shards,
            "splits": self.splits,
            "bytes": self.bytes,
            "bytes_per_row": self.bytes_per_row,
            "sites": {name: site.to_json() for name, site in self.sites.items()},
            "faults": self.faults,
            "bytes_verified": self.bytes_verified,
        }
        return _to_plain(values)


def inspect(
    path: str | Path,
    verify: bool = False,
    seed: int = 0,
    subject: Subject | None = None,
    progress: bool = False,
) -> Inspection:
    """Reads statistics, documents and a sample of rows; with `verify` every file.

    Args:
        path: the store's folder, or its address.
        verify: read all files with their checksums, and see that they agree.
        seed: draws the sample.
        subject: of the store, to tell the tokens of outlier rows.
        progress: show a progress line.

    Raises:
        FileNotFoundError: no store there.
        ValueError: another version's manifest, or none; another subject.
        OSError: a service that does not answer.
    """
    folder = Folder(path)
    manifest = read_manifest(folder)
    if subject is not None and subject.identity != manifest.subject["identity"]:
        raise ValueError(
            f"{str(folder)!r} was harvested from subject {manifest.subject['name']} "
            f"({manifest.subject['identity'][:12]}), not from {subject.name} "
            f"({subject.identity[:12]}): give the subject of the store"
        )
    files = CheckedFiles(folder, manifest)
    n_verified = verify_files(files, progress) if verify else None
    files.note_bad_files()
    documents = _count_documents(files, progress)
    sites = measure_sites(files, seed, subject)
    written = set(files.written)
    splits = {
        split: _count_split(files, split, documents.get(split)) for split in SPLITS
    }
    return Inspection(
        path=str(folder),
        manifest=manifest,
        missing_shards=[i for i in range(len(files.row_shards)) if i not in written],
        splits=splits,
        bytes=_count_bytes(files),
        sites=sites,
        faults=dict(sorted(files.faults.items())),
        bytes_verified=n_verified,
    )


def _count_split(files: CheckedFiles, split: str, documents: int | None) -> SplitCounts:
    manifest = files.manifest
    texts = [text for text in manifest.text_shards if text["split"] == split]
    return SplitCounts(
        rows=manifest.rows.get(split, 0),
        contexts=sum(text["contexts"] for text in texts),
        documents=documents,
        dropped_tokens=manifest.dropped_tokens.get(split, 0),
        shards=sum(shard.split == split for shard in files.row_shards),
        written=sum(files.row_shards[i].split == split for i in files.written),
    )


def _count_documents(files: CheckedFiles, progress: bool) -> dict[str, int]:
    """By split the documents that have a token in a context; nothing is said of a
    split of which not all can be read."""
    texts = files.manifest.text_shards if files.manifest.is_packed else []
    n_documents = files.manifest.n_documents
    is_seen = {text["split"]: np.zeros(n_documents, bool) for text in texts}
    pieces = [
        Piece("documents", index, 0, text["contexts"])
        for index, text in enumerate(texts)
    ]
    n_bytes, before = sum(map(files.count_bytes, pieces)), files.bytes_read
    unknown = set()
    is_shown = progress and n_bytes > _QUIET_BYTES
    with Progress(n_bytes // _MB, "MB", "reading documents", is_shown=is_shown) as line:
        for text, ids in zip(texts, files.read(pieces), strict=True):
            line.update((files.bytes_read - before) // _MB)
            ids = None if ids is None else ids[ids != NO_DOCUMENT]
            if ids is None or (ids < 0).any() or (ids >= n_documents).any():
                unknown.add(text["split"])
            else:
                is_seen[text["split"]][ids] = True
    return {s: int(seen.sum()) for s, seen in is_seen.items() if s not in unknown}


def _count_bytes(files: CheckedFiles) -> dict[str, int]:
    """What the files of each array take that are there."""
    counts: dict[str, int] = {}
    for array, shard, length in files.list_files():
        is_there = files.faults.get(array.shard_file(shard)) != "is missing"
        n_bytes = array.shard_bytes(length) if is_there else 0
        counts[array.name] = counts.get(array.name, 0) + n_bytes
    return counts


def _to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: _to_plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_to_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
