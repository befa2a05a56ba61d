"""One training step, and the checks of a whole run before it starts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from sae_jax import firing, normalize, optim
from sae_jax import state as states
from sae_jax.config import (
    CHOOSE_K,
    SaeConfig,
    TrainConfig,
    checked,
    k_aux,
    most_chosen,
    subtracts_b_dec,
)
from sae_jax.gradients import differentiate
from sae_jax.loader import Feed
from sae_jax.mesh import DATA, LATENT, optimizer_spec, param_spec
from sae_jax.saes.topk import plan_choice
from sae_jax.state import Setup, TrainState

Metrics = dict[str, jax.Array]


def validate(config: TrainConfig, mesh: Mesh, feed: Feed) -> Setup:
    """Checks the run against its mesh and its rows, and sets every derived field.

    Raises:
        ValueError: one line that names the field, both numbers and the cure.
    """
    return prepare(check(config, mesh, feed), mesh, feed)


def check(config: TrainConfig, mesh: Mesh, feed: Feed) -> TrainConfig:
    """The part of `validate` that is done at once: the config of an SAE that can be."""
    config = checked(config)
    d_model = feed.width
    if config.sae.d_model not in (None, d_model):
        raise ValueError(
            f"sae.d_model = {config.sae.d_model}, but {feed} is {d_model} wide: leave "
            "sae.d_model unset to take that"
        )
    _check_divides("sae.n_latents", config.sae.n_latents, mesh, LATENT)
    if config.mesh.shard_optimizer:
        _check_parts(config, mesh)
    _check_divides("data.batch_rows", config.data.batch_rows, mesh, DATA)
    if config.data.microbatch_rows is not None:
        _check_divides("data.microbatch_rows", config.data.microbatch_rows, mesh, DATA)
    if config.sae.architecture == "topk":
        # Refuses a choice that would find too few of the K largest.
        plan_choice(config.sae, mesh, most_chosen(config.sae))
        _check_exchange(config.sae, mesh)
    has_auxk = config.sae.architecture in CHOOSE_K
    sae = dataclasses.replace(
        config.sae,
        d_model=d_model,
        subtract_b_dec=subtracts_b_dec(config.sae),
        k_aux=k_aux(config.sae, d_model) if has_auxk else None,
    )
    return dataclasses.replace(config, sae=sae)


def prepare(config: TrainConfig, mesh: Mesh, feed: Feed) -> Setup:
    """The rest of it, for which the feed may have to pack its text first."""
    return Setup(
        config=dataclasses.replace(config, data=feed.data),
        normalization=normalize.fit(
            config.sae.normalization, feed.statistics(), feed.width
        ),
        mesh=mesh,
        site=feed.site,
        store_identity=feed.identity,
    )


def make_step(
    setup: Setup,
) -> Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]:
    """The compiled step: (state, rows [B, D]) -> (next state, scalars).

    The state that goes in is given up: its memory becomes the next one's.
    """
    update = _place_update(setup)
    placement = jax.tree.map(lambda leaf: leaf.sharding, states.abstract(setup))

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(placement, None))
    def step(state: TrainState, acts_bd: jax.Array) -> tuple[TrainState, Metrics]:
        batch = acts_bd, acts_bd
        grads, outcome = differentiate(setup, state.params, batch, state.counters)
        old = optim.Optimized(state.params, state.ema, state.optimizer)
        new, norms = update(old, grads, outcome.assigned)
        steps_since_l = firing.update(state.counters.steps_since_l, outcome.fired_l)
        next_state = TrainState(
            params=new.params,
            ema=new.ema,
            optimizer=new.moments,
            counters=state.counters._replace(
                steps_since_l=steps_since_l, steps=state.counters.steps + 1
            ),
        )
        return next_state, outcome.metrics | norms

    return step


def _place_update(setup: Setup) -> Callable[..., tuple[optim.Optimized, Metrics]]:
    """`optim.update` of each device's own rows.

    Where data shards share the optimizer, each updates a part of the rows that they all
    have. The step's result has them all again, so that the parts are gathered there.
    """
    shapes, is_shared = states.abstract(setup), setup.shards_optimizer
    place = optimizer_spec if is_shared else param_spec
    specs: Any = {name: place(name) for name in shapes.params}
    moments = shapes.optimizer._replace(count=PartitionSpec(), mu=specs, nu=specs)
    placed = optim.Optimized(specs, specs, moments)
    axes = (LATENT, DATA) if is_shared else (LATENT,)
    return jax.shard_map(
        functools.partial(optim.update, setup.config, setup.unit_norm, axes=axes),
        mesh=setup.mesh,
        in_specs=(placed, specs, PartitionSpec()),
        out_specs=(placed, PartitionSpec()),
    )


def _check_exchange(config: SaeConfig, mesh: Mesh) -> None:
    n_shards = mesh.shape[LATENT]
    if config.exchange == "tree" and n_shards & (n_shards - 1):
        raise ValueError(
            f"sae.exchange = 'tree' merges pairs of latent shards, but mesh.{LATENT} = "
            f"{n_shards} is not a power of two: choose 'count', or another mesh"
        )


def _check_parts(config: TrainConfig, mesh: Mesh) -> None:
    if config.sae.n_latents % mesh.size:
        raise ValueError(
            f"mesh.shard_optimizer shares {config.sae.n_latents} latents among "
            f"{mesh.size} devices, which do not divide them: leave it out"
        )


def _check_divides(name: str, size: int, mesh: Mesh, axis: str) -> None:
    if size % mesh.shape[axis]:
        raise ValueError(
            f"{name} = {size} is not a multiple of mesh.{axis} = {mesh.shape[axis]}: "
            "choose a multiple, or another mesh"
        )
