"""From text to an activation store: pack the text, run the subject over it, write.

Every position of every context that `sae_jax.packing` makes of the text is a row.

A harvest that was stopped, at any moment and in any way, goes on when it is run again
with the same settings, and leaves the same bytes as one that was not.
"""

import functools
import hashlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from sae_jax.files import refuse_remote
from sae_jax.packing import Packed, identify, pack
from sae_jax.progress import Progress
from sae_jax.store import (
    SPLITS,
    Manifest,
    Shard,
    Store,
    StoreWriter,
    check_same_settings,
    open_store,
    read_begun,
)
from sae_jax.subjects import Subject
from sae_jax.text import Document

# A shard of 16384 rows is one file: 8 MB of D = 256, 134 MB of D = 4096.
ROWS_PER_SHARD = 16384
ROWS_PER_CHUNK = 1024
HELDOUT_EVERY = 5
BATCH_SEQUENCES = 16


def harvest(
    subject: Subject,
    documents: Sequence[Document],
    out: str | Path,
    sites: Sequence[str],
    *,
    context_length: int | None = None,
    max_rows: int | None = None,
    heldout_every: int = HELDOUT_EVERY,
    rows_per_shard: int = ROWS_PER_SHARD,
    rows_per_chunk: int = ROWS_PER_CHUNK,
    batch_sequences: int = BATCH_SEQUENCES,
    seed: int = 0,
    progress: bool = True,
) -> Store:
    """The store at `out` of the subject's activations at `sites` over `documents`.

    Begins the store, goes on with one that was begun with the same settings, or opens
    one that is complete. `context_length` is the subject's if None; all rows are kept
    if `max_rows` is None; one document in `heldout_every` is held out. With `progress`
    a line on stderr tells how far it is. Raises ValueError for settings, text or a
    folder that cannot be used, and OSError if the disk is full.
    """
    refuse_remote(out)
    if context_length is None:
        context_length = subject.context_length
    settings: dict[str, Any] = {
        "subject": {
            "name": subject.name,
            "identity": subject.identity,
            "dtype": subject.dtype,
        },
        "tokenizer": hashlib.sha256(subject.tokenizer.to_str().encode()).hexdigest(),
        "corpus": identify(documents),
        "sites": {site: subject.width(site) for site in sites},
        "context_length": context_length,
        "heldout_every": heldout_every,
        "max_rows": max_rows,
        "seed": seed,
        "rows_per_shard": rows_per_shard,
        "rows_per_chunk": rows_per_chunk,
    }
    _check_settings(settings, subject.context_length, batch_sequences)
    begun = read_begun(out)
    if begun is not None:
        check_same_settings(out, begun, settings)
        if begun.complete:
            if progress:
                print(f"harvest: {str(out)!r} is complete", file=sys.stderr)
            return open_store(out)
    packed = pack(
        subject.tokenizer,
        subject.bos_id,
        documents,
        context_length,
        heldout_every,
        max_rows,
        seed,
    )
    with StoreWriter(out, _plan(settings, packed), packed.names) as writer:
        total = sum(writer.manifest.rows.values())
        if progress:
            print(
                f"harvest: {len(packed.names):,} documents, {total:,} rows of "
                f"{', '.join(sites)} to {str(out)!r}",
                file=sys.stderr,
            )
        with Progress(total, "rows", "harvest", is_shown=progress) as line:
            _write_shards(subject, packed, writer, batch_sequences, line)
        writer.finish()
    return open_store(out)


