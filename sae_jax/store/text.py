"""The text of a store: its contexts, and which of their positions are rows.

The rows of a split are the kept positions of its contexts, one context after the other.
A position is kept unless it is padding (document -1) or holds an excluded token.
"""

import bisect
import dataclasses
import functools
from collections.abc import Sequence

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


class Text:
    """The contexts of a store whose text is packed, open for reading."""

    def __init__(self, folder: Folder, manifest: Manifest):
        self._folder, self._manifest = folder, manifest
        self._layouts = {array.name: array for array in list_text_arrays(manifest)}
        self._arrays: dict[str, ts.TensorStore] = {}
        self._find_shard = functools.lru_cache(maxsize=64)(self._find_shard_rows)
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

    def read(self, name: str, sequences: np.ndarray) -> np.ndarray:
        """`tokens` or `documents` of these contexts, int32 [n, T]."""
        sequences = np.asarray(sequences, np.int64)
        self._check(sequences)
        values = np.empty((len(sequences), self._manifest.context_length), np.int32)
        shards = sequences // self._manifest.contexts_per_shard
        array = self._open(name)
        reads = [
            (shard, shards == shard, array[sequences[shards == shard]].read())
            for shard in np.unique(shards)
        ]
        for shard, inside, read in reads:
            values[inside] = finish_read(
                read, self._folder, self._layouts[name].shard_file(int(shard))
            )
        return values

    def find_rows(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The number of the row at each position of contexts, int64 [n, T], and
        whether there is one, bool [n, T]."""
        n, t = self._manifest.contexts_per_shard, self._manifest.context_length
        rows = np.empty((len(sequences), t), np.int64)
        is_kept = np.empty((len(sequences), t), bool)
        for i, sequence in enumerate(np.asarray(sequences).tolist()):
            shard, place = divmod(sequence, n)
            rows_nt, is_kept_nt = self._find_shard(shard)
            split = self._manifest.text_shards[shard]["split"]
            rows[i] = self._manifest.first_row(split) + rows_nt[place]
            is_kept[i] = is_kept_nt[place]
        return rows, is_kept

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
        rows_nt, is_kept_nt = self._find_shard(shard)
        is_wanted = is_kept_nt & (first <= rows_nt) & (rows_nt < first + n_rows)
        chosen = np.flatnonzero(is_wanted.any(axis=1))
        sequences = shard * self._manifest.contexts_per_shard + chosen
        tokens = self.read("tokens", sequences)
        return Selection(sequences, tokens, is_wanted[chosen])

    def _find_shard_rows(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        split = self._manifest.text_shards[shard]["split"]
        n = self._manifest.contexts_per_shard
        contexts = self._manifest.text_shards[shard]["contexts"]
        sequences = np.arange(shard * n, shard * n + contexts)
        is_kept = is_row(
            self.read("tokens", sequences),
            self.read("documents", sequences),
            self._manifest.excluded_ids,
        )
        place = bisect.bisect_left(self._shards_of[split], shard)
        before = self._rows_before[split][place]
        rows = before + np.cumsum(is_kept).reshape(is_kept.shape) - 1
        # The last rows of a split, short of a chunk, are not stored.
        return rows, is_kept & (rows < self._manifest.rows[split])

    def _open(self, name: str) -> ts.TensorStore:
        if name not in self._arrays:
            n_shards = len(self._manifest.text_shards)
            self._arrays[name] = self._layouts[name].open(self._folder, n_shards)
        return self._arrays[name]

    def _check(self, sequences: np.ndarray) -> None:
        n, shards = self._manifest.contexts_per_shard, self._manifest.text_shards
        filled = np.array([shard["contexts"] for shard in shards], np.int64)
        shard = sequences // n
        bad = (shard < 0) | (shard >= len(shards))
        bad[~bad] = sequences[~bad] % n >= filled[shard[~bad]]
        if bad.any():
            raise ValueError(
                f"no context {sequences[bad][0]} in {str(self._folder)!r}, which has "
                f"{filled.sum()} contexts"
            )
