"""Stores written from arrays, and writing that fails on its way."""

import ml_dtypes
import numpy as np

from sae_jax.store import (
    SPLITS,
    Contexts,
    Folder,
    Manifest,
    Stored,
    StoreWriter,
    Text,
    is_row,
)


class Blocks:
    """Contexts as `StoreWriter.write_text` takes them."""

    def __init__(self, contexts, names, rows_per_chunk=1, excluded_ids=()):
        self.contexts, self.names = contexts, names
        self.dropped_tokens = dict.fromkeys(SPLITS, 0)
        kept = dict.fromkeys(SPLITS, 0)
        for block in contexts:
            rows = is_row(block.tokens, block.documents, excluded_ids)
            kept[block.split] += int(rows.sum())
        self.rows = {s: n // rows_per_chunk * rows_per_chunk for s, n in kept.items()}

    def __iter__(self):
        return iter(self.contexts)


def make_manifest(sites, context_length, rows_per_shard, rows_per_chunk, **fields):
    """The settings of a store, before its text is packed."""
    settings = dict(
        subject={"name": "planted", "identity": "0", "dtype": "float32"},
        tokenizer="0",
        corpus="0",
        sites=sites,
        context_length=context_length,
        heldout_every=5,
        max_rows=None,
        seed=0,
        rows_per_shard=rows_per_shard,
        rows_per_chunk=rows_per_chunk,
        contexts_per_shard=max(1, rows_per_shard // context_length),
    )
    return Manifest(**(settings | fields))


def write_shards(writer: StoreWriter, acts: dict, indices=None) -> None:
    """Writes the missing shards; acts[split][site] are all rows of a split."""
    manifest = writer.manifest
    text = Text(writer.folder, manifest)
    for index in writer.missing_shards() if indices is None else indices:
        shard = manifest.row_shards[index]
        rows = slice(shard.first, shard.first + shard.rows)
        stored = {
            site: Stored.encode(acts[shard.split][site][rows], manifest.dtype)
            for site in manifest.sites
        }
        selection = text.select(shard.split, shard.first, shard.rows)
        writer.write_shard(index, stored, selection.list_positions())


def write(path, manifest, blocks, names, finish=True):
    """Writes a store whole.

    `blocks` are (split, acts by site [n T, D], tokens [n, T], documents [n, T]) of at
    most `contexts_per_shard` contexts; what is no row is left out of the acts.
    """
    contexts = [Contexts(split, tokens, ids) for split, _, tokens, ids in blocks]
    excluded_ids = manifest.excluded_ids
    acts = {
        split: {
            site: np.concatenate(
                [np.empty((0, width), ml_dtypes.bfloat16)]
                + [
                    rows[site][is_row(*text, excluded_ids).ravel()]
                    for part, rows, *text in blocks
                    if part == split
                ]
            )
            for site, width in manifest.sites.items()
        }
        for split in SPLITS
    }
    with StoreWriter(Folder(path), manifest) as writer:
        if not writer.manifest.is_packed:
            per_chunk = manifest.rows_per_chunk
            writer.write_text(Blocks(contexts, names, per_chunk, excluded_ids))
        write_shards(writer, acts)
        if finish:
            assert writer.finish()
    return path


def fail_after(monkeypatch, owner, name, n_calls, error):
    """So many calls of the owner's method pass, every later one raises the error."""
    method, n_left = getattr(owner, name), n_calls

    def call(*arguments):
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise error
        return method(*arguments)

    monkeypatch.setattr(owner, name, call)
