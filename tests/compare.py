"""Losses, gradients and codes of small SAEs, and checks of them against the oracle."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_rivals as rivals
from small_sae import make_counters, oracle_settings, place

from sae_jax import gradients
from sae_jax.config import CHOOSE_K
from sae_jax.mesh import batch_sharding
from sae_jax.state import Setup

# Most of these tests' time is compiling: the same program, with plainer machine code.
QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}


def check_loss(
    setup: Setup, params, rows_bd, dead_l, dtype=None, rtol=1e-10, **counters
) -> None:
    """The loss, every metric, fired_l and every gradient of the loss."""
    loss, aux, found = differentiate(
        setup, params, rows_bd, dead_l, dtype, **counters
    )
    architecture, settings = _oracles(setup, **counters)
    want = rivals.terms(architecture, params, rows_bd, dead_l, settings)
    np.testing.assert_allclose(loss, want.metrics["loss"], rtol=rtol)
    metrics = dict(aux["metrics"])
    # Not terms of the loss.
    metrics.pop("threshold", None)
    metrics.pop("n_resorted", None)
    # The last prefix is the whole, whose error is "nmse".
    named = want.metrics.keys() - {f"nmse_prefix_{m}" for m in settings.prefixes[-1:]}
    assert metrics.keys() == named
    for name, value in metrics.items():
        np.testing.assert_allclose(
            value, want.metrics[name], rtol=rtol, err_msg=name
        )
    np.testing.assert_array_equal(aux["fired_l"], want.fired_l)
    want_gradients = rivals.gradients(architecture, params, rows_bd, dead_l, settings)
    check_gradients(found, want_gradients, rtol)


def check_gradients(found, want: oracle.Params, rtol=1e-10) -> None:
    assert found.keys() == want.keys()
    for name, value in found.items():
        size = np.abs(want[name]).max()
        np.testing.assert_allclose(
            value, want[name], rtol=rtol, atol=rtol * size, err_msg=name
        )


def differentiate(
    setup: Setup, params, rows_bd, dead_l, dtype=None, of="loss", **counters
):
    """The loss, what comes beside it, and the gradients of the loss or of a metric."""
    rows_bd = jax.device_put(np.asarray(rows_bd, dtype), batch_sharding(setup.mesh))
    found, outcome = _compiled(setup, of)(
        place(setup, params, dtype), rows_bd, make_counters(dead_l, **counters)
    )
    return outcome.metrics["loss"], outcome._asdict(), found


def want_gradients(setup: Setup, params, rows_bd, dead_l, of: str) -> oracle.Params:
    """The oracle's, of one unweighted term."""
    architecture, settings = _oracles(setup)
    return rivals.gradients(architecture, params, rows_bd, dead_l, settings, of)


def check_code(code, ranked_bl: oracle.Array, k: int, rtol: float = 0) -> None:
    """The contract of a code: falling, at most K, distinct, in range; the winners.

    `ranked_bl` is the dense code, or what the choice is made among.
    """
    values_bk, indices_bk = np.asarray(code.values), np.asarray(code.indices)
    assert values_bk.shape == indices_bk.shape == (len(ranked_bl), k)
    assert indices_bk.dtype == np.int32
    assert (values_bk >= 0).all() and (np.diff(values_bk) <= 0).all()
    assert (0 <= indices_bk).all() and (indices_bk < ranked_bl.shape[1]).all()
    assert all(len(set(indices_k)) == k for indices_k in indices_bk)
    want_bk = np.array(oracle.choose(ranked_bl, k))
    want_values_bk = np.maximum(np.take_along_axis(ranked_bl, want_bk, 1), 0)
    np.testing.assert_allclose(values_bk, want_values_bk, rtol=rtol, atol=rtol)
    is_used_bk = want_values_bk > 0
    np.testing.assert_array_equal(indices_bk[is_used_bk], want_bk[is_used_bk])


@functools.cache
def _compiled(setup: Setup, of: str):
    """Compiled once for all tests with the same SAE on the same mesh."""

    has_auxk = setup.config.sae.architecture in CHOOSE_K
    if has_auxk:
        sae = dataclasses.replace(setup.config.sae, aux_coefficient=1.0)
        config = dataclasses.replace(setup.config, sae=sae)
        with_auxk = dataclasses.replace(setup, config=config)

    def of_loss(params, rows_bd, counters, setup=setup):
        batch = rows_bd, rows_bd
        return gradients.differentiate(setup, params, batch, counters)

    def of_auxk(params, rows_bd, counters):
        """What AuxK adds to gradients of 0: where it adds nothing that is exactly 0."""
        with mock.patch.object(gradients, "_of_parts", of_nothing):
            return of_loss(params, rows_bd, counters, with_auxk)

    def of_nothing(*batch, of_parts=gradients._of_parts):
        found, aux = of_parts(*batch)
        return jax.tree.map(jnp.zeros_like, found), aux

    @functools.partial(jax.grad, has_aux=True)
    def of_term(params, rows_bd, counters):
        loss, aux = setup.sae(params).loss((rows_bd, rows_bd), counters)
        metrics = aux["metrics"] | {"loss": loss}
        return metrics[of], gradients.Outcome(metrics, aux["fired_l"], aux["assigned"])

    run = of_loss if of == "loss" else of_term
    if of == "aux_loss" and has_auxk:  # Gated has a term of this name
        run = of_auxk
    return jax.jit(run, compiler_options=QUICK_TO_COMPILE)


def _oracles(
    setup: Setup, steps: int = 0, warmup_steps: int = 0
) -> tuple[str, oracle.Settings]:
    return setup.config.sae.architecture, oracle_settings(setup, steps, warmup_steps)
