"""A small activation store with a planted dictionary, and runs that fit it."""

from pathlib import Path

import ml_dtypes
import numpy as np
import stores
from jax.sharding import Mesh

from sae_jax.config import DataConfig, OptimizerConfig, SaeConfig, TrainConfig
from sae_jax.loader import StoreFeed
from sae_jax.saes import Sae
from sae_jax.state import Setup
from sae_jax.step import validate
from sae_jax.store import Store
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
    manifest = stores.make_manifest(
        {SITE: D_MODEL}, CONTEXT, ROWS_PER_SHARD, ROWS_PER_CHUNK
    )
    splits = ["train"] * train_shards + ["heldout"] * heldout_shards
    tokens = np.zeros((ROWS_PER_SHARD // CONTEXT, CONTEXT), np.int32)
    blocks = []
    for index, split in enumerate(splits):
        acts = sample_rows(ROWS_PER_SHARD, seed=index).astype(ml_dtypes.bfloat16)
        blocks.append((split, {SITE: acts}, tokens, tokens))
    return stores.write(path, manifest, blocks, ["planted"], finish)


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


def make_setup(config: TrainConfig, mesh: Mesh, store: Store) -> Setup:
    """The run of this config over a store."""
    return validate(config, mesh, StoreFeed(config.data, mesh, config.seed, [store]))


def drop_times(rows: list[dict]) -> list[dict]:
    """Metrics, less what is another in every life."""
    times = ("rows_per_second", "loading_share")
    return [{k: v for k, v in row.items() if k not in times} for row in rows]


def heldout_nmse(store: Store, sae: Sae) -> float:
    """Of held-out rows, as metrics give it of batches."""
    start, n_rows = store.shards("heldout")[0]
    acts_bd = store.read_ranges(SITE, [(start, n_rows)]).astype(np.float32)
    normed_bd, _, scale = sae.normalize(acts_bd)
    error_bd = (sae.decode(sae.encode(acts_bd)) - acts_bd) / scale
    return float(np.sum(error_bd**2) / np.sum((normed_bd - normed_bd.mean(0)) ** 2))


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
