"""The gradients of a batch's whole loss.

    loss = the architecture's own + aux_coefficient * AuxK

The first is a mean over rows. JAX differentiates it, for `data.microbatch_rows` rows at
a time if that is set, and the gradients add up: beyond what its parts need, a batch
takes some numbers per element of a row, and gradients twice. AuxK is in relation
to the residual of the whole batch, so its gradients come when all rows have theirs
(`sae_jax.saes.auxk`).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from sae_jax.firing import Counters
from sae_jax.mesh import DATA
from sae_jax.optim import Params
from sae_jax.saes import auxk
from sae_jax.saes.base import Batch, Sae
from sae_jax.state import Setup


class Outcome(NamedTuple):
    """What a batch tells beside gradients."""

    metrics: dict[str, jax.Array]  # scalars
    fired_l: jax.Array  # bool
    assigned: Params  # parameters that a step sets without a gradient


def differentiate(
    setup: Setup, params: Params, batch: Batch, counters: Counters
) -> tuple[Params, Outcome]:
    """The gradients of all parameters on a batch [B, D] in activation space."""
    # What the loss and AuxK have gradients of are the weights that the maths reads.
    weights, pull_back = jax.vjp(lambda p: setup.sae(p).weights()[0], params)
    gradients, aux = _of_parts(setup, weights, batch, counters)
    metrics = aux["metrics"] | {"n_dead": jnp.sum(counters.is_dead_l)}
    coefficient = setup.config.sae.aux_coefficient
    if "residual_bd" in aux and coefficient:
        sae = _make_sae(setup, weights)
        normed_bd, _, _ = sae.normalize(batch[0])
        gradients, aux_loss = auxk.add_gradients(
            sae, gradients, normed_bd, aux["residual_bd"], counters
        )
        metrics["aux_loss"] = aux_loss
        metrics["loss"] += coefficient * aux_loss
    (gradients,) = pull_back(gradients)
    return gradients, Outcome(metrics, aux["fired_l"], aux["assigned"])


def _of_parts(
    setup: Setup, weights: Params, batch: Batch, counters: Counters
) -> tuple[Params, dict[str, Any]]:
    """Gradients of the architecture's own loss, and what comes with it."""
    n_rows = batch[0].shape[0]
    n_parts = n_rows // (setup.config.data.microbatch_rows or n_rows)

    @functools.partial(jax.grad, has_aux=True)
    def differentiate(weights: Params, part: Batch) -> tuple[jax.Array, dict]:
        loss, aux = _make_sae(setup, weights).loss(part, counters)
        return loss / n_parts, aux | {"metrics": aux["metrics"] | {"loss": loss}}

    if n_parts == 1:
        return differentiate(weights, batch)

    def add(done: tuple[Params, jax.Array], part: Batch) -> tuple:
        more, aux = differentiate(weights, part)
        gradients = jax.tree.map(jnp.add, done[0], more)
        return (gradients, done[1] | aux.pop("fired_l")), aux

    nothing_l = jnp.zeros_like(counters.steps_since_l, dtype=bool)
    nothing = jax.tree.map(jnp.zeros_like, weights), nothing_l
    parts = jax.tree.map(lambda rows_bd: _split(setup, rows_bd, n_parts), batch)
    aux: dict[str, Any]
    (gradients, fired_l), aux = lax.scan(add, nothing, parts)
    aux["metrics"] = {  # counts are named n_, all else are means over rows
        name: jnp.sum(values) if name.startswith("n_") else jnp.mean(values)
        for name, values in aux["metrics"].items()
    }
    if "residual_bd" in aux:
        aux["residual_bd"] = _join(setup, aux["residual_bd"])
    return gradients, aux | {"fired_l": fired_l}


def _make_sae(setup: Setup, weights: Params) -> Sae:
    """The SAE of weights that are weighed by norm already, if they are to be."""
    sae = setup.sae(weights)
    sae.config = dataclasses.replace(sae.config, norm_weighted=False)
    return sae


def _split(setup: Setup, rows_bd: jax.Array, n_parts: int) -> jax.Array:
    """[parts, rows of a part, D]: every part has rows of every data shard."""
    n_shards, d_model = setup.mesh.shape[DATA], rows_bd.shape[1]
    parts = rows_bd.reshape(n_shards, n_parts, -1, d_model).swapaxes(0, 1)
    parts = parts.reshape(n_parts, -1, d_model)
    spec = PartitionSpec(None, DATA, None)
    return lax.with_sharding_constraint(parts, NamedSharding(setup.mesh, spec))


def _join(setup: Setup, parts_pbd: jax.Array) -> jax.Array:
    """The rows of `_split`, in the order that they had."""
    n_shards, (n_parts, _, d_model) = setup.mesh.shape[DATA], parts_pbd.shape
    rows = parts_pbd.reshape(n_parts, n_shards, -1, d_model).swapaxes(0, 1)
    return rows.reshape(-1, d_model)
