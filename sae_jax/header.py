"""What a run says of itself before it starts."""

from sae_jax import config as configs
from sae_jax.config import TrainConfig
from sae_jax.loader import Feed
from sae_jax.mesh import DATA, LATENT
from sae_jax.saes.topk import plan_choice
from sae_jax.state import Setup
from sae_jax.topk import Choice

# Of what is set, a run's header has these already, or they are of no consequence.
_NOT_TOLD = (
    "mesh.",
    "rows",
    "log_every_steps",
    "checkpoint",
    "data.store",
    "data.site",
    "data.batch_rows",
    "data.lanes",
    "data.window_chunks",
)


def describe(
    config: TrainConfig, setup: Setup, feed: Feed, start: int, why: str = "as set"
) -> str:
    """What is trained, on what, where and for how long; below it what else is set."""
    shape, sparsity = setup.mesh.shape, configs.sparsity(config.sae)
    first = (
        f"{config.sae.architecture}, {config.sae.n_latents:,} latents, "
        f"{', '.join(f'{name} {value:g}' for name, value in sparsity.items())}, "
        f"{feed}, "
        f"mesh {shape[DATA]} x {shape[LATENT]} "
        f"(data x latent, {why}), from step {start:,} to {config.n_steps:,} of "
        f"{config.data.batch_rows:,} rows each, {feed.epochs(config.rows):.3g} epochs"
    )
    if config.sae.architecture == "topk":
        k = configs.most_chosen(config.sae)
        choice = plan_choice(config.sae, setup.mesh, k)
        first += f", {choice.recall:.2%} of the {k} largest expected {_tell(choice)}"
    told = (
        *_NOT_TOLD,
        *(f"sae.{name} =" for name in ("architecture", "n_latents", *sparsity)),
    )
    changed = [f"{name} = {value!r}" for name, value in configs.changed(config).items()]
    further = ", ".join(text for text in changed if not text.startswith(told))
    lines = [first, feed.describe(), *([further] if further else [])]
    return "\n".join(f"train: {line}" for line in lines)


def _tell(choice: Choice) -> str:
    """How K are chosen; where buckets do not pay, a choice by buckets is exact."""
    if choice.n_buckets:
        return f"by {choice.n_buckets} buckets of a latent shard"
    if choice.method == "approx":
        return "by approx_max_k"
    return "by sorting"
