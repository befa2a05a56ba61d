"""What would fit: the largest batch and micro-batch, or the smallest topology."""

import dataclasses

from sae_jax.config import MeshConfig, TrainConfig
from sae_jax.plan import memory, topology
from sae_jax.plan.rule import Option, options
from sae_jax.plan.step import Step, refusal
from sae_jax.plan.topology import Topology

_MOST_ROWS = 2**24  # of a data shard


def largest_batch(step: Step, where: Topology) -> int | None:
    """The most rows that fit without micro-batches; of a data shard, a power of two."""
    rows = _MOST_ROWS
    while rows and not _fits(step, where, rows * step.n_data, None):
        rows //= 2
    return rows * step.n_data or None


def largest_microbatch(step: Step, where: Topology) -> int | None:
    """The batch, or what of it fits after halving; None where nothing does."""
    batch = step.config.data.batch_rows
    if _fits(step, where, batch, None):
        return batch
    rows = batch
    while rows % 2 == 0 and step.is_topk:
        rows //= 2
        if _fits(step, where, batch, rows):
            return rows
    return None


def smallest(
    config: TrainConfig, chip_like: Topology
) -> tuple[Topology, Option] | None:
    """The smallest topology of the same chip on which some mesh fits, and that mesh.

    The mesh is chosen anew, whatever the config says.
    """
    config = dataclasses.replace(config, mesh=MeshConfig())
    for where in topology.larger(chip_like):
        best = next(iter(options(config, where)), None)
        if best and best.fits:
            return where, best
    return None


def _fits(step: Step, where: Topology, batch: int, part: int | None) -> bool:
    data = dataclasses.replace(
        step.config.data, batch_rows=batch, microbatch_rows=part, lanes=step.n_data
    )
    most = max(step.config.rows, 2 * batch)
    config = dataclasses.replace(step.config, data=data, rows=most, dead_after_rows=1)
    changed = dataclasses.replace(step, config=config)
    available = where.chip.hbm_bytes / where.chip.devices
    return refusal(changed) is None and memory.peak(changed) <= available
