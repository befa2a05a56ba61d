"""From text to an activation store: pack the text, run the subject over it, write.

    harvest(load_subject(), standard_library(), "store/", ["resid_post.3"])

Every position of the contexts that `sae_jax.packing` makes of the text is a row, less
padding and, with `exclude_special`, special tokens. All sites are read in one pass.

A harvest that was stopped, at any moment and in any way, goes on when it is run again
with the same settings; of a complete store it makes anew what is missing, all but the
text. Several processes, each told which of how many it is, share one store: the first
packs the text, and then each writes shards of its own. However it was done, the bytes
are the same.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sae_jax.config.fields import check_at_least
from sae_jax.packing import TOKEN_BYTES, Layout, pack
from sae_jax.progress import Progress
from sae_jax.readout import read_shards
from sae_jax.store import (
    Folder,
    Manifest,
    Store,
    StoreWriter,
    Text,
    check_place,
    choose_manifest,
    is_whole,
    open_store,
)
from sae_jax.store.layout import list_row_arrays
from sae_jax.subjects import AnySubject
from sae_jax.text import Corpus

# A shard of 16384 rows is one file: 8 MB of D = 256, 134 MB of D = 4096.
ROWS_PER_SHARD = 16384
# The fewer, the more contexts a batch of the loader mixes; 64 still read at 2 GB/s.
ROWS_PER_CHUNK = 64
HELDOUT_EVERY = 5
BATCH_CONTEXTS = 16
# Tokens in a context unless asked for: what some subjects read, no memory holds.
CONTEXT_LENGTH = 2048
WAIT_SECS = 600.0
_POLL_SECS = 1.0
_GB = 10**9


def harvest(
    subject: AnySubject,
    corpus: Corpus,
    out: str | Path,
    sites: Sequence[str],
    *,
    context_length: int | None = None,
    max_rows: int | None = None,
    max_gb: float | None = None,
    dtype: str = "bfloat16",
    packing: str = "joined",
    bos: str | None = None,
    exclude_special: bool = False,
    heldout_every: int = HELDOUT_EVERY,
    rows_per_shard: int = ROWS_PER_SHARD,
    rows_per_chunk: int = ROWS_PER_CHUNK,
    batch_contexts: int = BATCH_CONTEXTS,
    seed: int = 0,
    process: int = 0,
    n_processes: int = 1,
    wait_secs: float = WAIT_SECS,
    progress: bool = True,
) -> Store | None:
    """The store at `out` of the subject's activations at `sites` over the text.

    Begins the store, goes on with one that was begun with the same settings, or opens
    one that is complete, once it has made anew the files of rows that it lacks.

    Args:
        subject: where the activations are read.
        corpus: the text, from `sae_jax.text`.
        out: a folder, or a gs:// or s3:// address.
        sites: as `resid_post.3`.
        context_length: tokens in a context; None: what the subject reads, at most
            2048.
        max_rows: of both splits together; None: all the text gives.
        max_gb: the size of rows and text, at most, in 10^9 bytes; None: any.
        dtype: `bfloat16`, or `int8` with a scale for each row.
        packing: `joined` or `padded`, see `sae_jax.packing`.
        bos: what the beginning-of-sequence token leads: each `document`, each
            `context`, or `none`; None: documents, if the subject has such a token.
        exclude_special: leave out rows of special tokens.
        heldout_every: one document in so many is held out.
        rows_per_shard: rows in a file.
        rows_per_chunk: rows in one read.
        batch_contexts: contexts that the subject reads at a time.
        seed: of the order of documents.
        process: which of `n_processes` this is, from 0.
        n_processes: that share the work.
        wait_secs: how long to wait, at most, for the first process to pack text.
        progress: tell on stderr how far it is.

    Returns:
        The store; None if other processes have not written their shards yet.

    Raises:
        ValueError: settings, text or a folder that cannot be used.
        OSError: the disk is full, or the service at `out` does not answer.
        TimeoutError: the first process does not pack the text.
    """
    folder = Folder(out)
    if bos is None:
        bos = "none" if subject.bos_id is None else "document"
    if not sites:
        raise ValueError("no sites: give at least one, as resid_post.3")
    manifest = plan_store(
        subject,
        sites,
        corpus="",
        context_length=context_length,
        max_rows=max_rows,
        max_gb=max_gb,
        dtype=dtype,
        packing=packing,
        bos=bos,
        excluded_ids=sorted(subject.special_ids) if exclude_special else [],
        heldout_every=heldout_every,
        rows_per_shard=rows_per_shard,
        rows_per_chunk=rows_per_chunk,
        seed=seed,
    )
    _check_share(batch_contexts, process, n_processes)
    check_place(folder, manifest)
    manifest.corpus = corpus.identity  # last: this reads all the text
    begun = choose_manifest(folder, manifest)
    if process and not begun.is_packed:
        begun = wait_for_text(folder, manifest, wait_secs, progress)
    if begun.complete and is_whole(folder, begun):
        _tell(f"{str(folder)!r} is complete", progress)
        return open_store(out)
    if begun.complete:
        _tell(f"making anew what {str(folder)!r} lacks", progress)
    with StoreWriter(folder, manifest, process, n_processes) as writer:
        if not writer.manifest.is_packed:
            write_text(subject, corpus, writer, progress)
        _write_rows(subject, writer, batch_contexts, (process, n_processes), progress)
        is_complete = writer.finish()
    return open_store(out) if is_complete else None


def plan_store(
    subject: AnySubject, sites: Sequence[str], **settings: Any
) -> Manifest:
    """The manifest of a store whose text is still to be packed; `settings` are its
    other fields, `context_length` None for the usual one. ValueError for what cannot
    be."""
    if settings["context_length"] is None:
        settings["context_length"] = min(CONTEXT_LENGTH, subject.context_length)
    t, chunk = settings["context_length"], settings["rows_per_chunk"]
    shard, max_rows = settings["rows_per_shard"], settings["max_rows"]
    least = {"context_length": 1, "heldout_every": 2, "rows_per_chunk": 1, "seed": 0}
    for name, lowest in least.items():
        check_at_least(name, settings[name], lowest)
    if t > subject.context_length:
        raise ValueError(
            f"context_length = {t} is more than the subject's {subject.context_length}"
        )
    if shard < 1 or shard % chunk:
        raise ValueError(
            f"rows_per_shard = {shard} is not a multiple of rows_per_chunk = {chunk}: "
            f"make it {chunk * max(1, round(shard / chunk))}"
        )
    if max_rows is not None and max_rows < 2 * t:
        raise ValueError(
            f"max_rows = {max_rows} is less than two contexts of {t}, one for each "
            f"split: make it at least {2 * t}"
        )
    manifest = Manifest(
        subject={
            "name": subject.name,
            "identity": subject.identity,
            "dtype": subject.dtype,
        },
        tokenizer=hashlib.sha256(subject.tokenizer.to_str().encode()).hexdigest(),
        sites={site: subject.width(site) for site in sites},
        bos_id=subject.bos_id,
        contexts_per_shard=max(1, shard // t),
        **settings,
    )
    _check_size(manifest)
    return manifest


def _check_share(batch_contexts: int, process: int, n_processes: int) -> None:
    check_at_least("batch_contexts", batch_contexts, 1)
    check_at_least("n_processes", n_processes, 1)
    if not 0 <= process < n_processes:
        raise ValueError(
            f"process = {process} of n_processes = {n_processes}: the first is 0, the "
            f"last {n_processes - 1}"
        )


def _check_size(manifest: Manifest) -> None:
    if manifest.max_gb is None:
        return
    size = _count_row_bytes(manifest) + TOKEN_BYTES
    rows = int(manifest.max_gb * _GB / size)
    least = 2 * max(manifest.context_length, manifest.rows_per_chunk)
    if rows < least:
        raise ValueError(
            f"max_gb = {manifest.max_gb:g} holds {rows} rows of {size} bytes, and the "
            f"least is {least}, a context and a chunk of each split: raise it"
        )


def _count_row_bytes(manifest: Manifest) -> int:
    """What a row takes, with its position and its scales."""
    arrays = list_row_arrays(manifest)
    return sum(array.item_bytes for array in arrays)


def wait_for_text(
    folder: Folder,
    manifest: Manifest,
    wait_secs: float = WAIT_SECS,
    progress: bool = True,
) -> Manifest:
    """The manifest once the first process has packed the text. Each shard of text that
    it writes gives it `wait_secs` more."""
    _tell("waiting for process 0 to pack the text", progress)
    last_change, n_files = time.monotonic(), -1
    while time.monotonic() < last_change + wait_secs:
        begun = choose_manifest(folder, manifest)
        if begun.is_packed:
            return begun
        n_now = len(folder.list("tokens/c/"))
        if n_now != n_files:
            last_change, n_files = time.monotonic(), n_now
        time.sleep(_POLL_SECS)
    raise TimeoutError(
        f"process 0 wrote no text to {folder} for {wait_secs:g} s: see whether it "
        "runs, and run this one again"
    )


def write_text(
    subject: AnySubject,
    corpus: Corpus,
    writer: StoreWriter,
    progress: bool = True,
    on_rows: Callable[[int], None] = lambda n_rows: None,
) -> None:
    """Packs the text for the subject, and writes it; tells how many rows it gave."""
    manifest = writer.manifest
    layout = Layout(
        context_length=manifest.context_length,
        vocab_size=subject.vocab_size,
        bos_id=subject.bos_id,
        pad_id=subject.pad_id,
        packing=manifest.packing,
        bos=manifest.bos,
        excluded_ids=tuple(manifest.excluded_ids),
    )
    packer = pack(
        corpus.iterate(manifest.seed),
        subject.tokenizer,
        layout,
        heldout_every=manifest.heldout_every,
        max_rows=manifest.max_rows,
        max_bytes=None if manifest.max_gb is None else int(manifest.max_gb * _GB),
        row_bytes=_count_row_bytes(manifest),
        rows_per_chunk=manifest.rows_per_chunk,
        sequences_per_block=manifest.contexts_per_shard,
    )
    with Progress(manifest.max_rows, "rows", "pack", is_shown=progress) as line:

        def tell(n_rows: int) -> None:
            line.update(n_rows)
            on_rows(n_rows)

        writer.write_text(packer, tell)


def _write_rows(
    subject: AnySubject,
    writer: StoreWriter,
    batch_contexts: int,
    part: tuple[int, int],
    progress: bool,
) -> None:
    """Runs the subject over the contexts of every shard that is not written yet."""
    manifest, missing = writer.manifest, writer.missing_shards()
    of_us = manifest.row_shards[part[0] :: part[1]]
    total = sum(shard.rows for shard in of_us)
    done = total - sum(manifest.row_shards[index].rows for index in missing)
    shared = f", part {part[0]} of {part[1]}" if part[1] > 1 else ""
    _tell(
        f"{manifest.n_documents:,} documents, {total:,} rows of "
        f"{', '.join(manifest.sites)} to {str(writer.folder)!r}{shared}",
        progress,
    )
    text = Text(writer.folder, manifest)
    with Progress(total, "rows", "harvest", is_shown=progress) as line:
        for shard in read_shards(
            subject, text, manifest, missing, batch_contexts, done, line.update
        ):
            writer.write_shard(*shard)


def _tell(what: str, progress: bool) -> None:
    if progress:
        print(f"harvest: {what}", file=sys.stderr)
