"""How fast the loader gives rows in host memory, against raw reads of the same bytes.

    python experiments/bench_loader.py [--folder=FOLDER]

Writes a store of 4.3 GB of random rows (D = 1024, bfloat16) to a temporary folder, or
once to the one given, and reads it from the page cache, in rounds of

    raw       all shard files from end to end into a buffer, without checksums
    loader    20 GB of batches of 2,048 rows, mixed as in training, from first to last:
              the window that is waited for at first is counted in, and nothing was
              read ahead; a checksum of every chunk is verified
    rows      one random row at a time, 2 s of it, checksums verified

CPU is the processor's time, of all threads, for each second; on a machine that others
use, GB for each CPU second tells more than GB for each second. Needs 5 GB of disk and
8 GB of memory; some 2 minutes on 2 cores. The last line is one JSON object with the
median GB/s of each reader's rounds, and the least.

On 2 cores of a virtual machine that nothing else used, Python 3.11, chunks of 64 rows;
of the machine's memory, two kinds were met. With --rounds=3 on the faster one:

| reader | GB | GB/s | CPU | GB per CPU second |
|---|---|---|---|---|
| raw | 4.3 | 9.7, 12.7, 14.2 | 1.0 | 9.7, 12.7, 14.2 |
| loader | 20 | 4.17, 3.31, 4.20 | 1.7 | 2.0 to 2.3 |
| rows | 0.02 | 0.0072, 0.0086, 0.0092 | 1.0 | 0.008 |

and with --rounds=4 on the slower:

| reader | GB | GB/s | CPU | GB per CPU second |
|---|---|---|---|---|
| raw | 4.3 | 4.6, 5.1, 5.5, 5.8 | 1.0 | 4.6, 5.2, 5.6, 5.9 |
| loader | 20 | 1.91, 2.21, 2.05, 2.38 | 1.7 | 1.14, 1.27, 1.20, 1.37 |
| rows | 0.01 | 0.0044, 0.0049, 0.0054, 0.0058 | 1.1 | 0.005 |
"""

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from absl import app, flags
from runs import print_header, print_row
from timing import describe_setting

from sae_jax import loader
from sae_jax.config import DataConfig
from sae_jax.store import (
    Contexts,
    Folder,
    Manifest,
    Store,
    Stored,
    StoreWriter,
    open_store,
)

D_MODEL, CONTEXT, SHARD_ROWS = 1024, 128, 65_536
SITE = "resid_post.0"
GB = 1e9

_FOLDER = flags.DEFINE_string("folder", None, "of the store; made if it is not there")
_STORE_GB = flags.DEFINE_float("store_gb", 4.3, "of rows in a new store")
_READ_GB = flags.DEFINE_float("read_gb", 20.0, "through the loader in each round")
_CHUNK = flags.DEFINE_integer("rows_per_chunk", 64, "of a new store")
_BATCH = flags.DEFINE_integer("batch_rows", 2048, "of a batch")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "how often all is done", lower_bound=1)
_ROW_SECONDS = 2.0


def main(argv: list[str]) -> None:
    del argv
    with contextlib.ExitStack() as stack:
        path = Path(
            _FOLDER.value or stack.enter_context(tempfile.TemporaryDirectory())
        )
        if not (path / "manifest.json").exists():
            write_store(path, int(_STORE_GB.value * GB), _CHUNK.value)
        store = open_store(path)
        # Into the page cache; and memory that a virtual machine never used is slow.
        read_raw(store)
        read_batches(store, 0.1)
        readers: dict[str, Callable[[], int]] = {
            "raw": lambda: read_raw(store),
            "loader": lambda: read_batches(store, _READ_GB.value),
            "rows": lambda: read_rows(store),
        }
        results: list[dict[str, Any]] = []
        print_header(["reader", "GB", "GB/s", "CPU", "GB per CPU second", "load"])
        for _ in range(_ROUNDS.value):
            for name, read in readers.items():
                figures = _measure(read)
                print_row([name, *(f"{value:.3g}" for value in figures.values())])
                results.append({"reader": name} | figures)
        print(json.dumps(describe_setting() | _sum_up(results) | {"results": results}))


