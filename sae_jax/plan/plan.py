"""All figures of a run on a topology."""

import dataclasses
from typing import Any

from sae_jax.config import TrainConfig
from sae_jax.plan import limits, memory, traffic
from sae_jax.plan.compiler import Compiled, compile_step, why_not
from sae_jax.plan.estimate import DEAD, Estimate, estimate, rows_per_day
from sae_jax.plan.rule import Option, choose, explain
from sae_jax.plan.topology import Topology

EFFICIENCY = 0.5  # of the published figures; assumed


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a topology. Bytes, FLOPs and seconds are of a device and a step."""

    config: TrainConfig
    topology: Topology
    best: Option
    others: list[Option]
    why: str  # this mesh
    compiled: Compiled | None
    why_not_compiled: str | None
    none_dead: Estimate
    some_dead: Estimate  # a part DEAD of the latents, if there is AuxK
    efficiency: float
    largest_batch: int | None
    largest_microbatch: int | None
    smallest: Topology | None  # that fits, if this one does not

    @property
    def fits(self) -> bool:
        return self.compiled.fits if self.compiled else self.best.fits

    @property
    def available_bytes(self) -> float:
        return self.topology.chip.hbm_bytes / self.topology.chip.devices

    @property
    def rows_per_day(self) -> float:
        return rows_per_day(self.best.step, self.some_dead.seconds)

    @property
    def days(self) -> float:
        return self.config.rows / self.rows_per_day

    @property
    def chip_hours(self) -> float:
        """Of a CPU, whose devices are virtual, hours of the machine."""
        is_cpu = self.topology.platform == "cpu"
        return self.days * 24 * (1 if is_cpu else self.topology.n_chips)

    def to_json(self) -> dict[str, Any]:
        """All figures, by names that say their unit."""
        step = self.best.step
        phase, held = memory.temporaries(step)
        n_data, n_latent = self.best.shape
        return {
            "topology": self.topology.name,
            "chips": self.topology.n_chips,
            "devices": self.topology.n_devices,
            "hosts": self.topology.n_hosts,
            "chip": self.topology.chip.name,
            "model": "compiler" if self.compiled else "analytic",
            "why_not_compiled": self.why_not_compiled,
            "mesh": {"data": n_data, "latent": n_latent, "why": self.why},
            "fits": self.fits,
            "available_bytes": self.available_bytes,
            "state_bytes": memory.state(step),
            "temporary_bytes": {"phase": phase, **held},
            "peak_bytes": self.best.peak_bytes,
            "compiled": dataclasses.asdict(self.compiled) if self.compiled else None,
            "collectives": [
                dataclasses.asdict(moved) | {"sent_bytes": moved.sent}
                for moved in traffic.collectives(step)
            ],
            "efficiency": self.efficiency,
            "none_dead": _to_json(self.none_dead),
            "some_dead": _to_json(self.some_dead) | {"dead": DEAD},
            "rows_per_day": self.rows_per_day,
            "rows": self.config.rows,
            "days": self.days,
            "chip_hours": self.chip_hours,
            "largest_batch": self.largest_batch,
            "largest_microbatch": self.largest_microbatch,
            "smallest_topology": self.smallest.name if self.smallest else None,
            "other_meshes": [_mesh_to_json(other) for other in self.others],
        }


def make_plan(
    config: TrainConfig,
    topology: Topology,
    is_compiled: bool = True,
    efficiency: float = EFFICIENCY,
) -> Plan:
    """The plan of a run whose `sae.d_model` is set.

    Args:
        config: the run; where `mesh` is open, the rule chooses.
        topology: to run on.
        is_compiled: asks the compiler, too, where there is one.
        efficiency: the part of the published figures that is reached.

    Raises:
        ValueError: no width, no mesh that the run would accept, an efficiency that
            is none, or a compiler that fails.
    """
    if config.sae.d_model is None:
        raise ValueError("sae.d_model is not set: say how wide rows are")
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency = {efficiency}: must be above 0, at most 1")
    found = choose(config, topology)
    chosen, *others = found
    reason = why_not(topology) if is_compiled else "--nocompile"
    compiled = None if reason else compile_step(config, topology, chosen.shape)
    fits = compiled.fits if compiled else chosen.fits
    smaller = None if fits else limits.smallest(config, topology)
    return Plan(
        config=config,
        topology=topology,
        best=chosen,
        others=others,
        why="as asked" if config.mesh.data else explain(found),
        compiled=compiled,
        why_not_compiled=reason,
        none_dead=estimate(chosen.step, topology, efficiency, dead=0),
        some_dead=estimate(chosen.step, topology, efficiency, dead=DEAD),
        efficiency=efficiency,
        largest_batch=limits.largest_batch(chosen.step, topology),
        largest_microbatch=limits.largest_microbatch(chosen.step, topology),
        smallest=smaller[0] if smaller else None,
    )


def _mesh_to_json(option: Option) -> dict[str, Any]:
    return {
        "data": option.step.n_data,
        "latent": option.step.n_latent,
        "peak_bytes": option.peak_bytes,
        "fits": option.fits,
        "seconds": option.cost.seconds,
    }


def _to_json(cost: Estimate) -> dict[str, Any]:
    return dataclasses.asdict(cost) | {"seconds": cost.seconds, "bound": cost.bound}
