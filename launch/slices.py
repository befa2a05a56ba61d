"""Slices of TPUs, by the accelerator types of Google Cloud, such as v5p-128.

The number is of cores for v4 and v5p, which have two a chip, and of chips for v5e (in
full v5litepod) and v6e. Names and sizes are those of Google Cloud's documentation.
"""

import dataclasses
import math
import re

from absl import flags

ACCELERATOR = flags.DEFINE_string(
    "accelerator", None, "the slice, as v5p-128, v5litepod-16 or v6e-256"
)
SPOT = flags.DEFINE_bool("spot", False, "take machines that may be taken away")


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of TPUs."""

    runtime: str  # the software version of its TPU VMs
    gke_label: str
    n_dimensions: int
    counts_cores: bool
    most_chips: int


GENERATIONS = {
    "v4": Generation("tpu-ubuntu2204-base", "tpu-v4-podslice", 3, True, 4096),
    "v5litepod": Generation(
        "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 2, False, 256
    ),
    "v5p": Generation("v2-alpha-tpuv5", "tpu-v5p-slice", 3, True, 4096),
    "v6e": Generation("v2-alpha-tpuv6e", "tpu-v6e-slice", 2, False, 256),
}
_CHIPS_PER_HOST = 4
_MOST_CHIPS_OF_ONE_HOST = {2: 8, 3: 4}  # by the dimensions of the torus


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice."""

    generation: Generation
    n_chips: int

    @property
    def n_hosts(self) -> int:
        if self.n_chips <= _MOST_CHIPS_OF_ONE_HOST[self.generation.n_dimensions]:
            return 1
        return self.n_chips // _CHIPS_PER_HOST

    @property
    def chips_per_host(self) -> int:
        return self.n_chips // self.n_hosts

    @property
    def topology(self) -> str:
        """The shape that Google Cloud gives to so many chips: as near to a cube as
        powers of two come, the longer sides last."""
        if self.n_chips == 1:
            return "1x1"
        sides = [2, 2, 1][: self.generation.n_dimensions]
        while math.prod(sides) < self.n_chips:
            shortest = max(i for i, side in enumerate(sides) if side == min(sides))
            sides[shortest] *= 2
        return "x".join(map(str, sides))


def read_slice() -> Slice:
    """What --accelerator asks for."""
    given = ACCELERATOR.value or ""
    match = re.fullmatch(r"([a-z0-9]+)-([0-9]+)", given)
    generation = GENERATIONS.get(match[1]) if match else None
    if match is None or generation is None:
        kinds = ", ".join(f"{kind}-N" for kind in GENERATIONS)
        raise ValueError(f"--accelerator={given}: give one of {kinds}")
    n_chips, rest = divmod(int(match[2]), 2 if generation.counts_cores else 1)
    least = 4 if generation.n_dimensions == 3 else 1
    in_range = least <= n_chips <= generation.most_chips
    if rest or not in_range or n_chips == 2 or n_chips & (n_chips - 1):
        what = "cores, two a chip," if generation.counts_cores else "chips"
        raise ValueError(
            f"--accelerator={given}: the number of {what} is a power of two that makes "
            f"{least} to {generation.most_chips} chips, and not 2"
        )
    return Slice(generation, n_chips)
