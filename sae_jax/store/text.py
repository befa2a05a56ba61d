"""The text of a store: its contexts, and which of their positions are rows.

The rows of a split are the kept positions of its contexts, one context after the other.
A position is kept unless it is padding (document -1) or holds an excluded token.
"""

import bisect
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np
import tensorstore as ts

from sae_jax.store.folder import Folder
from sae_jax.store.layout import SPLITS, Manifest, finish_read, list_text_arrays

NO_DOCUMENT = -1


@dataclasses.dataclass(frozen=True)
class Contexts:
    """Contexts of one split: token ids and document ids, both [n, T] int32."""

    split: str
    tokens: np.ndarray
    documents: np.ndarray


@dataclasses.dataclass(frozen=True)
class Selection:
    """Contexts [n, T], and the positions of them that are wanted as rows."""

    sequences: np.ndarray  # int64 [n], which contexts they are
    tokens: np.ndarray
    is_wanted: np.ndarray  # bool [n, T]

    def list_positions(self) -> np.ndarray:
        """(sequence, position) of the wanted rows, int32 [rows, 2]."""
        context, position = np.nonzero(self.is_wanted)
        return np.stack([self.sequences[context], position], -1).astype(np.int32)


def is_row(
    tokens: np.ndarray, documents: np.ndarray, excluded_ids: Sequence[int]
) -> np.ndarray:
    """Which positions are rows, bool of their shape."""
    kept = documents != NO_DOCUMENT
    return kept & ~np.isin(tokens, excluded_ids) if len(excluded_ids) else kept


@dataclasses.dataclass(frozen=True)
class _Shard:
    """The contexts of a file of text [n, T]: their tokens, the number in its split of
    the row at each position, int64, and whether there is one."""

    tokens: np.ndarray
    rows: np.ndarray
    is_row: np.ndarray


class Text:
    """The contexts of a store whose text is packed, open for reading."""

    def __init__(self, folder: Folder, manifest: Manifest):
        self._folder, self._manifest = folder, manifest
        self._layouts = {array.name: array for array in list_text_arrays(manifest)}
        self._arrays: dict[str, ts.TensorStore] = {}
        self._read_shard = functools.lru_cache(maxsize=64)(self._read_shard_anew)
        self._n_contexts = np.array(
            [shard["contexts"] for shard in manifest.text_shards], np.int64
        )
        # The files of text of each split, and how many of its rows come before each.
        self._shards_of: dict[str, list[int]] = {split: [] for split in SPLITS}
        self._rows_before: dict[str, list[int]] = {split: [] for split in SPLITS}
        total = dict.fromkeys(SPLITS, 0)
        for index, shard in enumerate(manifest.text_shards):
            self._shards_of[shard["split"]].append(index)
            self._rows_before[shard["split"]].append(total[shard["split"]])
            total[shard["split"]] += shard["rows"]

    def sequences(self, split: str) -> np.ndarray:
        """The indices of the split's contexts, ascending, int64."""
        n, shards = self._manifest.contexts_per_shard, self._manifest.text_shards
        parts = [
            np.arange(i * n, i * n + shards[i]["contexts"])
            for i in self._shards_of[split]
        ]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def read(self, name: str, sequences: Sequence[int] | np.ndarray) -> np.ndarray:
        """`tokens` or `documents` of these contexts, int32 [n, T]."""
        sequences = np.asarray(sequences, np.int64)
        values = np.empty((len(sequences), self._manifest.context_length), np.int32)
        array, layout = self._open(name), self._layouts[name]
        reads = [
            (places, layout.shard_file(shard), array[sequences[places]].read())
            for shard, places in self._group(sequences)
        ]
        for places, file, read in reads:
            values[places] = finish_read(read, self._folder, file)
        return values

    def find_rows(
        self, sequences: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The number of the row at each position of contexts, int64 [n, T], and
        whether there is one, bool [n, T]."""
        sequences = np.asarray(sequences, np.int64)
        shape = len(sequences), self._manifest.context_length
        rows, is_there = np.empty(shape, np.int64), np.empty(shape, bool)
        for shard, places in self._group(sequences):
            first = self._manifest.first_row(self._manifest.text_shards[shard]["split"])
            inside = sequences[places] % self._manifest.contexts_per_shard
            found = self._read_shard(shard)
            rows[places] = first + found.rows[inside]
            is_there[places] = found.is_row[inside]
        return rows, is_there

    def select(self, split: str, first: int, n_rows: int) -> Selection:
        """The contexts that hold these rows of the split."""
        shards, before = self._shards_of[split], self._rows_before[split]
        start = bisect.bisect_right(before, first) - 1
        stop = bisect.bisect_left(before, first + n_rows)
        parts = [
            self._select_in(shard, first, n_rows) for shard in shards[start:stop]
        ]
        return Selection(
            np.concatenate([part.sequences for part in parts]),
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.is_wanted for part in parts]),
        )

    def _select_in(self, shard: int, first: int, n_rows: int) -> Selection:
        found = self._read_shard(shard)
        is_wanted = found.is_row & (first <= found.rows) & (found.rows < first + n_rows)
        chosen = np.flatnonzero(is_wanted.any(axis=1))
        sequences = shard * self._manifest.contexts_per_shard + chosen
        return Selection(sequences, found.tokens[chosen], is_wanted[chosen])

    def _read_shard_anew(self, shard: int) -> _Shard:
        split = self._manifest.text_shards[shard]["split"]
        first = shard * self._manifest.contexts_per_shard
        sequences = np.arange(first, first + self._n_contexts[shard])
        tokens = self.read("tokens", sequences)
        documents = self.read("documents", sequences)
        is_kept = is_row(tokens, documents, self._manifest.excluded_ids)
        place = bisect.bisect_left(self._shards_of[split], shard)
        before = self._rows_before[split][place]
        rows = before + np.cumsum(is_kept).reshape(is_kept.shape) - 1
        # The last rows of a split, short of a chunk, are not stored.
        return _Shard(tokens, rows, is_kept & (rows < self._manifest.rows[split]))

    def _open(self, name: str) -> ts.TensorStore:
        if name not in self._arrays:
            n_shards = len(self._manifest.text_shards)
            self._arrays[name] = self._layouts[name].open(self._folder, n_shards)
        return self._arrays[name]

    def _group(self, sequences: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Each file of text that has some of these contexts, and which of them;
        ValueError for one that is not there."""
        shards, places = np.divmod(sequences, self._manifest.contexts_per_shard)
        is_bad = (shards < 0) | (shards >= len(self._n_contexts))
        is_bad[~is_bad] = places[~is_bad] >= self._n_contexts[shards[~is_bad]]
        if is_bad.any():
            raise ValueError(
                f"no context {sequences[is_bad][0]} in {str(self._folder)!r}, which "
                f"has {self._n_contexts.sum()} contexts"
            )
        order = np.argsort(shards, kind="stable")
        found, starts = np.unique(shards[order], return_index=True)
        return zip(found.tolist(), np.split(order, starts)[1:], strict=True)
