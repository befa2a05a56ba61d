"""What a training step moves between devices, against what the design allows.

    python experiments/bench_traffic.py

Read from the HLO of the step, compiled for eight virtual CPU devices and not run; some
minutes. Each figure is of the results that one device gets in one step, in bytes:

    candidates       of one choice: B S k_in values if they are gathered
    reconstructions  B D of each x̂, summed: the SAE's, and AuxK's if all rows are one
                     of its tiles
    gradients        of the latents that a device has, summed over the data axis: of the
                     main loss, and again of AuxK if any latent is dead
    bias gradient    of their biases, likewise
    firing           which of them fired, likewise
    counts           of AuxK, which counts its candidates instead of moving them
    AuxK's           reconstruction, by tiles of rows
    beside           all else: allowed are eight vectors of D and 64 scalars

`in_loops` are bytes that move as many times as only the device knows, counted once in
`bytes`: for each tile of rows that AuxK takes, and never where no latent is dead.
B is a device's rows, S the latent shards, k_in = min(K, L / S). Below these, the bytes
by which shards find the K best of all in each exchange, AuxK being off.

In MB at the CPU's default shape (jax 0.10.2); nothing is above what is allowed:

| mesh | candidates: gather | tree | count | reconstructions | gradients | AuxK counts |
|---|---|---|---|---|---|---|
| 1x8 | 8.4 | 3.4 | 1.9 | 50.3 | 0.0 | 0.5 |
| 2x4 | 2.1 | 1.1 | 0.9 | 25.2 | 100.7 | 0.2 |
| 8x1 | 0.0 | 0.0 | 0.0 | 0.0 | 402.7 | 0.0 |
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator

import jax
from timing import Figures, Shape, compile_step, start

from sae_jax.config.sae import EXCHANGES

MESHES = ((1, 8), (2, 4), (8, 1))
N_DEVICES = 8

_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_CALLS = r"(?:body|condition|calls|to_apply|\w+_computations?)=(\{.*?\}|%?[\w.\-]+)"
_COUNTED = r'"known_trip_count":\{"n":"(\d+)"'

Array = tuple[str, str, int]  # the collective it comes from, its type and elements


def measure(shape: Shape, repeats: int) -> Iterator[Figures]:
    """One row for each thing that may move; a program is the same in every round."""
    del repeats
    for mesh_shape in MESHES:
        allowed = _allow(shape, *mesh_shape)
        names = {array: name for name, (array, n) in allowed.items() if n}
        arrays, moved, in_loops = Counter[str](), Counter[str](), Counter[str]()
        compiled = compile_step(shape, mesh_shape, aux_coefficient=1 / 32)
        for array, times in _collectives(compiled.as_text()):
            name = names.get(array, _name(shape, array, times))
            arrays[name] += times or 1
            moved[name] += (times or 1) * _bytes(array)
            in_loops[name] += 0 if times else _bytes(array)
        most = {name: n * _bytes(array) for name, (array, n) in allowed.items()}
        most |= {"beside": 4 * (8 * shape.d_model + 64)}
        for name in (*allowed, "counts", "AuxK's", "beside"):
            yield {
                "mesh": "x".join(map(str, mesh_shape)),
                "what": name,
                "arrays": arrays[name],
                "bytes": moved[name],
                "in_loops": in_loops[name],
                "allowed": most.get(name),
            }
    for mesh_shape, exchange in itertools.product(MESHES[:2], EXCHANGES):
        yield _measure_exchange(shape, mesh_shape, exchange)


def _measure_exchange(
    shape: Shape, mesh_shape: tuple[int, int], exchange: str
) -> Figures:
    compiled = compile_step(shape, mesh_shape, exchange=exchange)
    own = shape.latents // mesh_shape[1]
    found = [
        (_bytes(array) * (times or 1), times or 1)
        for array, times in _collectives(compiled.as_text())
        # Candidates and counts; which latents fired is s32 too.
        if array[0] != "all-reduce" or (array[1] == "s32" and array[2] not in (1, own))
    ]
    return {
        "mesh": "x".join(map(str, mesh_shape)),
        "what": f"by {exchange}",
        "arrays": sum(times for _, times in found),
        "bytes": sum(size for size, _ in found),
        "in_loops": 0,
        "allowed": None,
    }


def _name(shape: Shape, array: Array, times: int | None) -> str:
    """Of an array that is in no fixed place."""
    if array[1] == "s32" and array[2] > 1:
        return "counts"
    return "beside" if times or array[2] <= shape.d_model else "AuxK's"


def _allow(shape: Shape, n_data: int, n_latent: int) -> dict[str, tuple[Array, int]]:
    """By name, which arrays may move, and how many of them."""
    rows, own = shape.rows // n_data, shape.latents // n_latent
    candidates = rows * n_latent * min(shape.k, own)
    over_data, over_latents = int(n_data > 1), int(n_latent > 1)
    d_model = shape.d_model
    return {
        "candidates": (("all-gather", "f32", candidates), over_latents),
        "reconstructions": (("all-reduce", "f32", rows * d_model), 2 * over_latents),
        "gradients": (("all-reduce", "f32", own * d_model), 4 * over_data),
        "bias gradient": (("all-reduce", "f32", own), 2 * over_data),
        "firing": (("all-reduce", "s32", own), over_data),
    }


def _collectives(program: str) -> Iterator[tuple[Array, int | None]]:
    """The results of collectives among devices, and how many times they come.

    None: in a loop whose length only the device knows.
    """
    bodies: dict[str, list[str]] = {}
    for line in program.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            body = bodies.setdefault("ENTRY" if header[1] else header[2], [])
        elif bodies:
            body.append(line)

    def walk(name: str, times: int | None) -> Iterator[tuple[Array, int | None]]:
        for line in bodies[name]:
            for array in _moved(line):
                yield array, times
            inside = times
            if " while(" in line:
                counted = re.search(_COUNTED, line)
                inside = times * int(counted[1]) if counted and times else None
            for called in re.findall(r"[\w.\-]+", " ".join(re.findall(_CALLS, line))):
                if called in bodies:
                    yield from walk(called, inside)

    return walk("ENTRY", 1)


def _moved(line: str) -> Iterator[Array]:
    match = re.search(rf"= (.*?) ({_KINDS})(?:-start)?\(", line)
    if match and _n_together(line) > 1:
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
            yield match[2], dtype, math.prod(int(n) for n in dims.split(",") if n)


def _n_together(line: str) -> int:
    """The devices of one group, in pairs, listed, counted, or as axes of a mesh."""
    if "source_target_pairs=" in line:
        return 2
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    pattern = r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\}"
    mesh, axes = re.findall(pattern, line)[0]
    sizes = dict(re.findall(r"('\w+')=(\d+)", mesh))
    return math.prod(int(sizes[axis]) for axis in axes.split(","))


def _bytes(array: Array) -> int:
    _, dtype, size = array
    n_bits = re.search(r"\d+", dtype)
    return size * (int(n_bits[0]) // 8 if n_bits else 1)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", N_DEVICES)
    start(measure)
