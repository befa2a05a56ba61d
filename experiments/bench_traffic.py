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
    parameters       new ones, whole to each of the data shards that share the optimizer
    biases           likewise
    counts           of AuxK, which counts its candidates instead of moving them
    AuxK's           reconstruction, by tiles of rows
    beside           all else: allowed are eight vectors of D and 64 scalars

`in_loops` are bytes that move as many times as only the device knows, counted once in
`bytes`: for each tile of rows that AuxK takes, and never where no latent is dead.
B is a device's rows, S the latent shards, k_in = min(K, L / S). Below these, the bytes
by which shards find the K best of all in each exchange, AuxK being off.

In MB at the CPU's default shape (jax 0.10.2); nothing is above what is allowed:

| mesh | candidates: gather | tree | count | x̂ | gradients | parameters | AuxK counts |
|---|---|---|---|---|---|---|---|
| 1x8 | 8.4 | 3.4 | 1.9 | 50.3 | 0.0 | 0.0 | 0.5 |
| 2x4 | 2.1 | 1.1 | 0.9 | 25.2 | 100.7 | 50.3 | 0.2 |
| 8x1 | 0.0 | 0.0 | 0.0 | 0.0 | 402.7 | 201.3 | 0.0 |
"""

import itertools
from collections import Counter
from collections.abc import Iterator

import jax
from timing import Figures, Shape, compile_step, start

from sae_jax.config.sae import EXCHANGES
from sae_jax.plan.program import Moved, moved

MESHES = ((1, 8), (2, 4), (8, 1))
N_DEVICES = 8

Array = tuple[str, str, int]  # the collective it comes from, its type and elements


def measure(shape: Shape, repeats: int) -> Iterator[Figures]:
    """One row for each thing that may move; a program is the same in every round."""
    del repeats
    for mesh_shape in MESHES:
        allowed = _allow(shape, *mesh_shape)
        names = {array: name for name, (array, n) in allowed.items() if n}
        arrays, n_bytes, in_loops = Counter[str](), Counter[str](), Counter[str]()
        compiled = compile_step(shape, mesh_shape, aux_coefficient=1 / 32)
        for one in moved(compiled.as_text()):
            name = names.get((one.kind, one.dtype, one.n_elements), _name(shape, one))
            arrays[name] += one.times or 1
            n_bytes[name] += (one.times or 1) * one.n_bytes
            in_loops[name] += 0 if one.times else one.n_bytes
        most = {"beside": 4 * (8 * shape.d_model + 64)} | {
            name: n * Moved(*array, 1).n_bytes for name, (array, n) in allowed.items()
        }
        for name in (*allowed, "counts", "AuxK's", "beside"):
            yield {
                "mesh": "x".join(map(str, mesh_shape)),
                "what": name,
                "arrays": arrays[name],
                "bytes": n_bytes[name],
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
    elsewhere = (1, own, own * shape.d_model)  # what fired; parameters and gradients
    found = [
        one
        for one in moved(compiled.as_text())
        if one.n_elements not in elsewhere
        and (one.kind != "all-reduce" or one.dtype == "s32")
    ]
    return {
        "mesh": "x".join(map(str, mesh_shape)),
        "what": f"by {exchange}",
        "arrays": sum(one.times or 1 for one in found),
        "bytes": sum(one.n_bytes * (one.times or 1) for one in found),
        "in_loops": 0,
        "allowed": None,
    }


def _name(shape: Shape, one: Moved) -> str:
    """Of an array that is in no fixed place."""
    if one.dtype == "s32" and one.n_elements > 1:
        return "counts"
    return "beside" if one.times or one.n_elements <= shape.d_model else "AuxK's"


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
        "parameters": (("all-gather", "f32", own * d_model), 2 * over_data),
        "biases": (("all-gather", "f32", own), over_data),
    }


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", N_DEVICES)
    start(measure)
