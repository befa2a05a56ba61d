"""One training step on one mesh, in the numbers of one device."""

import dataclasses
import functools

from sae_jax import topk
from sae_jax.config import (
    CHOOSE_K,
    SaeConfig,
    TrainConfig,
    most_chosen,
    shards_optimizer,
)


@dataclasses.dataclass(frozen=True)
class Step:
    """What the planner has to know of a step; `config.sae.d_model` is set."""

    config: TrainConfig
    n_data: int
    n_latent: int
    platform: str
    n_processes: int = 1

    @property
    def sae(self) -> SaeConfig:
        return self.config.sae

    @property
    def d_model(self) -> int:
        assert self.sae.d_model is not None
        return self.sae.d_model

    @property
    def own(self) -> int:
        """Latents of a device."""
        return -(-self.sae.n_latents // self.n_latent)

    @property
    def rows(self) -> int:
        """Of a batch, on a device."""
        return -(-self.config.data.batch_rows // self.n_data)

    @property
    def part_rows(self) -> int:
        """Of a micro-batch, on a device."""
        rows = self.config.data.microbatch_rows or self.config.data.batch_rows
        return -(-rows // self.n_data)

    @property
    def n_parts(self) -> int:
        return -(-self.rows // self.part_rows)

    @property
    def dtype_bytes(self) -> int:
        """Of a factor of a matmul."""
        is_single = self.sae.compute_dtype in (
            ("float32", None) if self.platform == "cpu" else ("float32",)
        )
        return 4 if is_single else 2

    @property
    def matrix(self) -> int:
        """Elements of a device's part of W_enc, or of W_dec."""
        return self.own * self.d_model

    @property
    def n_optimizer_shards(self) -> int:
        """Data shards that share the moments and the average (`sae_jax.state`)."""
        is_shared = shards_optimizer(self.config, self.n_data, self.n_latent)
        return self.n_data if is_shared else 1

    @property
    def has_aux(self) -> bool:
        return self.sae.architecture in CHOOSE_K and self.sae.aux_coefficient > 0

    @property
    def is_topk(self) -> bool:
        return self.sae.architecture == "topk"

    @property
    def n_recons(self) -> int:
        """Reconstructions that latent shards add up."""
        return 1 + self.sae.multi_topk + len(self.sae.prefixes)

    @functools.cached_property
    def choice(self) -> topk.Choice:
        """How a latent shard chooses; ValueError where it would find too few."""
        return topk.plan(
            most_chosen(self.sae),
            self.sae.n_latents,
            self.n_latent,
            self.sae.selection,
            self.sae.recall_target,
            self.sae.capacity_factor,
            self.platform,
        )


def refusal(step: Step) -> str | None:
    """Why a run would refuse this mesh, or None."""
    config, sae = step.config, step.sae
    # Processes whose devices hold the same rows load them as one.
    n_groups = min(step.n_data, step.n_processes)
    if max(step.n_data, step.n_processes) % n_groups:
        return f"{step.n_data} data shards divide over {step.n_processes} unevenly"
    for name, size, n in (
        ("sae.n_latents", sae.n_latents, step.n_latent),
        ("data.batch_rows", config.data.batch_rows, step.n_data),
        ("data.microbatch_rows", config.data.microbatch_rows or 0, step.n_data),
        ("data.lanes", config.data.lanes, n_groups),
        ("data.lanes", config.data.lanes if config.stream.subject else 0, step.n_data),
    ):
        if size % n:
            return f"{name} = {size} is not a multiple of {n}"
    n_devices = step.n_data * step.n_latent
    if config.mesh.shard_optimizer and sae.n_latents % n_devices:
        return f"mesh.shard_optimizer: {sae.n_latents} latents, {n_devices} devices"
    if step.is_topk:
        if sae.exchange == "tree" and step.n_latent & (step.n_latent - 1):
            return f"sae.exchange = 'tree' wants a power of two, not {step.n_latent}"
        try:
            step.choice
        except ValueError as error:
            return str(error)
    return None
