"""How long a step takes at a chip's published figures: a bound, nothing measured.

    compute   2 b own D            the encoder, b rows by own latents on a device
              8 b K D / S          decoding, its values' gradient, two sums of gradients
              + 10 b dead own D    AuxK's five products with the dead latents
    memory    2 (4 + c) own D      weights rounded: read in 4 bytes, written in c
              8 b own              pre-activations, written and read, tile by tile
              (4 c + 16) N D       rows gathered and added to by N = b K / S slots
              48 b D               rows, normalised, rebuilt, subtracted
              88 own D             gradients written and read; of five arrays that the
                                   optimizer reads four are written; a part of it where
                                   data shards share it, and then parameters again
    network   `sae_jax.plan.traffic`, over the links of a slice or a machine, and over
              the network between machines

A step takes the longer of compute and memory, and then the network's time: what is sent
depends on what was computed just before. `efficiency` is the part of the published
figures that is taken to be reached.
"""

import dataclasses
import math

from sae_jax.mesh import DATA, LATENT
from sae_jax.plan import traffic
from sae_jax.plan.step import Step
from sae_jax.plan.topology import Topology

DEAD = 0.1  # part of the latents, where nothing else is said
_SINGLE = 2  # a GPU's float32 products take so many times longer
_PRODUCTS = 5  # of AuxK: pre-activations, x̂, and three gradients
_DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One step: of a device FLOPs and bytes, and seconds."""

    flops: float
    memory_bytes: float
    sent_bytes: float
    compute_seconds: float
    memory_seconds: float
    network_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.memory_seconds) + self.network_seconds

    @property
    def bound(self) -> str:
        """What takes longest."""
        times = {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds,
            "network": self.network_seconds,
        }
        return max(times, key=lambda name: times[name])


def estimate(
    step: Step, topology: Topology, efficiency: float = 1.0, dead: float = DEAD
) -> Estimate:
    """A step of which a part `dead` of the latents is dead, if there is AuxK."""
    chip = topology.chip
    flops, held = flops_of(step, dead), bytes_of(step, dead)
    speed = chip.flops / chip.devices * efficiency
    if step.dtype_bytes == 4 and chip.platform == "gpu":
        speed /= _SINGLE
    bandwidth = chip.hbm_bytes_per_second / chip.devices * efficiency
    moved = {
        axis: traffic.sent(step, axis, is_auxks=dead > 0) for axis in (DATA, LATENT)
    }
    network = sum(_seconds(step, topology, axis, n) for axis, n in moved.items())
    return Estimate(
        flops=flops,
        memory_bytes=held,
        sent_bytes=sum(moved.values()),
        compute_seconds=flops / speed,
        memory_seconds=held / bandwidth,
        network_seconds=network / efficiency,
    )


def flops_of(step: Step, dead: float = 0.0) -> float:
    """Of a device in a step: products alone."""
    dense = 2.0 * step.rows * step.matrix
    if not step.is_topk:
        total = 6 * dense  # encoder, decoder, and two gradients of each
        return total + _PRODUCTS * dense * dead * step.has_aux
    slots = step.rows * step.choice.k * min(1.0, step.sae.k / step.choice.k)
    sparse = 2 * 4 * slots / step.n_latent * step.d_model * step.n_recons
    return dense + sparse + _PRODUCTS * dense * dead * step.has_aux


def bytes_of(step: Step, dead: float = 0.0) -> float:
    """That a device reads and writes in a step."""
    c, d_model = step.dtype_bytes, step.d_model
    rounding = 2 * (4 + c) * step.matrix if c < 4 else 0
    pre = 8.0 * step.rows * step.own * (1 if step.is_topk else 6)
    n_tiles = -(-step.part_rows // (step.choice.tile_rows if step.is_topk else 8192))
    weights = c * step.matrix * n_tiles * step.n_parts
    rows = 12 * 4 * step.rows * d_model
    slots = step.rows * step.sae.k / step.n_latent if step.is_topk else 0
    gathered = slots * d_model * (4 * c + 2 * 2 * 4) * step.n_recons
    kept = 4 * 2 * step.matrix
    n_shards = step.n_optimizer_shards
    optimizer = 9 * kept / n_shards + (kept if n_shards > 1 else 0)
    gradients = 2 * kept * step.n_parts
    auxk = (8.0 * _PRODUCTS * step.rows * step.own) * dead * step.has_aux
    return rounding + pre + weights + rows + gathered + optimizer + gradients + auxk


def rows_per_day(step: Step, seconds: float) -> float:
    return step.config.data.batch_rows / seconds * _DAY


def _seconds(step: Step, topology: Topology, axis: str, sent: float) -> float:
    """That sending so much along an axis takes.

    Of an axis that leaves the machine, each machine first adds up what its own devices
    have, over their links; then one n-th of that goes over the network from each of its
    n devices. In a TPU's torus an axis has the links of the dimensions that it spans.
    """
    chip = topology.chip
    n_axis = {DATA: step.n_data, LATENT: step.n_latent}[axis]
    if n_axis == 1:
        return 0.0
    link = chip.link_bytes_per_second / chip.devices
    if chip.platform != "gpu":
        spanned = math.log(n_axis) / math.log(max(step.n_data * step.n_latent, 2))
        return sent / (link * spanned)
    inside = math.gcd(n_axis, chip.chips_per_host)
    if topology.n_hosts == 1:
        inside = n_axis
    elif axis == DATA:  # latents have the neighbours
        inside = math.gcd(n_axis, max(1, chip.chips_per_host // step.n_latent))
    whole = sent * n_axis / (n_axis - 1)  # 2 N, or N of an all-gather
    seconds = whole * (inside - 1) / inside / link
    n_machines = n_axis // inside
    out = whole / inside * (n_machines - 1) / n_machines
    return seconds + out / chip.network_bytes_per_second
