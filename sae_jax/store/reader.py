"""Opening and reading a store. Every row that leaves here has passed its checksum."""

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import tensorstore as ts

from sae_jax.store.folder import Folder, raise_unless_data
from sae_jax.store.layout import (
    CURE,
    DOCUMENTS,
    DTYPES,
    SPLITS,
    Manifest,
    acts_name,
    finish_read,
    list_row_arrays,
    read_manifest,
    read_whole,
    scales_name,
    tell_cure,
)
from sae_jax.store.quantise import dequantise
from sae_jax.store.records import read_site_statistics
from sae_jax.store.statistics import Statistics
from sae_jax.store.text import Text
from sae_jax.store.whole import find_bad_files, list_files, list_safe

Range = tuple[int, int]  # the first row, and how many


def open_store(path: str | Path) -> "Store":
    """The store at `path`: a folder, or file://, gs:// or s3:// and the like of it.

    Raises FileNotFoundError where there is none, ValueError (one line, naming the
    file) for a store that is incomplete, of another version, or lacks a shard, and
    OSError for a service that does not answer.
    """
    folder = Folder(path)
    manifest = read_manifest(folder)
    if not manifest.complete:
        done = "its text is not packed"
        if manifest.is_packed:
            n_done = len(list_safe(folder, manifest))
            done = f"{n_done} of {len(manifest.row_shards)} shards"
        raise ValueError(
            f"{str(folder)!r} is still being written ({done}): run the same sae-jax "
            "harvest again to finish it"
        )
    _check_files(folder, manifest)
    return Store(folder, manifest)


