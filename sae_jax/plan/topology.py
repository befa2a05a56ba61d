"""Topologies by the names that clouds give them.

    tpu:v5p-128      Cloud's: v4, v5p and tpu7x count cores, so this is 64 chips
    tpu:v6e-16       v5e and v6e count chips; v5litepod-16 is v5e-16
    tpu:v5p:4x4x4    chips along each axis of the torus
    gpu:8xh200       one machine
    gpu:4x8xh100     machines of as many GPUs each
    cpu:8            virtual devices of this machine
"""

import dataclasses
import math
import re

from sae_jax.config import nearest_name
from sae_jax.plan.chips import CHIPS, Chip, find_chip, this_cpu

_TORUS = {
    2: "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16",
    3: "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16",
}
_MOST_MACHINES = 128
_FORMS = "tpu:v5p-128, tpu:v5p:4x4x4, gpu:8xh200, gpu:4x8xh100 or cpu:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Some chips of one kind, and how they are connected."""

    name: str
    chip: Chip
    n_chips: int
    shape: tuple[int, ...] = ()  # of a TPU's torus

    @property
    def n_devices(self) -> int:
        return self.n_chips * self.chip.devices

    @property
    def platform(self) -> str:
        return self.chip.platform

    @property
    def n_hosts(self) -> int:
        return -(-self.n_chips // self.chip.chips_per_host)


def parse(name: str) -> Topology:
    """The topology of this name.

    Raises:
        ValueError: there is none; one line with the nearest.
    """
    kind, _, rest = name.lower().partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", rest):
        return Topology(name, this_cpu(int(rest)), int(rest))
    if kind == "gpu":
        return _parse_gpu(name, rest)
    if kind == "tpu":
        return _parse_tpu(name, rest)
    raise ValueError(f"no topology {name!r}: give {_FORMS}")


def larger(topology: Topology) -> list[Topology]:
    """All of this chip that are sold, the smallest first; of a CPU, none."""
    chip = topology.chip
    if chip.platform == "tpu":
        return [_of_shape(chip, shape) for shape in _shapes(chip)]
    if chip.platform == "gpu":
        sizes = [1, 2, 4, 8]
        names = [f"{size}x{chip.name}" for size in sizes]
        n_machines = 2
        while n_machines <= _MOST_MACHINES:
            names.append(f"{n_machines}x8x{chip.name}")
            n_machines *= 2
        return [_parse_gpu(f"gpu:{name}", name) for name in names]
    return []


def _parse_gpu(name: str, rest: str) -> Topology:
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)x([a-z]\w*)", rest)
    if not match:
        raise ValueError(f"no topology {name!r}: give gpu:8xh200 or gpu:4x8xh200")
    machines, n_each, chip = int(match[1] or 1), int(match[2]), find_chip(match[3])
    if chip.platform != "gpu":
        raise ValueError(f"{name!r}: {chip.name} is no GPU, give tpu:{chip.name}-...")
    chip = dataclasses.replace(chip, chips_per_host=n_each)
    return Topology(name, chip, machines * n_each)


def _parse_tpu(name: str, rest: str) -> Topology:
    rest = rest.replace("v5litepod", "v5e")
    match = re.fullmatch(r"(\w+?)(?:-([1-9]\d*)|:([\dx]+))", rest)
    if not match:
        raise ValueError(f"no topology {name!r}: give tpu:v5p-128 or tpu:v5p:4x4x4")
    kinds = [chip for chip in CHIPS if CHIPS[chip].platform == "tpu"]
    if match[1] not in kinds:
        raise ValueError(f"no TPU {match[1]!r}: {nearest_name(match[1], kinds)}")
    chip = CHIPS[match[1]]
    if match[3]:
        shape = tuple(int(n) for n in match[3].split("x") if n)
        if len(shape) != chip.dimensions or 0 in shape:
            example = _shapes(chip)[4]
            raise ValueError(
                f"no topology {name!r}: {chip.name} has a torus of {chip.dimensions} "
                f"axes, as tpu:{chip.name}:{'x'.join(map(str, example))}"
            )
        return dataclasses.replace(_of_shape(chip, shape), name=name)
    counted = {_of_shape(chip, shape).name: shape for shape in _shapes(chip)}
    wanted = f"tpu:{chip.name}-{match[2]}"
    if wanted not in counted:
        near = min(counted, key=lambda known: _distance(known, int(match[2])))
        raise ValueError(
            f"no topology {name!r}: did you mean {near!r}? {chip.name} counts "
            f"{'cores, 2 a chip' if chip.counts_cores else 'chips'}"
        )
    return dataclasses.replace(_of_shape(chip, counted[wanted]), name=name)


def _of_shape(chip: Chip, shape: tuple[int, ...]) -> Topology:
    n_chips = math.prod(shape)
    count = n_chips * (chip.cores if chip.counts_cores else 1)
    return Topology(f"tpu:{chip.name}-{count}", chip, n_chips, shape)


def _shapes(chip: Chip) -> list[tuple[int, ...]]:
    texts = _TORUS[chip.dimensions].split()
    return [tuple(map(int, text.split("x"))) for text in texts]


def _distance(name: str, count: int) -> float:
    return abs(math.log(int(name.rpartition("-")[2]) / count))
