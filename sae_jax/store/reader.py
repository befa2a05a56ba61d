"""Opening and reading a store. Every row that leaves here has passed its checksum."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from sae_jax.store.layout import (
    DOCUMENTS,
    Manifest,
    acts_name,
    list_arrays,
    read_manifest,
    statistics_file,
)

Range = tuple[int, int]  # the first row, and how many


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of a site's train rows, in float64."""

    rows: int
    mean_d: np.ndarray
    mean_norm: float
    mean_square_norm: float


def open_store(path: str | Path) -> "Store":
    """The store at `path`.

    Raises FileNotFoundError where there is none, and ValueError (one line, naming
    the file) for a store that is incomplete, of another version, or lacks a shard.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if not manifest.complete:
        raise ValueError(
            f"{str(path)!r} is still being written ({manifest.shards_written} of "
            f"{len(manifest.shards)} shards): run the same sae-jax harvest again to "
            "finish it"
        )
    for array in list_arrays(manifest):
        rows_each = manifest.rows_per_shard // array.shard_length
        for index, shard in enumerate(manifest.shards):
            expected = array.shard_bytes(shard["rows"] // rows_each)
            _check_size(array.shard_file(folder, index), expected)
    return Store(folder, manifest)


class Store:
    """A complete store, open for reading. Use `open_store`."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path = path
        self.manifest = manifest
        self._layouts = {array.name: array for array in list_arrays(manifest)}
        self._arrays = {
            name: array.open(path, len(manifest.shards))
            for name, array in self._layouts.items()
        }
        self._document_names = _load_names(path / DOCUMENTS, manifest.n_documents)

    @property
    def sites(self) -> list[str]:
        return list(self.manifest.sites)

    @property
    def context_length(self) -> int:
        return self.manifest.context_length

    def site(self, name: str | None = None) -> str:
        """`name` if the store has it; for None the only site there is."""
        if name is None and len(self.sites) == 1:
            return self.sites[0]
        if name not in self.sites:
            has = "has no site " + repr(name) if name else "has more than one site"
            raise ValueError(
                f"{str(self.path)!r} {has}: choose one of {', '.join(self.sites)}"
            )
        return name

    def width(self, site: str) -> int:
        return self.manifest.sites[self.site(site)]

    def rows(self, split: str) -> int:
        return self.manifest.rows[split]

    def shards(self, split: str) -> list[Range]:
        """The filled rows of each shard of the split."""
        return [
            (index * self.manifest.rows_per_shard, shard["rows"])
            for index, shard in enumerate(self.manifest.shards)
            if shard["split"] == split
        ]

    def chunks(self, split: str) -> list[Range]:
        """The filled whole chunks of the split; a part of one is left out."""
        n = self.manifest.rows_per_chunk
        return [
            (start + offset, n)
            for start, rows in self.shards(split)
            for offset in range(0, rows - n + 1, n)
        ]

    def read(
        self, site: str, start: int, stop: int, into: np.ndarray | None = None
    ) -> np.ndarray:
        """Rows `start` to `stop`, bfloat16 [stop - start, D], written to `into`."""
        return self.read_ranges(site, [(start, stop - start)], into)

    def read_ranges(
        self, site: str, ranges: Sequence[Range], into: np.ndarray | None = None
    ) -> np.ndarray:
        """The rows of all ranges, one after the other; all reads run at once."""
        name = acts_name(self.site(site))
        shape = (sum(n for _, n in ranges), self.width(site))
        rows = np.empty(shape, ml_dtypes.bfloat16) if into is None else into
        if rows.shape != shape or rows.dtype != ml_dtypes.bfloat16:
            raise ValueError(
                f"`into` is {rows.dtype} {rows.shape}, not bfloat16 {shape}"
            )
        target = ts.array(rows)
        reads, done = [], 0
        for shard, start, stop in self._split_by_shard(ranges):
            part = target[done : done + stop - start].translate_to[0]
            source = self._arrays[name][start:stop].translate_to[0]
            reads.append((part.write(source), shard))
            done += stop - start
        for read, shard in reads:
            self._finish(read, name, shard)
        return rows

    def sequences(self, split: str) -> np.ndarray:
        """The indices of the split's sequences, ascending, int64."""
        t = self.context_length
        parts = [np.arange(i // t, (i + n) // t) for i, n in self.shards(split)]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def read_tokens(self, sequences: Sequence[int] | np.ndarray) -> np.ndarray:
        """The token ids of these sequences, int32 [n, T]."""
        return self._read_sequences("tokens", np.asarray(sequences, np.int64))

    def read_documents(self, sequences: Sequence[int] | np.ndarray) -> np.ndarray:
        """The document id of every token of these sequences, int32 [n, T]."""
        return self._read_sequences("documents", np.asarray(sequences, np.int64))

    def document_name(self, document: int) -> str:
        return self._document_names[document]

    def statistics(self, site: str) -> Statistics:
        file = statistics_file(self.path, self.site(site))
        try:
            mean_d = np.load(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read {file}: {error}; harvest again") from error
        return Statistics(mean_d=mean_d, **self.manifest.statistics[site])

    def _split_by_shard(self, ranges: Sequence[Range]) -> list[tuple[int, int, int]]:
        """(shard, start, stop) of every part of the ranges, checked to be filled."""
        per_shard, shards = self.manifest.rows_per_shard, self.manifest.shards
        parts = []
        for start, n in ranges:
            stop = start + n
            while start < stop:
                shard = start // per_shard
                end = min(stop, (shard + 1) * per_shard)
                filled = shards[shard]["rows"] if 0 <= shard < len(shards) else 0
                if end > shard * per_shard + filled:
                    raise ValueError(
                        f"no rows {start} to {end} in {str(self.path)!r}: shard "
                        f"{shard} of {len(shards)} has {filled} rows"
                    )
                parts.append((shard, start, end))
                start = end
        return parts

    def _read_sequences(self, name: str, sequences: np.ndarray) -> np.ndarray:
        self._split_by_shard([(s * self.context_length, 1) for s in sequences.tolist()])
        tokens = np.empty((len(sequences), self.context_length), np.int32)
        shards = sequences // self._layouts[name].shard_length
        reads = [
            (shards == shard, self._arrays[name][sequences[shards == shard]].read())
            for shard in np.unique(shards)
        ]
        for (inside, read), shard in zip(reads, np.unique(shards), strict=True):
            tokens[inside] = self._finish(read, name, int(shard))
        return tokens

    def _finish(self, read: Any, name: str, shard: int) -> Any:
        try:
            return read.result()
        except (ValueError, OSError) as error:
            file = self._layouts[name].shard_file(self.path, shard)
            raise ValueError(
                f"damaged shard {file}: {str(error).splitlines()[0]}; restore the "
                "file or harvest the store again"
            ) from error


def _check_size(file: Path, expected: int) -> None:
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        size = None
    if size != expected:
        has = "is missing" if size is None else f"has {size} bytes, not {expected}"
        raise ValueError(
            f"damaged store: {file} {has}; restore the file or harvest the store again"
        )


def _load_names(file: Path, n_documents: int) -> list[str]:
    try:
        names = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}; harvest again") from error
    if len(names) != n_documents:
        raise ValueError(
            f"{file} has {len(names)} names, the store {n_documents} documents; "
            "harvest again"
        )
    return names
