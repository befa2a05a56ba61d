"""Losses and gradients of every architecture but plain TopK against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_rivals as rivals
import pytest
from compare import check_gradients, check_loss, differentiate, want_gradients
from rival_cases import make_params
from small_sae import (
    L,
    MESHES,
    make_counters,
    make_rows,
    make_setup,
    oracle_settings,
    place,
    random_dead,
)

from sae_jax.normalize import Normalization

PREFIXES = (4, 12, L)  # on mesh (1, 8) one shard ends with the first
CASES = {
    "relu": {"architecture": "relu"},
    "relu_decoder_norm": {"architecture": "relu_decoder_norm"},
    "prolu": {"architecture": "prolu"},
    "gated": {"architecture": "gated"},
    "jumprelu": {"architecture": "jumprelu", "bandwidth": 0.4},
    "target_l0": {"architecture": "jumprelu", "bandwidth": 0.4, "target_l0": 9.0},
    "batch_topk": {"architecture": "batch_topk"},
    "batch matryoshka": {"architecture": "batch_topk", "prefixes": PREFIXES},
    "matryoshka": {"prefixes": PREFIXES},
    "multi-topk": {"multi_topk": True},
    "norm-weighted": {"norm_weighted": True},
}
PENALISED = list(CASES)[:6]
CHOOSE_K = list(CASES)[6:]

# Fields that are not at their default; firing_threshold is not either.
VARIANTS = {
    "relu": {"subtract_b_dec": False, "use_b_enc": False},
    "relu_decoder_norm": {"subtract_b_dec": True, "use_b_enc": False},
    "prolu": {"subtract_b_dec": False},
    "gated": {"subtract_b_dec": False},
    "jumprelu": {"subtract_b_dec": False, "use_b_enc": False},
    "batch_topk": {"subtract_b_dec": False, "use_b_enc": False},
    "matryoshka": {"subtract_b_dec": False, "norm_weighted": True},
    "multi-topk": {"use_b_enc": False, "norm_weighted": True},
}

BIASES = {"b_enc_l"}
WEIGHTS = {"w_enc_ld", "w_dec_ld", "b_dec_d"}
MAGNITUDES = {"b_mag_l", "r_mag_l"}
# (case, metric): parameters to which the metric's gradient is exactly 0.
UNTOUCHED = {
    ("relu", "sparsity_loss"): {"w_dec_ld"},
    ("relu_decoder_norm", "sparsity_loss"): {"b_dec_d"},
    ("prolu", "sparsity_loss"): {"w_dec_ld"},
    ("gated", "nmse"): {"b_gate_l"},
    ("gated", "sparsity_loss"): {"w_dec_ld"} | MAGNITUDES,
    ("gated", "aux_loss"): {"w_dec_ld", "b_dec_d"} | MAGNITUDES,
    ("jumprelu", "nmse"): set(),
    ("jumprelu", "sparsity_loss"): WEIGHTS | BIASES,
    ("target_l0", "sparsity_loss"): WEIGHTS | BIASES,
}


def _setup(case, mesh_shape=(2, 4), **changes):
    return make_setup(mesh_shape, **(CASES[case] | changes))


def _params(case, **changes):
    return make_params(CASES[case].get("architecture", "topk"), **changes)


@pytest.mark.parametrize("mesh_shape", MESHES)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_the_oracles(x64, case, mesh_shape):
    setup = _setup(case, mesh_shape)
    check_loss(setup, _params(case), make_rows(), random_dead(12))


@pytest.mark.parametrize("case", VARIANTS)
def test_loss_and_gradients_of_variants_are_the_oracles(x64, case):
    setup = _setup(case, firing_threshold=4.5, **VARIANTS[case])
    params = _params(case, use_b_enc=setup.config.sae.use_b_enc)
    check_loss(setup, params, make_rows(), random_dead(12))
    above = rivals.terms(
        setup.config.sae.architecture,
        params,
        make_rows(),
        random_dead(12),
        oracle_settings(setup),
    )
    assert 0 < above.metrics["l0"] < (above.f_bl > 0).sum(axis=1).mean()


@pytest.mark.parametrize("steps", [0, 6, 7, 100])
@pytest.mark.parametrize("case", ["relu", "target_l0", "gated"])
def test_the_penalty_is_warmed_up(x64, case, steps):
    inputs = _setup(case), _params(case), make_rows(), random_dead(12)
    check_loss(*inputs, steps=steps, warmup_steps=8)
    found, whole = (
        float(differentiate(*inputs, **warm_up)[1]["metrics"]["sparsity_loss"])
        for warm_up in ({"steps": steps, "warmup_steps": 8}, {"steps": steps})
    )
    share = {0: 1 / 8, 6: 7 / 8}.get(steps, 1)
    assert found == pytest.approx(share * whole, rel=1e-12)


@pytest.mark.parametrize("case", ["gated", "target_l0", "batch_topk"])
def test_loss_and_gradients_in_float32(case):
    params = {name: np.float64(np.float32(a)) for name, a in _params(case).items()}
    rows_bd = np.float64(np.float32(make_rows()))
    check_loss(_setup(case), params, rows_bd, random_dead(12), np.float32, rtol=2e-5)


@pytest.mark.parametrize("case", ["relu", "batch_topk"])
def test_the_loss_of_rows_is_measured_in_the_normalised_space(x64, case):
    normalization = Normalization("scale_to_sqrt_d", 2.5)
    setup = make_setup((2, 4), normalization, **CASES[case])
    inputs = _params(case), random_dead(12)
    found, _, _ = differentiate(setup, inputs[0], 2.5 * make_rows(), inputs[1])
    want, _, _ = differentiate(_setup(case), inputs[0], make_rows(), inputs[1])
    assert float(found) == pytest.approx(float(want), rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_what_is_rebuilt_may_be_other_rows_than_what_is_encoded(x64, case):
    setup, params, dead_l = _setup(case), _params(case), random_dead(12)
    sae, targets_bd = setup.sae(place(setup, params)), make_rows(seed=7)
    batch = jnp.asarray(make_rows()), jnp.asarray(targets_bd)
    _, aux = jax.jit(lambda *a: sae.loss(*a))(batch, make_counters(dead_l))
    architecture, settings = setup.config.sae.architecture, oracle_settings(setup)
    out = rivals.terms(architecture, params, make_rows(), dead_l, settings)
    want = oracle.main_loss(out.x_hat_bd, targets_bd, settings.loss_scale)
    assert float(aux["metrics"]["nmse"]) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize(("case", "of"), UNTOUCHED)
def test_a_term_touches_these_parameters_and_no_others(x64, case, of):
    inputs = _setup(case), _params(case), make_rows(), random_dead(12)
    *_, gradients = differentiate(*inputs, of=of)
    check_gradients(gradients, want_gradients(*inputs, of))
    zeros = {name for name, value in gradients.items() if not np.any(value)}
    assert zeros == UNTOUCHED[case, of]


def test_multi_topk_trains_encoder_rows_that_are_never_among_the_k_best(x64):
    setup, params, rows_bd = _setup("multi-topk"), _params("multi-topk"), make_rows()
    params["b_enc_l"][:8] -= 4
    inputs = setup, params, rows_bd, random_dead(0)
    _, aux, gradients = differentiate(*inputs)
    is_beyond_l = ~np.asarray(aux["fired_l"])
    assert is_beyond_l.sum() > 2
    for name in ("w_enc_ld", "b_enc_l", "w_dec_ld"):
        assert np.abs(np.asarray(gradients[name])[is_beyond_l]).max() > 1e-4
    check_gradients(gradients, want_gradients(*inputs, "loss"))


@pytest.mark.parametrize("case", CHOOSE_K)
def test_auxk_trains_dead_latents_alone(x64, case):
    inputs = _setup(case), _params(case), make_rows(), random_dead(12)
    *_, gradients = differentiate(*inputs, of="aux_loss")
    for name in ("w_enc_ld", "w_dec_ld", "b_enc_l"):
        of_live = np.asarray(gradients[name])[~random_dead(12)]
        np.testing.assert_array_equal(of_live, 0, err_msg=name)
        assert np.abs(gradients[name]).max() > 1e-4
    check_gradients(gradients, want_gradients(*inputs, "aux_loss"))


@pytest.mark.parametrize("case", CHOOSE_K)
def test_auxk_is_exactly_nothing_when_no_latent_is_dead(x64, case):
    inputs = _setup(case), _params(case), make_rows(), random_dead(0)
    _, aux, gradients = differentiate(*inputs, of="aux_loss")
    assert aux["metrics"]["aux_loss"] == 0
    for name, value in gradients.items():
        np.testing.assert_array_equal(value, 0, err_msg=name)


@pytest.mark.parametrize("case", PENALISED)
def test_dead_latents_change_nothing_of_a_penalised_loss(x64, case):
    inputs = _setup(case), _params(case), make_rows()
    loss, aux, _ = differentiate(*inputs, random_dead(L))
    assert aux["metrics"]["n_dead"] == L and aux["assigned"] == {}
    assert loss == differentiate(*inputs, random_dead(0))[0]


def test_every_architecture_has_a_case():
    assert {sae.get("architecture", "topk") for sae in CASES.values()} == set(
        rivals.ARCHITECTURES
    )
