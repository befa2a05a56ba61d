"""Which mesh: of all that devices can form, the one whose step is estimated shortest.

Sharding latents alone moves the reconstructions, B D a step, and splits parameters and
state; sharding data moves the gradients, 2 L D, and keeps as many copies of parameters.
So data pays for small dictionaries and large batches. What does not fit in memory is
left out (`sae_jax.plan.memory`), and so is what a run would refuse.
"""

import dataclasses

from sae_jax.config import MeshConfig, TrainConfig
from sae_jax.plan import memory
from sae_jax.plan.chips import chip_of
from sae_jax.plan.estimate import Estimate, estimate
from sae_jax.plan.step import Step, refusal
from sae_jax.plan.topology import Topology

_USUAL_WIDTH = 4096  # of a row


@dataclasses.dataclass(frozen=True)
class Option:
    """A mesh, and what it would cost."""

    step: Step
    peak_bytes: int  # of a device
    fits: bool
    cost: Estimate

    @property
    def shape(self) -> tuple[int, int]:
        return self.step.n_data, self.step.n_latent


def options(config: TrainConfig, topology: Topology) -> list[Option]:
    """All meshes that the config leaves open, the best first.

    Those that fit come before others; the others by what they take. A mesh uses all
    devices, unless none does that the run would accept: then as many as can be.
    """
    n_devices = topology.n_devices
    for n_used in range(n_devices, 0, -1):
        steps = [
            Step(config, n_data, n_used // n_data, topology.platform, topology.n_hosts)
            for n_data in range(1, n_used + 1)
            if n_used % n_data == 0
        ]
        found = [
            _weigh(step, topology)
            for step in steps
            if _is_asked(step, config.mesh) and refusal(step) is None
        ]
        if found:
            return sorted(found, key=_order)
    return []


def choose(config: TrainConfig, topology: Topology) -> list[Option]:
    """`options`; ValueError, one line, where there is none that a run would accept."""
    found = options(config, topology)
    if found:
        return found
    n_devices, mesh = topology.n_devices, config.mesh
    n_data = mesh.data or 1
    n_latent = mesh.latent or max(1, n_devices // n_data)
    reason = refusal(Step(config, n_data, n_latent, topology.platform))
    raise ValueError(
        f"no mesh of mesh.data = {n_data} by mesh.latent = {n_latent} can be made of "
        f"{n_devices} devices: {reason or f'it needs {n_data * n_latent}'}"
    )


def choose_mesh(
    config: TrainConfig,
    n_devices: int,
    platform: str,
    device_kind: str = "",
    n_processes: int = 1,
) -> tuple[MeshConfig, str]:
    """The mesh of a run, and why in a few words.

    A function of its arguments alone, so that all processes of a run agree. A mesh
    whose `data` the config sets stays as it is. Where `sae.d_model` is not known yet,
    a usual width stands for it.
    """
    if config.mesh.data is not None:
        return config.mesh, "as set"
    if config.sae.d_model is None:
        sae = dataclasses.replace(config.sae, d_model=_USUAL_WIDTH)
        config = dataclasses.replace(config, sae=sae)
    chip = chip_of(platform, device_kind, n_devices)
    chip = dataclasses.replace(
        chip, chips_per_host=max(1, n_devices // chip.devices // n_processes)
    )
    topology = Topology("these devices", chip, max(1, n_devices // chip.devices))
    found = options(config, topology)
    if not found:  # `validate` says what is wrong
        return dataclasses.replace(config.mesh, data=1), "the only one"
    best = found[0]
    mesh = dataclasses.replace(
        config.mesh, data=best.step.n_data, latent=best.step.n_latent
    )
    return mesh, explain(found)


def explain(found: list[Option]) -> str:
    """Why the first of them is the best."""
    best, *others = found
    if not others:
        return "the only one"
    if not best.fits:
        return "none fits in memory, this needs least"
    fitting = [other for other in others if other.fits]
    if not fitting:
        return "the only one that fits in memory"
    next_best = fitting[0]
    slower = next_best.cost.seconds / best.cost.seconds
    shape = "x".join(map(str, next_best.shape))
    return f"estimated fastest, {shape} would take {slower:.3g} times as long"


def _weigh(step: Step, topology: Topology) -> Option:
    peak_bytes = memory.peak(step)
    available = topology.chip.hbm_bytes / topology.chip.devices
    cost = estimate(step, topology)
    return Option(step, peak_bytes, peak_bytes <= available, cost)


def _order(option: Option) -> tuple:
    """Of two that take as long, the one with fewer copies of the parameters."""
    cost = option.cost.seconds if option.fits else option.peak_bytes
    return not option.fits, cost, option.step.n_data


def _is_asked(step: Step, mesh: MeshConfig) -> bool:
    return mesh.data in (None, step.n_data) and mesh.latent in (None, step.n_latent)
