"""The optimizer as a chain of optax transforms, and the average of the weights.

    project   g <- g - (g . w) w      for each unit decoder row w
    clip      g <- g min(1, c / |g|)  |g| over all parameters on all devices; optional
    Adam      eps 6.25e-10; constant rate, with linear warm-up and decay if asked
    unit norm w <- w / |w|            for each decoder row, after Adam's step
    EMA       m <- d m + (1 - d) w,   read as m / (1 - d^t)

The order is ours: projecting before and normalising after Adam means that the rows
have unit norm in every forward pass and in every saved state. OpenAI's script
normalises after the backward pass instead and takes its EMA before Adam, so its saved
rows are one step off the sphere (Gao et al. 2024, appendix A).

Parameters are flat dictionaries from a name to an array; the names of the rows with
unit norm come from the architecture.
"""

import functools
from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from sae_jax.config import TrainConfig, learning_rate

Params = dict[str, jax.Array]


def build(
    config: TrainConfig, unit_norm: Collection[str]
) -> optax.GradientTransformation:
    """The whole chain for one run."""
    adam = optax.adam(
        functools.partial(learning_rate_at, config),
        config.optimizer.b1,
        config.optimizer.b2,
        config.optimizer.eps,
    )
    clip = config.optimizer.clip_norm
    return optax.chain(
        project_rows(unit_norm),
        optax.identity() if clip is None else optax.clip_by_global_norm(clip),
        adam,
        unit_norm_rows(unit_norm),
    )


def learning_rate_at(config: TrainConfig, step: ArrayLike) -> jax.Array:
    """The learning rate of a step, the first being 0."""
    warmup = config.steps(config.optimizer.warmup_rows)
    decay = config.steps(config.optimizer.decay_rows)
    step, rate = jnp.asarray(step, float), jnp.asarray(learning_rate(config))
    if warmup:
        rate *= jnp.minimum(1, (step + 1) / warmup)
    if decay:
        rate *= jnp.minimum(1, (config.n_steps - step) / decay)
    return rate


def project_rows(names: Collection[str]) -> optax.GradientTransformation:
    """Removes from each gradient row its component along the parameter's unit row."""

    def project(name: str, grad_ld: jax.Array, param_ld: jax.Array) -> jax.Array:
        if name not in names:
            return grad_ld
        along_l1 = jnp.sum(grad_ld * param_ld, axis=-1, keepdims=True)
        return grad_ld - along_l1 * param_ld

    return _stateless(project)


def unit_norm_rows(names: Collection[str]) -> optax.GradientTransformation:
    """Turns an update into the one that ends on rows of unit norm."""

    def renormalise(name: str, update_ld: jax.Array, param_ld: jax.Array) -> jax.Array:
        if name not in names:
            return update_ld
        return normalise_rows(param_ld + update_ld) - param_ld

    return _stateless(renormalise)


def normalise_rows(rows_ld: jax.Array) -> jax.Array:
    """Each row divided by its Euclidean norm."""
    return rows_ld / jnp.linalg.norm(rows_ld, axis=-1, keepdims=True)


def ema_update(ema: Params, params: Params, decay: float) -> Params:
    """The running average after one more step; it starts at zero."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)


def ema_read(
    ema: Params, decay: float, n_steps: int, unit_norm: Collection[str]
) -> Params:
    """The average freed of its start at zero, with unit rows where declared."""
    if n_steps < 1:
        raise ValueError("the average of the weights does not exist before one step")
    correction = 1 - decay**n_steps
    return {
        name: normalise_rows(value) if name in unit_norm else value / correction
        for name, value in ema.items()
    }


def _stateless(change) -> optax.GradientTransformation:  # type: ignore[no-untyped-def]
    """A transform without state from change(name, update, parameter)."""

    def init(params: Params) -> optax.EmptyState:
        del params  # Nothing to remember.
        return optax.EmptyState()

    def update(
        updates: Params, state: optax.EmptyState, params: Params | None = None
    ) -> tuple[Params, optax.EmptyState]:
        if params is None:
            raise ValueError("this transform reads the parameters: pass them to update")
        changed = {n: change(n, u, params[n]) for n, u in updates.items()}
        return changed, state

    return optax.GradientTransformation(init, update)
