"""The rows of shards, read out of a subject that runs over their contexts.

Contexts are taken in batches of one shape, across shards; only the last is filled up.
While one batch is copied to its shards the device computes the next.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from sae_jax.store import Manifest, Stored, Text
from sae_jax.store.text import Selection
from sae_jax.subjects import AnySubject

# (shard, its rows by site, their positions), as `StoreWriter.write_shard` takes them.
ReadShard = tuple[int, dict[str, Stored], np.ndarray]


@dataclasses.dataclass
class _Open:
    """A shard that is being read."""

    index: int
    selection: Selection
    acts: dict[str, np.ndarray]  # [rows, D] bfloat16 by site
    rows_done: int = 0


@dataclasses.dataclass
class _Piece:
    """A run of a shard's contexts in a batch."""

    shard: _Open
    first: int
    n: int

    @property
    def is_last(self) -> bool:
        return self.first + self.n == len(self.shard.selection.tokens)


def read_shards(
    subject: AnySubject,
    text: Text,
    manifest: Manifest,
    shards: Sequence[int],
    batch_contexts: int,
    rows_done: int,
    on_rows: Callable[[int], None],
) -> Iterator[ReadShard]:
    """The rows of these shards, in order. `on_rows` is told how many have been read,
    beginning with `rows_done`."""
    opened = (_open_shard(text, manifest, index) for index in shards)
    before: tuple[dict[str, Any], list[_Piece]] | None = None
    for batch in itertools.chain(_cut_batches(opened, batch_contexts), [None]):
        jax.block_until_ready(before and before[0])
        after = None
        if batch is not None:
            tokens_bt, pieces = batch
            after = subject.capture(tokens_bt, tuple(manifest.sites)), pieces
        if before is not None:
            rows_done += _copy(*before)
            on_rows(rows_done)
            for piece in before[1]:
                if piece.is_last:
                    yield _finish(piece.shard, manifest)
        before = after


def _open_shard(text: Text, manifest: Manifest, index: int) -> _Open:
    shard = manifest.row_shards[index]
    acts = {
        site: np.empty((shard.rows, width), ml_dtypes.bfloat16)
        for site, width in manifest.sites.items()
    }
    return _Open(index, text.select(shard.split, shard.first, shard.rows), acts)


def _cut_batches(
    shards: Iterable[_Open], batch_contexts: int
) -> Iterator[tuple[np.ndarray, list[_Piece]]]:
    """Tokens [batch_contexts, T], and whose they are."""
    tokens: list[np.ndarray] = []
    pieces: list[_Piece] = []
    room = batch_contexts
    for shard in shards:
        all_tokens, first = shard.selection.tokens, 0
        while first < len(all_tokens):
            n = min(room, len(all_tokens) - first)
            tokens.append(all_tokens[first : first + n])
            pieces.append(_Piece(shard, first, n))
            first, room = first + n, room - n
            if not room:
                yield np.concatenate(tokens), pieces
                tokens, pieces, room = [], [], batch_contexts
    if pieces:
        yield np.pad(np.concatenate(tokens), ((0, room), (0, 0))), pieces


def _copy(captured: Mapping[str, Any], pieces: Sequence[_Piece]) -> int:
    """Copies the wanted rows of a batch to their shards; returns how many."""
    # As uint16, because NumPy moves bfloat16 slowly.
    acts = {site: np.asarray(acts).view(np.uint16) for site, acts in captured.items()}
    start, total = 0, 0
    for piece in pieces:
        shard, stop = piece.shard, start + piece.n
        is_wanted_nt = shard.selection.is_wanted[piece.first : piece.first + piece.n]
        n_rows = int(is_wanted_nt.sum())
        rows = slice(shard.rows_done, shard.rows_done + n_rows)
        for site, acts_btd in acts.items():
            # A mask would copy once more than needed.
            wanted = slice(None) if is_wanted_nt.all() else is_wanted_nt
            acts_nd = acts_btd[start:stop][wanted].reshape(n_rows, -1)
            shard.acts[site].view(np.uint16)[rows] = acts_nd
        shard.rows_done += n_rows
        start, total = stop, total + n_rows
    return total


def _finish(shard: _Open, manifest: Manifest) -> ReadShard:
    stored = {
        site: Stored.encode(acts, manifest.dtype) for site, acts in shard.acts.items()
    }
    return shard.index, stored, shard.selection.list_positions()
