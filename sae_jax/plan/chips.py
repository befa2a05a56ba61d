"""Published figures of accelerators, of one chip each, and rough ones of CPUs.

FLOP/s are of dense bfloat16 products. A chip's links are its interconnect to the chips
of its slice (TPU) or of its machine (NVLink), its network is what leads out of that; of
both it is the bytes a second that a chip can send, half of what is published as
bidirectional. `hbm_bytes` is what a program may use: of a TPU what its compiler allows,
of a GPU three quarters, which is JAX's own default.

Sources: Cloud TPU documentation, "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x
(Ironwood)", system architecture; data sheets of NVIDIA A100 80 GB SXM, H100 SXM, H200
SXM and B200 (HGX), with one 200 or 400 Gb/s adapter a GPU.
"""

import dataclasses
import os

from sae_jax.config import nearest_name

GIB = 2**30
_JAX_OF_GPU = 0.75  # XLA_PYTHON_CLIENT_MEM_FRACTION


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip."""

    name: str
    platform: str  # "tpu", "gpu" or "cpu"
    flops: float  # a second, in bfloat16; of a CPU, in float32
    hbm_bytes: float
    hbm_bytes_per_second: float
    link_bytes_per_second: float  # sent by a chip, over all its links
    network_bytes_per_second: float  # sent by a chip, between slices or machines
    chips_per_host: int
    cores: int = 1  # which Cloud names of TPUs count, if they do
    devices: int = 1  # that a chip is to JAX
    dimensions: int = 1  # of the torus of links; 1: all chips of a host are alike
    counts_cores: bool = False  # in Cloud names


def _tpu(
    name: str,
    teraflops: float,
    gib: float,
    gigabytes: float,
    links: float,
    dimensions: int,
    **more: int | bool,
) -> Chip:
    network = 6.25e9 if dimensions == 3 else 3.125e9  # 50 or 25 Gb/s
    return Chip(
        name,
        "tpu",
        teraflops * 1e12,
        gib * GIB,
        gigabytes * 1e9,
        links * 1e9 / 2,
        network,
        chips_per_host=4,
        dimensions=dimensions,
        **more,  # type: ignore[arg-type]
    )


def _gpu(
    name: str,
    teraflops: float,
    gigabytes: float,
    terabytes: float,
    nvlink: float,
    adapter: float,
) -> Chip:
    return Chip(
        name,
        "gpu",
        teraflops * 1e12,
        _JAX_OF_GPU * gigabytes * 1e9,
        terabytes * 1e12,
        nvlink * 1e9 / 2,
        adapter * 1e9 / 8,
        chips_per_host=8,
    )


_CORES: dict[str, int | bool] = {"cores": 2, "counts_cores": True}
_ALL = (
    _tpu("v4", 275, 32, 1228, 600, 3, **_CORES),
    _tpu("v5e", 197, 15.75, 819, 400, 2),
    _tpu("v5p", 459, 95, 2765, 1200, 3, **_CORES),
    _tpu("v6e", 918, 31.25, 1638, 800, 2),
    _tpu("tpu7x", 2307, 189.5, 7380, 1200, 3, devices=2, **_CORES),
    _gpu("a100", 312, 80, 2.039, 600, 200),
    _gpu("h100", 989, 80, 3.35, 900, 400),
    _gpu("h200", 989, 141, 4.8, 900, 400),
    _gpu("b200", 2250, 180, 8.0, 1800, 400),
)
CHIPS = {chip.name: chip for chip in _ALL}

# How JAX names devices, by what their names hold; v5p is "TPU v5", v5e "TPU v5 lite".
_KINDS = (
    ("v5 lite", "v5e"),
    ("v5e", "v5e"),
    ("v5", "v5p"),
    ("v6", "v6e"),
    ("v4", "v4"),
    ("7x", "tpu7x"),
    *((name, name) for name in ("b200", "h200", "h100", "a100")),
)
_UNKNOWN = {"tpu": "v5e", "gpu": "a100"}
# Of a core with vectors of 256 bits, measured on none: orders of magnitude.
_CORE_FLOPS, _CORE_BYTES_PER_SECOND = 5e10, 1e10


def find_chip(name: str) -> Chip:
    """The chip of this name; ValueError with the nearest for any other."""
    if name not in CHIPS:
        raise ValueError(f"no chip {name!r}: {nearest_name(name, CHIPS)}")
    return CHIPS[name]


def chip_of(platform: str, device_kind: str = "", n_devices: int = 1) -> Chip:
    """The chip that a device of JAX is, or the least of its platform if not known.

    Virtual CPU devices share one machine of two cores; what memory it has is not told.
    """
    if platform == "cpu":
        return cpu(n_devices, n_cores=2, memory_bytes=float("inf"))
    kind = device_kind.lower()
    found = next((name for part, name in _KINDS if part in kind), None)
    return CHIPS[found or _UNKNOWN.get(platform, "a100")]


def cpu(n_devices: int, n_cores: int, memory_bytes: float) -> Chip:
    """One of n virtual devices that share a machine's cores, memory and bandwidth."""
    bandwidth = n_cores * _CORE_BYTES_PER_SECOND / n_devices
    return Chip(
        "cpu",
        "cpu",
        n_cores * _CORE_FLOPS / n_devices,
        memory_bytes / n_devices,
        bandwidth,
        bandwidth / 2,  # what is moved is read and written
        bandwidth / 2,
        chips_per_host=n_devices,
    )


def this_cpu(n_devices: int) -> Chip:
    """This machine's."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return cpu(n_devices, os.cpu_count() or 1, float(memory))
