"""What a harvest takes beside the subject's own forward pass, and what int8 costs.

    python experiments/bench_harvest.py

Harvests `resid_post.3` of the default subject over 524,288 tokens of the standard
library in bfloat16 and in int8, and between them runs the same subject over the same
contexts, cut off after the site, in the same batches, keeping nothing. The text is
packed before, and counted by itself. The figures are rows a second, of each round; the
last line is one JSON object with the medians. Some 3 minutes on 2 cores.

On 2 cores, in bfloat16 95 to 97 % of the bare pass, in int8 95 to 99 %:

| pack | bfloat16 | int8 | bare |
|---|---|---|---|
| 838,739 | 23,261 | 23,991 | 24,345 |
| 675,025 | 22,383 | 22,341 | 23,188 |
| 782,922 | 23,378 | 23,531 | 24,722 |
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from runs import print_header, print_row
from timing import describe_setting

from sae_jax.harvest import (
    BATCH_CONTEXTS,
    HELDOUT_EVERY,
    ROWS_PER_CHUNK,
    ROWS_PER_SHARD,
    harvest,
    plan_store,
    write_text,
)
from sae_jax.store import SPLITS, Folder, Manifest, Store, StoreWriter
from sae_jax.subjects import Subject, load_subject
from sae_jax.text import Corpus, standard_library

SITE = "resid_post.3"

_ROWS = flags.DEFINE_integer("rows", 524_288, "of each harvest")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "how often all is done", lower_bound=1)


def main(argv: list[str]) -> None:
    del argv
    subject, corpus = load_subject(), standard_library()
    figures: dict[str, list[float]] = {
        name: [] for name in ("pack", "bfloat16", "int8", "bare")
    }
    print_header(list(figures))
    with tempfile.TemporaryDirectory() as name:
        for round_ in range(_ROUNDS.value):
            stores = {}
            for dtype in ("bfloat16", "int8"):
                path = Path(name, f"{dtype}-{round_}")
                figures["pack"].append(_pack(subject, corpus, path, dtype))
                stores[dtype], rate = _harvest(subject, corpus, path, dtype)
                figures[dtype].append(rate)
            figures["bare"].append(_run_bare(subject, stores["int8"]))
            print_row([f"{rates[-1]:,.0f}" for rates in figures.values()])
        nmse = _measure_error(stores["bfloat16"], stores["int8"])
    medians = {name: statistics.median(rates) for name, rates in figures.items()}
    for dtype in ("bfloat16", "int8"):
        medians[f"{dtype}_of_bare"] = medians[dtype] / medians["bare"]
    summary = medians | {"int8_nmse": nmse, "all": figures}
    print(json.dumps(describe_setting() | summary))


def _pack(subject: Subject, corpus: Corpus, path: Path, dtype: str) -> float:
    """Packs the text of a store; rows a second."""
    manifest = plan_store(
        subject,
        [SITE],
        corpus=corpus.identity,
        context_length=subject.context_length,
        max_rows=_ROWS.value,
        dtype=dtype,
        heldout_every=HELDOUT_EVERY,
        rows_per_shard=ROWS_PER_SHARD,
        rows_per_chunk=ROWS_PER_CHUNK,
        seed=0,
    )
    begin = time.perf_counter()
    with StoreWriter(Folder(path), manifest) as writer:
        write_text(subject, corpus, writer, progress=False)
        return _count(writer.manifest) / (time.perf_counter() - begin)


def _harvest(
    subject: Subject, corpus: Corpus, path: Path, dtype: str
) -> tuple[Store, float]:
    """A store of packed text, and the rows a second that it took."""
    settings: dict[str, Any] = {"max_rows": _ROWS.value, "dtype": dtype}
    begin = time.perf_counter()
    store = harvest(subject, corpus, path, [SITE], progress=False, **settings)
    assert store is not None
    return store, _count(store.manifest) / (time.perf_counter() - begin)


def _run_bare(subject: Subject, store: Store) -> float:
    """The subject alone over all contexts; rows a second."""
    sequences = np.concatenate([store.sequences(split) for split in SPLITS])
    tokens = store.read_tokens(sequences)
    begin, before = time.perf_counter(), None
    for first in range(0, len(tokens), BATCH_CONTEXTS):
        part = tokens[first : first + BATCH_CONTEXTS]
        part = np.resize(part, (BATCH_CONTEXTS, tokens.shape[1]))
        jax.block_until_ready(before)
        before = subject.capture(part, (SITE,))
    jax.block_until_ready(before)
    return _count(store.manifest) / (time.perf_counter() - begin)


def _measure_error(exact: Store, coarse: Store) -> float:
    """The nmse of all train rows in int8."""
    error, mean_d = 0.0, exact.statistics(SITE).mean_d
    variation = 0.0
    for part in exact.shards("train"):
        rows, stored = (
            store.read_ranges(SITE, [part]).astype(float) for store in (exact, coarse)
        )
        error += np.square(rows - stored).sum()
        variation += np.square(rows - mean_d).sum()
    return error / variation


def _count(manifest: Manifest) -> int:
    return sum(manifest.rows.values())


if __name__ == "__main__":
    app.run(main)
