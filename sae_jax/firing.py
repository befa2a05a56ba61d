"""Which latents are dead: a counter of steps since each latent last fired.

A latent fires on a row when its value is above `sae.firing_threshold`, 0 unless set.
The counter is 0 after a step with a firing and grows by one in every other step; at
`dead_after_steps` the latent counts as dead, until it fires again. Steps, not rows, are
counted on the device, so the counter stays far from 2**31 however many rows a step has.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Counters(NamedTuple):
    """What a training step reads and keeps beside parameters and moments."""

    steps_since_l: jax.Array  # int32 [L]
    dead_after_steps: jax.Array  # int32, constant over the run
    loss_scale: jax.Array  # see sae_jax.losses, constant over the run
    steps: jax.Array  # int32, done before this one
    sparsity_warmup_steps: jax.Array  # int32, constant over the run

    @property
    def is_dead_l(self) -> jax.Array:
        return is_dead(self.steps_since_l, self.dead_after_steps)

    @property
    def sparsity_scale(self) -> jax.Array:
        """What the sparsity coefficient is multiplied by: up to 1 over the warm-up."""
        return jnp.minimum(1, (self.steps + 1) / self.sparsity_warmup_steps)


def start(n_latents: int) -> jax.Array:
    """The counter [L] before the first step: nothing is dead yet."""
    return jnp.zeros((n_latents,), jnp.int32)


def update(steps_since_l: jax.Array, fired_l: jax.Array) -> jax.Array:
    """The counter after a step in which the latents of `fired_l` fired."""
    return jnp.where(fired_l, 0, steps_since_l + 1)


def is_dead(steps_since_l: jax.Array, dead_after_steps: int | jax.Array) -> jax.Array:
    """Latents [L] that have not fired for `dead_after_steps` steps."""
    return steps_since_l >= dead_after_steps