class Store:
    """A complete store, open for reading. Use `open_store`.

    A row's number counts the files of rows as if all were full: those of train come
    first, so train rows are 0 to `rows("train")`. The rows of a split are whole chunks.
    """

    def __init__(self, folder: Folder, manifest: Manifest):
        # Absolute, so that a run can be evaluated from any folder.
        self.path = os.path.abspath(folder.path) if folder.is_local else str(folder)
        self.manifest = manifest
        self._folder = folder
        self._text = Text(folder, manifest)
        self._shards = manifest.row_shards
        self._layouts = {array.name: array for array in list_row_arrays(manifest)}
        self._arrays = {
            name: array.open(folder, len(self._shards))
            for name, array in self._layouts.items()
        }

    def __str__(self) -> str:
        splits = (f"{n:,} {split} rows" for split, n in self.manifest.rows.items())
        return f"{self.path}: {', '.join(splits)} of {', '.join(self.sites)}"

    @property
    def sites(self) -> list[str]:
        return list(self.manifest.sites)

    @property
    def context_length(self) -> int:
        return self.manifest.context_length

    @property
    def is_local(self) -> bool:
        return self._folder.is_local

    @property
    def dtype(self) -> str:
        """Of the rows as they are stored."""
        return self.manifest.dtype

    def site(self, name: str | None = None) -> str:
        """`name` if the store has it; for None the only site there is."""
        if name is None and len(self.sites) == 1:
            return self.sites[0]
        if name not in self.sites:
            has = "has no site " + repr(name) if name else "has more than one site"
            raise ValueError(
                f"{self.path!r} {has}: choose one of {', '.join(self.sites)}"
            )
        return name

    def width(self, site: str) -> int:
        return self.manifest.sites[self.site(site)]

    def rows(self, split: str) -> int:
        return self.manifest.rows[split]

    def shards(self, split: str) -> list[Range]:
        """The filled rows of each shard of the split."""
        return [
            (index * self.manifest.rows_per_shard, shard.rows)
            for index, shard in enumerate(self._shards)
            if shard.split == split
        ]

    def read_ranges(
        self, site: str, ranges: Sequence[Range], into: np.ndarray | None = None
    ) -> np.ndarray:
        """The rows of all ranges, one after the other, bfloat16 [n, D], written to
        `into` if it is given; all reads run at once."""
        shape = (sum(n for _, n in ranges), self.width(site))
        rows = np.empty(shape, ml_dtypes.bfloat16) if into is None else into
        if self.dtype == "bfloat16":
            self.read_stored(site, ranges, rows)
            return rows
        _check_buffer(rows, shape, ml_dtypes.bfloat16)
        stored, scales = np.empty(shape, np.int8), np.empty(shape[0], np.float32)
        self.read_stored(site, ranges, stored, scales)
        rows[:] = dequantise(stored, scales)
        return rows

    def read_stored(
        self,
        site: str,
        ranges: Sequence[Range],
        rows: np.ndarray,
        scales: np.ndarray | None = None,
    ) -> None:
        """Fills `rows` [n, D] with what is stored: bfloat16; or int8, and then `scales`
        [n] float32 with what to multiply each row by."""
        n, width = sum(n for _, n in ranges), self.width(site)
        _check_buffer(rows, (n, width), DTYPES[self.dtype])
        if self.dtype == "int8":
            assert scales is not None
            _check_buffer(scales, (n,), np.float32)
            self._read_into(scales_name(site), ranges, scales)
        self._read_into(acts_name(site), ranges, rows)

    def read_positions(self, ranges: Sequence[Range]) -> np.ndarray:
        """The (sequence, position) of the rows of all ranges, int32 [n, 2]."""
        positions = np.empty((sum(n for _, n in ranges), 2), np.int32)
        self._read_into("positions", ranges, positions)
        return positions

    def read_contexts(
        self, site: str, sequences: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows of these contexts of one split, bfloat16 [n, T, D], and which of
        them are rows, bool [n, T]: others, as padding, are zero."""
        rows_nt, is_row_nt = self.find_rows(sequences)
        shape = (*is_row_nt.shape, self.width(site))
        if is_row_nt.all():
            acts = self.read_ranges(site, _join(rows_nt.ravel()))
            return acts.reshape(shape), is_row_nt
        acts = np.zeros(shape, ml_dtypes.bfloat16)
        acts[is_row_nt] = self.read_ranges(site, _join(rows_nt[is_row_nt]))
        return acts, is_row_nt

    def find_rows(
        self, sequences: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The number of the row at each position of these contexts, int64 [n, T], and
        whether there is one, bool [n, T]."""
        return self._text.find_rows(sequences)

    def sequences(self, split: str) -> np.ndarray:
        """The indices of the split's contexts, ascending, int64."""
        return self._text.sequences(split)

    def read_tokens(self, sequences: Sequence[int] | np.ndarray) -> np.ndarray:
        """The token ids of these contexts, int32 [n, T]."""
        return self._text.read("tokens", sequences)

    def read_documents(self, sequences: Sequence[int] | np.ndarray) -> np.ndarray:
        """The document id of every token of these contexts, int32 [n, T]; -1 is
        padding."""
        return self._text.read("documents", sequences)

    def document_name(self, document: int) -> str:
        return self._document_names[document]

    def statistics(self, site: str) -> Statistics:
        return read_site_statistics(self._folder, self.site(site))

    @functools.cached_property
    def _document_names(self) -> list[str]:
        return read_document_names(self._folder, self.manifest)

    def _read_into(self, name: str, ranges: Sequence[Range], into: np.ndarray) -> None:
        n = self._layouts[name].chunk_length
        starts, counts = np.array(ranges, np.int64).reshape(-1, 2).T
        self._check_filled(starts, starts + counts)
        if (starts % n == 0).all() and (counts % n == 0).all():
            if len(starts):
                chunks = into.reshape(-1, n, *into.shape[1:])
                self._read_chunks(name, _count_up(starts // n, counts // n), chunks)
            return
        rows = _count_up(starts, counts)
        chunks, place = np.unique(rows // n, return_inverse=True)
        read = np.empty((len(chunks), n, *into.shape[1:]), into.dtype)
        self._read_chunks(name, chunks, read)
        into[:] = read[place, rows % n]

    def _read_chunks(self, name: str, chunks: np.ndarray, into: np.ndarray) -> None:
        """Chunks by their numbers: one read of all is the fastest, and within a batch
        the index of a shard is read once, and not for each chunk."""
        array = self._arrays[name]
        try:
            with ts.Batch() as batch:
                write = ts.array(into).write(array[chunks], batch=batch)
            write.result()
        except (ValueError, OSError) as error:
            raise_unless_data(self._folder, error)
            layout = self._layouts[name]
            shards = chunks * layout.chunk_length // layout.shard_length
            for shard in np.unique(shards).tolist():  # to name the one that is damaged
                read = array[chunks[shards == shard]].read()
                finish_read(read, self._folder, layout.shard_file(shard))
            raise

    def _check_filled(self, starts: np.ndarray, stops: np.ndarray) -> None:
        """ValueError unless each of these ranges has rows of one split."""
        is_filled, has = np.zeros(len(starts), bool), []
        for split in SPLITS:
            first = self.manifest.first_row(split)
            end = first + self.rows(split)
            is_filled |= (first <= starts) & (stops <= end)
            has.append(f"{split} rows {first} to {end}")
        if not is_filled.all():
            i = int(np.argmin(is_filled))
            raise ValueError(
                f"no rows {starts[i]} to {stops[i]} in {self.path!r}, which has "
                f"{' and '.join(has)}"
            )


def read_document_names(folder: Folder, manifest: Manifest) -> list[str]:
    """The names by id; ValueError that names the file."""
    data, file = read_whole(folder, DOCUMENTS), folder.name_file(DOCUMENTS)
    try:
        names = json.loads(data)
    except ValueError as error:
        raise ValueError(f"cannot read {file}: {error}; {CURE}") from error
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"{file} is not a list of names; {CURE}")
    if len(names) != manifest.n_documents:
        raise ValueError(
            f"{file} has {len(names)} names, the store {manifest.n_documents} "
            f"documents; {CURE}"
        )
    return names


def _check_buffer(buffer: np.ndarray, shape: tuple[int, ...], dtype: object) -> None:
    if buffer.shape != shape or buffer.dtype != np.dtype(dtype):  # type: ignore
        raise ValueError(
            f"the buffer is {buffer.dtype} {buffer.shape}, not "
            f"{np.dtype(dtype).name} {shape}"  # type: ignore
        )


def _count_up(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers of ranges, one after the other."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def _join(rows: np.ndarray) -> list[Range]:
    """Ranges of the rows, in their order."""
    if not len(rows):
        return []
    edges = np.flatnonzero(np.diff(rows) != 1) + 1
    return [(int(run[0]), len(run)) for run in np.split(rows, edges)]


def _check_files(folder: Folder, manifest: Manifest) -> None:
    """ValueError unless each shard's file is there; on a disk, in its full size."""
    for file, fault in find_bad_files(folder, list_files(manifest)):
        raise ValueError(
            f"damaged store: {folder.name_file(file)} {fault}; {tell_cure(file)}"
        )