class Text:
    """Contexts of zeros, as many as the rows of some shards take."""

    names = ("random",)
    dropped_tokens = {"train": 0, "heldout": 0}

    def __init__(self, n_shards: int):
        self._n_shards = n_shards
        self.rows = {"train": n_shards * SHARD_ROWS, "heldout": 0}

    def __iter__(self) -> Iterator[Contexts]:
        tokens = np.zeros((SHARD_ROWS // CONTEXT, CONTEXT), np.int32)
        for _ in range(self._n_shards):
            yield Contexts("train", tokens, tokens)


def write_store(path: Path, n_bytes: int, rows_per_chunk: int) -> None:
    """Random rows, whole shards of them."""
    rng = np.random.default_rng(0)
    n_shards = max(1, n_bytes // (2 * D_MODEL * SHARD_ROWS))
    manifest = Manifest(
        subject={"name": "random", "identity": "0"},
        tokenizer="0",
        corpus="0",
        sites={SITE: D_MODEL},
        context_length=CONTEXT,
        heldout_every=5,
        max_rows=None,
        seed=0,
        rows_per_shard=SHARD_ROWS,
        rows_per_chunk=rows_per_chunk,
        contexts_per_shard=SHARD_ROWS // CONTEXT,
    )
    with StoreWriter(Folder(path), manifest) as writer:
        if not writer.manifest.is_packed:
            writer.write_text(Text(n_shards))
        for shard in writer.missing_shards():
            rows = shard * SHARD_ROWS + np.arange(SHARD_ROWS)
            acts = rng.standard_normal((SHARD_ROWS, D_MODEL), np.float32)
            stored = {SITE: Stored(acts.astype(ml_dtypes.bfloat16))}
            positions = np.stack(np.divmod(rows, CONTEXT), 1).astype(np.int32)
            writer.write_shard(shard, stored, positions)
        writer.finish()


def read_raw(store: Store) -> int:
    """All shards of the site from end to end; how many bytes that was."""
    buffer, n_bytes = bytearray(1 << 26), 0
    for file in sorted(Path(store.path, "acts", SITE, "c").glob("*/0/0")):
        with open(file, "rb", buffering=0) as opened:
            while n := opened.readinto(buffer):
                n_bytes += n
    return n_bytes


def read_batches(store: Store, n_gb: float) -> int:
    """Batches through the loader, each whole in host memory."""
    data = DataConfig(batch_rows=_BATCH.value)
    n_steps = -(-int(n_gb * GB) // (2 * D_MODEL * data.batch_rows))
    sources = loader.find_sources(data, [store])
    batches = loader.load_rows(sources, data, range(data.lanes), 0, 0, n_steps)
    return sum(rows.rows_vnd.nbytes for rows in batches)


def read_rows(store: Store) -> int:
    """Random rows, each read when the one before it is there."""
    rng, n_bytes = np.random.default_rng(0), 0
    stop = time.perf_counter() + _ROW_SECONDS
    while time.perf_counter() < stop:
        row = int(rng.integers(store.rows("train")))
        n_bytes += store.read_ranges(SITE, [(row, 1)]).nbytes
    return n_bytes


def _measure(read: Callable[[], int]) -> dict[str, float]:
    begin, cpu = time.perf_counter(), time.process_time()
    n_gb = read() / GB
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    return {
        "gb": n_gb,
        "gb_per_second": n_gb / seconds,
        "cpu": cpu / seconds,
        "gb_per_cpu_second": n_gb / cpu,
        "load": os.getloadavg()[0],
    }


def _sum_up(results: list[dict[str, Any]]) -> dict[str, float]:
    """The median round of each reader and its least, and how the loader compares."""
    summary: dict[str, float] = {}
    for name in ("raw", "loader", "rows"):
        rates = [r["gb_per_second"] for r in results if r["reader"] == name]
        summary[name] = statistics.median(rates)
        summary[f"{name}_least"] = min(rates)
    of_raw, over_rows = (summary["loader"] / summary[name] for name in ("raw", "rows"))
    return summary | {"of_raw": of_raw, "over_rows": over_rows}


if __name__ == "__main__":
    app.run(main)
