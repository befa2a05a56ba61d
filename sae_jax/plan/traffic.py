"""What a step sends between devices.

A collective over n devices whose result has N bytes makes each of them send

    all-reduce  2 N (n - 1) / n        all-gather  N (n - 1) / n        permute  N

Over the axis `latent` move candidates and reconstructions, over `data` gradients: of a
batch of b rows a device and own latents

    candidates         gather: 4 b S k_in, in an all-gather; tree: 4 b K to one other
                       shard, log2 S times; count: an all-reduce of 12 b, 16 times
    reconstructions    4 b D, an all-reduce of each
    gradients          8 own D + 4 own, an all-reduce for every micro-batch
    firing             4 own, likewise
    parameters         8 own D + 4 own, an all-gather, where data shards share the
                       optimizer
    AuxK               where any latent is dead: its x̂, 4 b D; counts, 12 b 16 times;
                       and gradients once more

These are the arrays that `experiments/bench_traffic.py` finds in the compiled step.
"""

import dataclasses

from sae_jax.mesh import DATA, LATENT
from sae_jax.plan.step import Step

_ROUNDS = 16  # of counting two bits at a time, `sae_jax.topk.threshold`
_PATTERNS = 3


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that devices add up or gather, `times` in a step."""

    name: str
    kind: str  # "all-reduce", "all-gather" or "permute"
    axis: str
    n_devices: int  # that take part together
    n_bytes: int  # of its result
    times: int = 1
    is_auxks: bool = False  # moves only in steps in which some latent is dead

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step."""
        n, once = self.n_devices, float(self.n_bytes)
        if self.kind != "permute":
            once *= (n - 1) / n * (2 if self.kind == "all-reduce" else 1)
        return once * self.times


def collectives(step: Step) -> list[Collective]:
    """All but what is of the size of D or of a few scalars."""
    found = []
    if step.n_latent > 1:
        found += _over_latents(step)
    if step.n_data > 1:
        found += _over_data(step)
    return found


def sent(step: Step, axis: str, is_auxks: bool = True) -> float:
    """Bytes that a device sends along one axis of the mesh in a step."""
    return sum(
        moved.sent
        for moved in collectives(step)
        if moved.axis == axis and (is_auxks or not moved.is_auxks)
    )


def _over_latents(step: Step) -> list[Collective]:
    n, rows = step.n_latent, step.part_rows
    recon = 4 * rows * step.d_model

    def moved(name: str, kind: str, n_bytes: int, times: int) -> Collective:
        return Collective(name, kind, LATENT, n, n_bytes, times * step.n_parts)

    found = [
        moved("reconstructions", "all-reduce", recon, step.n_recons),
        *(moved("candidates", *one) for one in _exchange(step)),
    ]
    if step.has_aux:
        whole = 4 * step.rows * step.d_model
        counts = 4 * _PATTERNS * step.rows
        found += [
            Collective("AuxK's x̂", "all-reduce", LATENT, n, whole, 1, True),
            Collective("AuxK's counts", "all-reduce", LATENT, n, counts, _ROUNDS, True),
        ]
    return found


def _exchange(step: Step) -> list[tuple[str, int, int]]:
    """Kind, bytes and times of what finds the K best of all latent shards."""
    if not step.is_topk:
        return []  # batch_topk counts, for all rows at once
    n, rows, k_in = step.n_latent, step.part_rows, step.choice.k
    if step.sae.exchange == "gather":
        return [("all-gather", 4 * rows * n * k_in, 1)]
    n_ks = 1 + step.sae.multi_topk
    shares = [("all-gather", 4 * rows * n, n_ks), ("all-reduce", 4 * rows, n_ks)]
    if step.sae.exchange == "tree":
        return [("permute", 4 * rows * k_in, (n - 1).bit_length()), *shares]
    return [("all-reduce", 4 * _PATTERNS * rows, _ROUNDS * n_ks), *shares]


def _over_data(step: Step) -> list[Collective]:
    n, size = step.n_data, 8 * step.matrix + 4 * step.own
    found = [
        Collective("gradients", "all-reduce", DATA, n, size, step.n_parts),
        Collective("firing", "all-reduce", DATA, n, 4 * step.own, step.n_parts),
    ]
    if step.n_optimizer_shards > 1:
        found.append(Collective("parameters", "all-gather", DATA, n, size))
    if step.has_aux:
        found.append(
            Collective("AuxK's gradients", "all-reduce", DATA, n, size, 1, True)
        )
    return found
