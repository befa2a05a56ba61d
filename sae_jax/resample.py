"""Neuron resampling: dead latents start again where rows are rebuilt worst.

For each dead latent one row x is drawn, with probability as its squared loss. Then

    w_dec <- (x - b_dec) / |x - b_dec|
    w_enc <- 0.2 * (mean norm of live encoder rows) * w_dec
    biases <- 0, Adam's moments <- 0, and the latent counts as live

Source: Bricken et al. 2023, "Towards Monosemanticity", appendix on neuron resampling;
the ReLU, ProLU and Gated baselines of Gao et al. 2024 use it. The average of the
weights is left alone: it follows at its own pace.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sae_jax import optim
from sae_jax import state as states
from sae_jax.loader import Feed
from sae_jax.mesh import is_spread
from sae_jax.state import Setup, TrainState

ROWS = 8192  # to draw from; the source takes 819,200

_ENCODER_NORM = 0.2


class Resampling:
    """Resamples a run now and then, where its config asks for it."""

    def __init__(self, setup: Setup, feed: Feed):
        self._setup, self._feed = setup, feed
        self._resample = make_resample(setup)

    def after(self, step: int, state: TrainState) -> TrainState:
        """The state to go on with; what is drawn follows from seed and step alone."""
        config = self._setup.config
        if config.resample_every_rows is None:
            return state
        n_done, rest = divmod(step, config.steps(config.resample_every_rows))
        is_last = step == config.n_steps  # what starts now would never be trained
        if rest or n_done > config.n_resamples or is_last:
            return state
        seed = config.seed + step
        rows_bd = self._feed.sample(ROWS, seed)
        return self._resample(state, rows_bd, seed)


def make_resample(
    setup: Setup,
) -> Callable[[TrainState, np.ndarray, int], TrainState]:
    """The compiled resampling: (state, rows [B, D], seed) -> next state."""
    placement = jax.tree.map(lambda leaf: leaf.sharding, states.abstract(setup))

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=placement)
    def resample(state: TrainState, acts_bd: jax.Array, seed: jax.Array) -> TrainState:
        key = jax.random.key(seed)
        is_dead_l = state.counters.is_dead_l
        starts_ld = _draw_directions(setup, state.params, acts_bd, key)
        params = _restart(state.params, starts_ld, is_dead_l)
        steps_since_l = jnp.where(is_dead_l, 0, state.counters.steps_since_l)
        return state._replace(
            params=params,
            optimizer=_forget(state.optimizer, is_dead_l),
            counters=state.counters._replace(steps_since_l=steps_since_l),
        )

    return resample


def _draw_directions(
    setup: Setup, params: optim.Params, acts_bd: jax.Array, key: jax.Array
) -> jax.Array:
    """A unit direction [L, D] for each latent, from rows that are rebuilt badly."""
    sae = setup.sae(params)
    normed_bd, _, _ = sae.normalize(acts_bd)
    values_bk, indices_bk, _ = sae.encode_normed(normed_bd)
    error_bd = sae.decode_normed(values_bk, indices_bk) - normed_bd
    loss_b = jnp.sum(jnp.square(error_bd), axis=1)
    cumulative_b = jnp.cumsum(jnp.square(loss_b))
    drawn_l = cumulative_b[-1] * jax.random.uniform(key, (sae.n_latents,))
    rows_l = jnp.minimum(jnp.searchsorted(cumulative_b, drawn_l), len(acts_bd) - 1)
    return optim.normalise_rows(normed_bd - params["b_dec_d"])[rows_l]


def _restart(
    params: optim.Params, starts_ld: jax.Array, is_dead_l: jax.Array
) -> optim.Params:
    norm_l = jnp.linalg.norm(params["w_enc_ld"], axis=1)
    mean_norm = jnp.mean(norm_l, where=~is_dead_l)
    # With no live latent there is nothing to measure by.
    length = _ENCODER_NORM * jnp.where(jnp.all(is_dead_l), 1, mean_norm)
    starts = {"w_dec_ld": starts_ld, "w_enc_ld": length * starts_ld}
    return {
        name: _choose(is_dead_l, starts.get(name, jnp.zeros_like(value)), value)
        if is_spread(name)
        else value
        for name, value in params.items()
    }


def _forget(
    moments: optax.ScaleByAdamState, is_dead_l: jax.Array
) -> optax.ScaleByAdamState:
    """The moments, those of dead latents at zero."""

    def forget(by_name: optim.Params) -> optim.Params:
        return {
            name: _choose(is_dead_l, jnp.zeros_like(moment), moment)
            if is_spread(name)
            else moment
            for name, moment in by_name.items()
        }

    return moments._replace(mu=forget(moments.mu), nu=forget(moments.nu))


def _choose(is_dead_l: jax.Array, dead: jax.Array, live: jax.Array) -> jax.Array:
    is_dead = is_dead_l.reshape(-1, *[1] * (live.ndim - 1))
    return jnp.where(is_dead, dead.astype(live.dtype), live)
