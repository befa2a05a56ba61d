"""Verification of a store: every file is read, and what they say must agree.

    files      there, of their size, and each chunk with its checksum
    text       as many rows as the manifest says; no document in two splits, each in
               the one that its name tells
    positions  those of the kept positions of the contexts, in order: so no row is
               there twice, and none is missing
    rows       finite
    records    the sums of the rows of their shard
    statistics what the records add up to

Of an incomplete store what is written is verified. Memory is bounded: files are read in
parts, and those of rows in their order, while text comes along.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np

from sae_jax.progress import Progress
from sae_jax.store import statistics
from sae_jax.store.checked import CheckedFiles, Piece
from sae_jax.store.layout import (
    DOCUMENTS,
    MANIFEST,
    SPLITS,
    record_name,
    statistics_name,
)
from sae_jax.store.reader import read_document_names
from sae_jax.store.records import merge_records, read_record, read_site_statistics
from sae_jax.store.statistics import Statistics, Sums
from sae_jax.store.text import NO_DOCUMENT, is_row
from sae_jax.text import is_heldout

_PIECE_BYTES = 2**25
_TOLERANCE = 1e-9  # of float64 sums, whose order may be another
_UNKNOWN = -1
_MB = 10**6


def verify(files: CheckedFiles, progress: bool = False) -> int:
    """Adds all that is wrong to `files.faults`; returns the bytes that were read."""
    files.note_bad_files()
    before = files.bytes_read
    _Verification(files, progress).run()
    return files.bytes_read - before


class _Verification:
    def __init__(self, files: CheckedFiles, progress: bool):
        self._files, self._manifest = files, files.manifest
        total = sum(map(files.count_bytes, self._list_pieces()))
        name = f"verifying {files.folder}"
        self._progress = Progress(total // _MB, "MB", name, is_shown=progress)
        # The split of each document, by its id.
        self._split_of = np.full(self._manifest.n_documents, _UNKNOWN, np.int8)

    def run(self) -> None:
        self._check_counts()
        with self._progress:
            values = self._read(self._list_row_pieces())
            for split in SPLITS:
                self._check_split(split, values)
        if self._manifest.is_packed:
            self._check_names()
        for site in self._manifest.sites if self._manifest.complete else ():
            self._check_statistics(site)

    def _check_counts(self) -> None:
        for split, rows in self._manifest.rows.items():
            texts = self._manifest.text_shards
            found = sum(text["rows"] for text in texts if text["split"] == split)
            if rows > found or rows % self._manifest.rows_per_chunk:
                self._files.note(
                    MANIFEST,
                    f"has {rows} {split} rows, which are not whole chunks of "
                    f"{self._manifest.rows_per_chunk} of the {found} in its text",
                )

    def _check_split(self, split: str, values: Iterator[np.ndarray | None]) -> None:
        shards = [
            (index, shard)
            for index, shard in enumerate(self._files.row_shards)
            if shard.split == split
        ]
        texts = self._iterate_kept(split)
        kept = _regroup(texts, [shard.rows for _, shard in shards])
        written = set(self._files.written)
        for (index, _), expected_n2 in zip(shards, kept, strict=True):
            if index in written:
                self._check_shard(index, expected_n2, values)
        for _ in texts:  # contexts behind the last row
            pass

    def _iterate_kept(self, split: str) -> Iterator[np.ndarray]:
        """(sequence, position) of what should be rows, int32 [n, 2], by file of text;
        -1 where its text cannot tell."""
        values = self._read(self._list_text_pieces(split))
        per_shard = self._manifest.contexts_per_shard
        for index, text in enumerate(self._manifest.text_shards):
            if text["split"] != split:
                continue
            tokens, documents = next(values), next(values)
            kept_n2 = np.full((text["rows"], 2), _UNKNOWN, np.int32)
            if tokens is not None and documents is not None:
                self._check_documents(index, split, documents)
                is_kept = is_row(tokens, documents, self._manifest.excluded_ids)
                found_n2 = np.argwhere(is_kept).astype(np.int32)
                found_n2[:, 0] += index * per_shard
                if len(found_n2) == len(kept_n2):
                    kept_n2 = found_n2
                else:
                    self._files.note(
                        f"tokens/c/{index}/0",
                        f"and its documents give {len(found_n2)} rows, {MANIFEST} has "
                        f"{len(kept_n2)}",
                    )
            yield kept_n2

    def _check_documents(self, shard: int, split: str, documents: np.ndarray) -> None:
        ids = np.unique(documents)
        ids = ids[ids != NO_DOCUMENT]
        file = f"documents/c/{shard}/0"
        if len(ids) and not 0 <= ids[0] <= ids[-1] < len(self._split_of):
            n_documents = len(self._split_of)
            self._files.note(file, f"has ids beyond the {n_documents} there are")
            return
        this = SPLITS.index(split)
        other = ids[(self._split_of[ids] != _UNKNOWN) & (self._split_of[ids] != this)]
        if len(other):
            fault = f"has document {other[0]}, of which another split has a part, too"
            self._files.note(file, fault)
        self._split_of[ids] = this

    def _check_names(self) -> None:
        """A document's name says which split it is in."""
        try:
            names = read_document_names(self._files.folder, self._manifest)
        except ValueError as error:
            self._files.note_error(error)
            return
        every = self._manifest.heldout_every
        for document, (name, known) in enumerate(
            zip(names, self._split_of.tolist(), strict=True)
        ):
            split = "heldout" if is_heldout(name, every) else "train"
            if known not in (_UNKNOWN, SPLITS.index(split)):
                fault = (
                    f"calls document {document} {name!r}, which with heldout_every = "
                    f"{every} is {split}, and its contexts are {SPLITS[known]}"
                )
                self._files.note(DOCUMENTS, fault)
                return

    def _check_shard(
        self, index: int, expected_n2: np.ndarray, values: Iterator[np.ndarray | None]
    ) -> None:
        positions_n2 = next(values)
        is_known_n = (expected_n2 != _UNKNOWN).all(1)
        if positions_n2 is not None:
            is_wrong_n = is_known_n & (positions_n2 != expected_n2).any(1)
            if is_wrong_n.any():
                i = int(is_wrong_n.argmax())
                self._files.note(
                    f"positions/c/{index}/0/0",
                    f"has {is_wrong_n.sum()} rows of other positions than the text: "
                    f"row {i} is {tuple(positions_n2[i].tolist())}, not "
                    f"{tuple(expected_n2[i].tolist())}",
                )
        # Where the text cannot tell, sums by position are not compared.
        places_n = np.maximum(expected_n2[:, 1], 0)
        for site in self._manifest.sites:
            sums = self._add_up(index, site, places_n, values)
            self._check_record(index, site, sums, bool(is_known_n.all()))

    def _add_up(
        self,
        index: int,
        site: str,
        places_n: np.ndarray,
        values: Iterator[np.ndarray | None],
    ) -> Sums | None:
        """The sums of a shard's rows; None if some cannot be read or are not finite."""
        t = self._manifest.context_length
        sums, is_whole = Sums.empty(self._manifest.sites[site], t), True
        for start, stop in self._cut(index, site):
            rows_nd = self._files.take_rows(values)
            if rows_nd is None:
                is_whole = False
                continue
            with np.errstate(invalid="ignore"):  # of infinities, told of below
                part = statistics.add_up(rows_nd, places_n[start:stop], t)
            if not statistics.is_finite(part):
                is_bad = ~np.isfinite(rows_nd.astype(np.float32)).all(1)
                first = start + int(np.flatnonzero(is_bad)[0])
                fault = f"has rows that are not finite: row {first} is the first"
                piece = self._files.split_rows(site, index, start, stop)[-1]
                self._files.note(self._files.name_file(piece), fault)
                is_whole = False
            sums = sums + part
        return sums if is_whole else None

    def _check_record(
        self, index: int, site: str, sums: Sums | None, is_placed: bool
    ) -> None:
        name = record_name(index, site)
        try:
            found = read_record(self._files.folder, index, site)
        except ValueError as error:
            self._files.note_error(error)
            return
        if sums is None:
            return
        scales = {"sum_d": np.sqrt(sums.rows * sums.square_d)}
        wrong = _find_differences(found, sums, scales)
        if not is_placed:
            wrong = [field for field in wrong if not field.endswith("_t")]
        if wrong:
            fault = f"is not what the rows of shard {index} give: {', '.join(wrong)}"
            self._files.note(name, fault)

    def _check_statistics(self, site: str) -> None:
        files, name = self._files, statistics_name(site)
        try:
            found = read_site_statistics(files.folder, site)
        except ValueError as error:
            files.note_error(error)
            return
        try:
            shards = range(len(files.row_shards))
            sums = merge_records(files.folder, files.manifest, site, shards)
        except ValueError:
            return  # noted with the shard
        expected = statistics.finish(sums)
        scales = {"mean_d": np.sqrt(expected.second_moment_d)}
        if wrong := _find_differences(found, expected, scales):
            files.note(name, f"is not what the rows give: {', '.join(wrong)}")
        for field, value in files.manifest.statistics.get(site, {}).items():
            if not _is_close(value, getattr(expected, field)):
                fault = f"has {field} {value} for {site}, the rows give another"
                files.note(MANIFEST, fault)

    def _read(self, pieces: Iterable[Piece]) -> Iterator[np.ndarray | None]:
        for values in self._files.read(pieces):
            self._progress.update(self._files.bytes_read // _MB)
            yield values

    def _list_pieces(self) -> Iterator[Piece]:
        for split in SPLITS:
            yield from self._list_text_pieces(split)
        yield from self._list_row_pieces()

    def _list_text_pieces(self, split: str) -> Iterator[Piece]:
        for index, text in enumerate(self._manifest.text_shards):
            if text["split"] == split:
                for name in ("tokens", "documents"):
                    yield Piece(name, index, 0, text["contexts"])

    def _list_row_pieces(self) -> Iterator[Piece]:
        for index in self._files.written:
            yield Piece("positions", index, 0, self._files.row_shards[index].rows)
            for site in self._manifest.sites:
                for start, stop in self._cut(index, site):
                    yield from self._files.split_rows(site, index, start, stop)

    def _cut(self, index: int, site: str) -> Iterator[tuple[int, int]]:
        """Parts of a shard's rows, in whole chunks."""
        rows, chunk = self._files.row_shards[index].rows, self._manifest.rows_per_chunk
        n_chunks = _PIECE_BYTES // (2 * self._manifest.sites[site] * chunk)
        step = max(1, n_chunks) * chunk
        for start in range(0, rows, step):
            yield start, min(start + step, rows)


def _regroup(parts: Iterator[np.ndarray], lengths: list[int]) -> Iterator[np.ndarray]:
    """The rows of all parts, in pieces of these lengths; -1 when there are no more."""
    held_n2 = np.empty((0, 2), np.int32)
    for length in lengths:
        held, n_held = [held_n2], len(held_n2)
        while n_held < length:
            missing = np.full((length - n_held, 2), _UNKNOWN, np.int32)
            held.append(next(parts, missing))
            n_held += len(held[-1])
        joined = np.concatenate(held)
        yield joined[:length]
        held_n2 = joined[length:]


def _find_differences(
    found: Sums | Statistics,
    expected: Sums | Statistics,
    scales: dict[str, np.ndarray],
) -> list[str]:
    """The fields that differ, by more than rounding of their scale or size."""
    differences = []
    for field in dataclasses.fields(expected):
        values = getattr(found, field.name), getattr(expected, field.name)
        if not _is_close(*values, scales.get(field.name)):
            differences.append(field.name)
    return differences


def _is_close(
    found: float | np.ndarray,
    expected: float | np.ndarray,
    scale: np.ndarray | None = None,
) -> bool:
    if np.shape(found) != np.shape(expected):
        return False
    size = np.abs(expected) if scale is None else scale
    is_nan = np.isnan(found) & np.isnan(expected)
    return bool(np.all(is_nan | (np.abs(found - expected) <= _TOLERANCE * size)))
