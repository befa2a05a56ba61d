"""The optimizer and the average of the weights, in one pass over each parameter.

    project   g <- g - (g . w) w      for each unit decoder row w
    clip      g <- g min(1, c / |g|)  |g| over all parameters on all devices; optional
    Adam      eps 6.25e-10; constant rate, with linear warm-up and decay if asked
    unit norm w <- w / |w|            for each decoder row, after Adam's step
    EMA       m <- d m + (1 - d) w,   read as m / (1 - d^t)

The order is ours: projecting before and normalising after Adam means that the rows
have unit norm in every forward pass and in every saved state. OpenAI's script
normalises after the backward pass instead and takes its EMA before Adam, so its saved
rows are one step off the sphere (Gao et al. 2024, appendix A).

All of it is local to a row but the norm that clips. So it is done some rows at a time,
in place: each array is read from memory once and written once, and there are no
temporaries of the size of a parameter. The moments are those of `optax.adam`, which the
tests compare with.

Parameters are flat dictionaries from a name to an array; the names of the rows with
unit norm come from the architecture.
"""

import functools
from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from sae_jax.config import TrainConfig, learning_rate
from sae_jax.mesh import is_spread

Params = dict[str, jax.Array]

_CHUNK_SIZE = 2**19  # elements that are updated at a time: they stay in cache


class Optimized(NamedTuple):
    """Parameters, and what an update keeps beside them."""

    params: Params
    ema: Params
    moments: optax.ScaleByAdamState


class _Step(NamedTuple):
    """The numbers of one step; corrections are Adam's, 1 - b^t."""

    rate: jax.Array
    correction1: jax.Array
    correction2: jax.Array
    clip_factor: jax.Array


class _Slots(NamedTuple):
    """What belongs to one parameter, or to some of its rows."""

    param: jax.Array
    ema: jax.Array
    mu: jax.Array
    nu: jax.Array


