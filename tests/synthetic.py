"""A small activation store with a planted dictionary, and runs that fit it."""

from pathlib import Path

import ml_dtypes
import numpy as np

from sae_jax.config import DataConfig, OptimizerConfig, SaeConfig, TrainConfig
from sae_jax.store import Manifest, Shard, StoreWriter
from sae_jax.writers import MemoryWriter

D_MODEL, N_FEATURES, CONTEXT = 16, 48, 16
ROWS_PER_SHARD, ROWS_PER_CHUNK = 512, 64
SITE = "resid_post.3"


def sample_rows(n_rows: int, seed: int = 0) -> np.ndarray:
    """Rows [n, D] float32: three of the planted unit directions each, and noise."""
    features = np.random.default_rng(1234).normal(size=(N_FEATURES, D_MODEL))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    rows = 0.02 * rng.normal(size=(n_rows, D_MODEL)) + 0.3
    for _ in range(3):
        chosen = rng.integers(N_FEATURES, size=n_rows)
        rows += features[chosen] * rng.uniform(0.5, 1.5, size=(n_rows, 1))
    return rows.astype(np.float32)


def write_store(
    path: Path, train_shards: int = 6, heldout_shards: int = 2, finish: bool = True
) -> Path:
    """Writes a store of `sample_rows`, train shards before held-out ones."""
    splits = ["train"] * train_shards + ["heldout"] * heldout_shards
    rows = {"train": train_shards * ROWS_PER_SHARD}
    rows["heldout"] = heldout_shards * ROWS_PER_SHARD
    manifest = Manifest(
        subject={"name": "planted", "identity": "0"},
        tokenizer="0",
        corpus="0",
        sites={SITE: D_MODEL},
        context_length=CONTEXT,
        heldout_every=5,
        max_rows=None,
        seed=0,
        rows_per_shard=ROWS_PER_SHARD,
        rows_per_chunk=ROWS_PER_CHUNK,
        n_documents=1,
        rows=rows,
        dropped_tokens={"train": 0, "heldout": 0},
        shards=[{"split": split, "rows": ROWS_PER_SHARD} for split in splits],
    )
    writer = StoreWriter(path, manifest, ["planted"])
    tokens = np.zeros((ROWS_PER_SHARD // CONTEXT, CONTEXT), np.int32)
    for index in range(len(splits)):
        acts = sample_rows(ROWS_PER_SHARD, seed=index).astype(ml_dtypes.bfloat16)
        writer.write_shard(Shard(acts={SITE: acts}, tokens=tokens, documents=tokens))
    if finish:
        writer.finish()
    return path


def make_config(store: Path | str = "", **fields) -> TrainConfig:
    """A run of 24 steps of 64 rows on the planted store, in which latents die."""
    defaults = dict(
        sae=SaeConfig(n_latents=128, k=3, k_aux=8),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        data=DataConfig(store=str(store), batch_rows=64, lanes=4, window_chunks=2),
        rows=24 * 64,
        dead_after_rows=2 * 64,
        log_every_steps=1,
        checkpoint_every_steps=8,
    )
    return TrainConfig(**(defaults | fields))


class Killed(Exception):
    """What `KillAt` ends a run with."""


class KillAt(MemoryWriter):
    """Ends the run when it is told the metrics of a step."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def write(self, step, scalars):
        if step == self.step:
            raise Killed
        super().write(step, scalars)