def _check_settings(
    settings: Mapping[str, Any], longest_context: int, batch_sequences: int
) -> None:
    t, max_rows = settings["context_length"], settings["max_rows"]
    shard, chunk = settings["rows_per_shard"], settings["rows_per_chunk"]
    least = {"context_length": 1, "heldout_every": 2, "rows_per_chunk": 1, "seed": 0}
    for name, value in least.items():
        if settings[name] < value:
            raise ValueError(f"{name} = {settings[name]}: must be at least {value}")
    if batch_sequences < 1:
        raise ValueError(f"batch_sequences = {batch_sequences}: must be at least 1")
    if not settings["sites"]:
        raise ValueError("no sites: give at least one, as resid_post.3")
    if t > longest_context:
        raise ValueError(
            f"context_length = {t} is more than the subject's {longest_context}"
        )
    if shard < 1 or shard % t or shard % chunk:
        nearest = math.lcm(t, chunk) * max(1, round(shard / math.lcm(t, chunk)))
        raise ValueError(
            f"rows_per_shard = {shard} is not a multiple of context_length = {t} and "
            f"of rows_per_chunk = {chunk}: make it {nearest}"
        )
    if max_rows is not None and max_rows < 2 * t:
        raise ValueError(
            f"max_rows = {max_rows} is less than a train and a heldout context of "
            f"context_length = {t}: make it at least {2 * t}"
        )


def _plan(settings: Mapping[str, Any], packed: Packed) -> Manifest:
    """The manifest of a store that holds the contexts: train shards, then heldout."""
    per_shard = settings["rows_per_shard"]
    rows = {split: packed.tokens[split].size for split in SPLITS}
    return Manifest(
        **settings,
        n_documents=len(packed.names),
        rows=rows,
        dropped_tokens=packed.dropped_tokens,
        shards=[
            {"split": split, "rows": min(per_shard, rows[split] - start)}
            for split in SPLITS
            for start in range(0, rows[split], per_shard)
        ],
    )


def _write_shards(
    subject: Subject,
    packed: Packed,
    writer: StoreWriter,
    batch_sequences: int,
    line: Progress,
) -> None:
    """Runs the subject over the contexts of every shard that is not written yet."""
    manifest = writer.manifest
    t = manifest.context_length
    done = sum(shard["rows"] for shard in manifest.shards[: manifest.shards_written])
    subject = jax.device_put(subject)
    for tokens, documents in _list_shards(manifest, packed)[manifest.shards_written :]:
        acts = {
            site: np.empty((tokens.size, width), ml_dtypes.bfloat16)
            for site, width in manifest.sites.items()
        }
        for first, n, captured in _run(
            subject, tokens, tuple(manifest.sites), batch_sequences
        ):
            for site, acts_btd in captured.items():
                rows = np.asarray(acts_btd)[:n].reshape(n * t, -1)
                acts[site][first * t : (first + n) * t] = rows
            done += n * t
            line.update(done)
        writer.write_shard(Shard(acts, tokens, documents))


def _list_shards(
    manifest: Manifest, packed: Packed
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The token and document ids of every shard."""
    step = manifest.rows_per_shard // manifest.context_length
    return [
        (tokens[first : first + step], packed.documents[split][first : first + step])
        for split, tokens in packed.tokens.items()
        for first in range(0, len(tokens), step)
    ]


def _run(
    subject: Subject, tokens: np.ndarray, sites: tuple[str, ...], batch_sequences: int
) -> Iterator[tuple[int, int, dict[str, jax.Array]]]:
    """(first sequence, how many, activations) of each batch of the sequences.

    All batches have one shape, the last is padded. While the caller has one batch the
    device computes the next.
    """
    before = None
    for first in range(0, len(tokens), batch_sequences):
        part = tokens[first : first + batch_sequences]
        padding = ((0, batch_sequences - len(part)), (0, 0))
        jax.block_until_ready(before)
        captured = _capture(subject, np.pad(part, padding), sites)
        if before is not None:
            yield before
        before = (first, len(part), captured)
    if before is not None:
        yield before


@functools.partial(jax.jit, static_argnames="sites")
def _capture(
    subject: Subject, tokens_bt: jax.Array, sites: tuple[str, ...]
) -> dict[str, jax.Array]:
    _, acts = subject.forward(tokens_bt, capture=sites, logits=False)
    return {site: acts[site].astype(jnp.bfloat16) for site in sites}