def start(params: Params) -> optax.ScaleByAdamState:
    """The moments before the first step."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    more = jax.tree.map(jnp.zeros_like, params)  # a step donates each buffer once
    return optax.ScaleByAdamState(count=jnp.int32(0), mu=zeros, nu=more)


def update(
    config: TrainConfig,
    unit_norm: Collection[str],
    old: Optimized,
    grads: Params,
    assigned: Params,
    axes: tuple[str, ...] = (),
) -> tuple[Optimized, dict[str, jax.Array]]:
    """One step of the optimizer, and the norms of all gradients and parameters.

    Args:
        config: the run.
        unit_norm: parameters whose rows have unit norm.
        old: is given up.
        grads: of all parameters.
        assigned: new values of parameters that are not learned by gradient.
        axes: inside `jax.shard_map`, what parameters named `_l` or `_ld` are spread
            over.
    """
    moments = old.moments
    count = moments.count + 1
    clip_factor = _clip_factor(config, unit_norm, old.params, grads, axes)
    step = _Step(
        rate=learning_rate_at(config, moments.count),
        correction1=1 - config.optimizer.b1**count,
        correction2=1 - config.optimizer.b2**count,
        clip_factor=clip_factor,
    )
    begin = _wait_for(grads)
    slots, squares = {}, {}
    for name, param in old.params.items():
        slot = _Slots(param, old.ema[name], moments.mu[name], moments.nu[name])
        if name in assigned:
            ema = _average(config, slot.ema, assigned[name])
            slots[name] = slot._replace(param=assigned[name], ema=ema)
            squares[name] = _sums_of_squares(grads[name], assigned[name])
        else:
            slots[name], squares[name] = _update(
                config, name in unit_norm, slot, grads[name], step, begin
            )
    grad_norm, param_norm = jnp.sqrt(_add_up(squares, axes))
    new = Optimized(
        params={name: slot.param for name, slot in slots.items()},
        ema={name: slot.ema for name, slot in slots.items()},
        moments=optax.ScaleByAdamState(
            count=count,
            mu={name: slot.mu for name, slot in slots.items()},
            nu={name: slot.nu for name, slot in slots.items()},
        ),
    )
    return new, {"grad_norm": grad_norm, "param_norm": param_norm}


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


def project_rows(grad_ld: jax.Array, w_ld: jax.Array) -> jax.Array:
    """Each gradient row without its component along the unit row of w."""
    return grad_ld - jnp.sum(grad_ld * w_ld, axis=-1, keepdims=True) * w_ld


def normalise_rows(rows_ld: jax.Array) -> jax.Array:
    """Each row divided by its Euclidean norm."""
    return rows_ld / jnp.linalg.norm(rows_ld, axis=-1, keepdims=True)


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


def _update(
    config: TrainConfig,
    is_unit: bool,
    slots: _Slots,
    grad: jax.Array,
    step: _Step,
    begin: jax.Array,
) -> tuple[_Slots, jax.Array]:
    """One parameter after one step, and the sums of squares of gradient and itself."""
    shape = grad.shape
    if not shape:
        slots, grad = jax.tree.map(jnp.atleast_1d, (slots, grad))
    n_rows = grad.shape[0]
    rows = min(n_rows, max(1, _CHUNK_SIZE * n_rows // grad.size))
    on_rows = functools.partial(_update_rows, config, is_unit, step, grad)

    def loop(i: jax.Array, carry: tuple[_Slots, jax.Array]) -> tuple:
        slots, squares = carry
        slots, more = on_rows(slots, i * rows, rows)
        return slots, squares + more

    n_chunks, n_left = divmod(n_rows, rows)
    zeros = jnp.full_like(grad, 0, shape=(2,))
    slots, squares = lax.fori_loop(begin, n_chunks, loop, (slots, zeros))
    if n_left:
        slots, more = on_rows(slots, jnp.int32(n_rows - n_left), n_left)
        squares += more
    return jax.tree.map(lambda array: array.reshape(shape), slots), squares


def _update_rows(
    config: TrainConfig,
    is_unit: bool,
    step: _Step,
    grad: jax.Array,
    slots: _Slots,
    first: jax.Array,
    size: int,
) -> tuple[_Slots, jax.Array]:
    """The same of `size` rows from `first` on."""

    def take(array: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(array, first, size)

    def put(array: jax.Array, chunk: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(array, chunk, first, 0)

    # Each array is put back before it is read again: what is read from the old one
    # after that would keep a copy of all of it.
    optimizer, old = config.optimizer, take(slots.param)
    g = take(grad)
    if is_unit:
        g = project_rows(g, old)
    g = lax.optimization_barrier(g * step.clip_factor)
    mu = put(slots.mu, _mix(optimizer.b1, take(slots.mu), g))
    nu = put(slots.nu, _mix(optimizer.b2, take(slots.nu), jnp.square(g)))
    root = jnp.sqrt(take(nu) / step.correction2) + optimizer.eps
    new = old - step.rate * (take(mu) / step.correction1) / root
    if is_unit:
        new = normalise_rows(new)
    param = put(slots.param, new)
    ema = put(slots.ema, _average(config, take(slots.ema), take(param)))
    return _Slots(param, ema, mu, nu), _sums_of_squares(take(grad), take(param))


def _wait_for(grads: Params) -> jax.Array:
    """0, known when the gradients of the small parameters are.

    The last of them, of b_dec, reads W_enc. If it were not clear that this happens
    before W_enc is overwritten, W_enc would be copied.
    """
    small = [jnp.sum(jnp.square(g)) for n, g in grads.items() if not is_spread(n)]
    return (sum(small, start=jnp.zeros(())) < 0).astype(jnp.int32)


def _clip_factor(
    config: TrainConfig,
    unit_norm: Collection[str],
    params: Params,
    grads: Params,
    axes: tuple[str, ...],
) -> jax.Array:
    """What the projected gradients are multiplied by."""
    most = config.optimizer.clip_norm
    if most is None:
        return jnp.ones(())
    squares = {}
    for name, grad in grads.items():
        if name in unit_norm:
            grad = project_rows(grad, params[name])
        squares[name] = jnp.sum(jnp.square(grad))
    norm = jnp.sqrt(_add_up(squares, axes))
    return most / jnp.maximum(norm, most)


def _add_up(squares: dict[str, jax.Array], axes: tuple[str, ...]) -> jax.Array:
    """The sum over all parameters on all devices."""
    own = [square for name, square in squares.items() if is_spread(name)]
    shared = [square for name, square in squares.items() if not is_spread(name)]
    total = sum(own, start=jnp.zeros(()))
    return sum(shared, start=lax.psum(total, axes))


def _sums_of_squares(grad: jax.Array, param: jax.Array) -> jax.Array:
    return jnp.stack([jnp.sum(jnp.square(grad)), jnp.sum(jnp.square(param))])


def _average(config: TrainConfig, old: jax.Array, new: jax.Array) -> jax.Array:
    return _mix(config.optimizer.ema_decay, old, new)


def _mix(decay: float, old: jax.Array, new: jax.Array) -> jax.Array:
    return decay * old + (1 - decay) * new
