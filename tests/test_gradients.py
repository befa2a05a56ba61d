"""The whole loss's gradients: micro-batches against whole ones, and AuxK's edges."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from compare import QUICK_TO_COMPILE, check_gradients
from rival_cases import make_params as make_rival_params
from small_sae import (
    B,
    D,
    L,
    LOSS_SCALE,
    make_counters,
    make_params,
    make_rows,
    make_setup,
    oracle_settings,
    place,
    random_dead,
)

from sae_jax.gradients import differentiate
from sae_jax.mesh import batch_sharding
from sae_jax.saes import auxk

CASES = {
    "topk": {},
    "bucketed": {"selection": "bucketed"},
    "multi_topk": {"multi_topk": True, "k": 3},
    "norm_weighted": {"norm_weighted": True},
    "prefixes": {"prefixes": (8, L)},
    "relu": {"architecture": "relu"},
    "gated": {"architecture": "gated"},
    "jumprelu": {"architecture": "jumprelu"},
}


def _differentiate(setup, params, rows_bd, n_dead=12):
    rows_bd = jax.device_put(rows_bd, batch_sharding(setup.mesh))
    run = jax.jit(
        functools.partial(differentiate, setup), compiler_options=QUICK_TO_COMPILE
    )
    return run(params, (rows_bd, rows_bd), make_counters(random_dead(n_dead)))


def _in_parts(setup, microbatch_rows):
    data = dataclasses.replace(setup.config.data, microbatch_rows=microbatch_rows)
    return dataclasses.replace(
        setup, config=dataclasses.replace(setup.config, data=data)
    )


@pytest.mark.parametrize(
    ("case", "mesh_shape", "rows"),
    [*((case, (2, 4), 4) for case in CASES), ("topk", (1, 1), 8)],
)
def test_micro_batches_give_the_gradients_of_the_whole_batch(
    x64, case, mesh_shape, rows
):
    setup = make_setup(mesh_shape, **CASES[case])
    params = place(setup, make_rival_params(setup.config.sae.architecture))
    want, want_outcome = _differentiate(setup, params, make_rows())
    found, outcome = _differentiate(_in_parts(setup, rows), params, make_rows())
    check_gradients(found, {n: np.asarray(g) for n, g in want.items()}, rtol=1e-12)
    np.testing.assert_array_equal(outcome.fired_l, want_outcome.fired_l)
    assert outcome.metrics.keys() == want_outcome.metrics.keys()
    for name, value in want_outcome.metrics.items():
        np.testing.assert_allclose(
            outcome.metrics[name], value, rtol=1e-12, err_msg=name
        )


def test_counts_of_micro_batches_are_added_up():
    """Of rows that are chosen for again: all are, as their values are equal."""
    n = 2048  # latents: so many that the exact choice has buckets
    setup = _in_parts(make_setup((2, 1), n_latents=n, aux_coefficient=0.0), 4)
    params = make_params(n_latents=n) | {"w_enc_ld": np.zeros((n, D))}
    params["b_enc_l"] = np.ones(n)
    rows_bd, counters = np.float32(make_rows()), make_counters(random_dead(0, n))
    _, outcome = jax.jit(functools.partial(differentiate, setup))(
        place(setup, params, np.float32), (rows_bd, rows_bd), counters
    )
    assert outcome.metrics["n_resorted"] == B


def test_a_micro_batch_bounds_what_is_held():
    rows, latents = 4096, 2048

    def held(microbatch_rows):
        setup = make_setup((1, 1), n_latents=latents, k=32, aux_coefficient=0.0)
        data = dataclasses.replace(
            setup.config.data, batch_rows=rows, microbatch_rows=microbatch_rows
        )
        config = dataclasses.replace(setup.config, data=data, rows=100 * rows)
        setup = dataclasses.replace(setup, config=config)
        params = make_params(n_latents=latents)
        rows_bd = jnp.zeros((rows, D), jnp.float32)
        lowered = jax.jit(functools.partial(differentiate, setup)).lower(
            place(setup, params, np.float32),
            (rows_bd, rows_bd),
            make_counters(random_dead(0, latents)),
        )
        compiled = lowered.compile(QUICK_TO_COMPILE)
        return compiled.memory_analysis().temp_size_in_bytes

    assert held(256) < held(None) / 2


def _add_auxk(residual_bd, n_dead=12, dtype=np.float32, seed=3):
    """Gradients that AuxK is added to, these with it added, and AuxK."""
    setup = make_setup((2, 4))
    before = place(setup, make_params(seed), dtype)
    params = place(setup, make_params(), dtype)

    @functools.partial(jax.jit, compiler_options=QUICK_TO_COMPILE)
    def run(params, before, rows_bd, residual_bd, counters):
        sae = setup.sae(params)
        return auxk.add_gradients(sae, before, rows_bd, residual_bd, counters)

    place_rows = functools.partial(jax.device_put, device=batch_sharding(setup.mesh))
    rows_bd, residual_bd = (
        place_rows(np.asarray(a, dtype)) for a in (make_rows(), residual_bd)
    )
    counters = make_counters(random_dead(n_dead))
    return before, *run(params, before, rows_bd, residual_bd, counters)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_auxk_of_a_residual_of_any_size(scale):
    """Its value is the oracle's quotient."""
    residual_bd = scale * make_rows(7)
    _, _, aux_loss = _add_auxk(residual_bd)
    params, settings = make_params(), oracle_settings(make_setup((2, 4)))
    pre_bl = oracle.pre_activations(params, make_rows(), subtract_b_dec=True)
    z_bl = oracle.chosen_values(
        pre_bl, oracle.choose(pre_bl, settings.k_aux, random_dead(12))
    )
    want = oracle.aux_loss(residual_bd, z_bl @ params["w_dec_ld"], any_dead=True)
    assert float(aux_loss) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("kind", ["zero", "same rows", "rounding", "nan", "inf"])
def test_a_residual_that_auxk_cannot_be_in_relation_to_trains_nothing(kind):
    residual_bd = make_rows(7)
    residual_bd = {
        "zero": 0 * residual_bd,
        "same rows": np.ones((B, D)),
        "rounding": 1e-8 * residual_bd / LOSS_SCALE,
        "nan": np.where(np.arange(B)[:, None] == 3, np.nan, residual_bd),
        "inf": np.where(np.arange(B)[:, None] == 3, np.inf, residual_bd),
    }[kind]
    before, after, aux_loss = _add_auxk(residual_bd)
    assert aux_loss == 0
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
