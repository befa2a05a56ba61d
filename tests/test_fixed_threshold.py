"""One threshold instead of K: what it keeps, and that all else is the same SAE."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from rival_cases import make_params
from small_sae import B, K, L, make_rows, make_setup, place

from sae_jax.normalize import Normalization
from sae_jax.saes import JumpReluSae
from sae_jax.saes.fixed_threshold import fit_threshold, with_fixed_threshold

CASES = {
    "topk": {},
    "multi-topk": {"multi_topk": True},
    "norm-weighted": {"norm_weighted": True},
    "matryoshka without b_enc": {"prefixes": (8, L), "use_b_enc": False},
    "batch_topk": {"architecture": "batch_topk"},
}
OF_TOPK = list(CASES)[:-1]


def _make_sae(case: str, mesh_shape=(2, 4)):
    """Decoder rows have any length, so that it is seen where norms are weighed."""
    fields = CASES[case]
    params = make_params(
        fields.get("architecture", "topk"), use_b_enc=fields.get("use_b_enc", True)
    )
    setup = make_setup(mesh_shape, Normalization("layer_norm"), **fields)
    return setup.sae(place(setup, params, np.float32))


def _acts() -> jax.Array:
    return jnp.float32(5 + 3 * make_rows(n_rows=4 * B))


def _pre_bl(sae) -> np.ndarray:
    """Pre-activations of `_acts` in NumPy, of unit decoder rows if norm-weighted."""
    params = {name: np.float64(a) for name, a in sae.weights()[0].items()}
    normed_bd = oracle.normalize("layer_norm", _acts())[0]
    return oracle.pre_activations(params, normed_bd, sae.config.subtract_b_dec is None)


@pytest.mark.parametrize(
    ("case", "mesh_shape"), [("topk", (1, 1)), *((case, (2, 4)) for case in CASES)]
)
def test_the_rows_it_is_fit_on_have_the_mean_l0_asked_for(case, mesh_shape):
    """To the last latent, however `encode` rounds."""
    sae = _make_sae(case, mesh_shape)
    falling = -np.sort(-np.maximum(_pre_bl(sae), 0), axis=None)
    for l0 in (0.25, K):
        threshold, n_kept = fit_threshold(sae, _acts(), l0), round(4 * B * l0)
        assert falling[n_kept] * 0.99999 < threshold < falling[n_kept - 1] * 1.00001
        code_bl = with_fixed_threshold(sae, threshold).encode_dense(_acts())
        assert jnp.sum(code_bl > 0) == n_kept


@pytest.mark.parametrize(
    ("case", "mesh_shape"), [("topk", (1, 1)), *((case, (2, 4)) for case in OF_TOPK)]
)
def test_rows_keep_what_topk_chose_above_the_threshold(case, mesh_shape):
    """The whole code of TopK, cut at the threshold, where K latents or fewer are above.

    Where more are, TopK's code is the K largest of them.
    """
    sae = _make_sae(case, mesh_shape)
    threshold = fit_threshold(sae, _acts(), K)
    fixed_bl = np.asarray(with_fixed_threshold(sae, threshold).encode_dense(_acts()))
    topk_bl = np.asarray(sae.encode_dense(_acts()))
    above_bl = np.where(topk_bl > threshold, topk_bl, 0)
    n_above_b = (fixed_bl > 0).sum(axis=1)
    is_few_b = n_above_b <= K
    assert (n_above_b < K).any() and (n_above_b > K).any()
    np.testing.assert_allclose(fixed_bl[is_few_b], above_bl[is_few_b], rtol=1e-6)
    kth_b1 = -np.sort(-fixed_bl[~is_few_b], axis=1)[:, K - 1 : K]
    best_bl = np.where(fixed_bl[~is_few_b] >= kth_b1, fixed_bl[~is_few_b], 0)
    np.testing.assert_allclose(topk_bl[~is_few_b], best_bl, rtol=1e-6)
    np.testing.assert_allclose(
        fixed_bl, np.maximum(_pre_bl(sae), 0) * (fixed_bl > 0), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4)])
def test_batch_topk_at_its_own_threshold_is_itself(mesh_shape):
    """BatchTopK keeps what reaches its threshold, JumpReLU what is above: no ties."""
    sae = _make_sae("batch_topk", mesh_shape)
    fixed = with_fixed_threshold(sae, float(sae.threshold[...]))
    code_bl = np.asarray(fixed.encode_dense(_acts()))
    np.testing.assert_array_equal(code_bl, sae.encode_dense(_acts()))
    assert 0 < (code_bl > 0).mean() < 0.5


@pytest.mark.parametrize("case", ["norm-weighted", "batch_topk"])
def test_the_same_code_is_decoded_alike_and_the_sae_is_left_as_it_was(case):
    sae = _make_sae(case)
    before, config = jax.device_get(nnx.state(sae)), sae.config
    fixed = with_fixed_threshold(sae, 0.5)
    assert isinstance(fixed, JumpReluSae) and fixed.mesh == sae.mesh
    code = sae.encode(_acts())
    np.testing.assert_allclose(fixed.decode(code), sae.decode(code), atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(nnx.state(sae)), before)
    assert sae.config is config and fixed.config.architecture == "jumprelu"
    n_own = {shard.data.shape for shard in fixed.threshold_l[...].addressable_shards}
    assert n_own == {(L // 4,)}


def test_a_code_of_rows_is_cut_at_max_active_and_says_so():
    sae = _make_sae("topk")
    threshold = fit_threshold(sae, _acts(), K)
    code = with_fixed_threshold(sae, threshold, max_active=K).encode(_acts())
    assert code.values.shape == (4 * B, K)
    whole_bl = with_fixed_threshold(sae, threshold).encode_dense(_acts())
    n_above_b = np.sum(whole_bl > 0, axis=1)
    np.testing.assert_array_equal(code.n_cut[:, 0], np.maximum(n_above_b - K, 0))
    assert n_above_b.max() > K


@pytest.mark.parametrize("l0, shown", [(0, "0"), (-1.0, "-1.0"), (L + 1, str(L + 1))])
def test_a_mean_l0_that_cannot_be_is_refused(l0, shown):
    message = rf"l0 = {shown} on 64 rows: must be above 0 and at most n_latents = {L}"
    with pytest.raises(ValueError, match=message):
        fit_threshold(_make_sae("topk"), _acts(), l0)


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4)])
def test_an_l0_beyond_the_latents_above_0_is_refused_with_the_most(mesh_shape):
    sae = _make_sae("topk", mesh_shape)
    n_above = int((_pre_bl(sae) > 0).sum())
    with pytest.raises(ValueError, match=f"l0 = {L}: these 64 rows") as caught:
        fit_threshold(sae, _acts(), L)
    most = float(str(caught.value).rpartition(" ")[2])
    assert most <= n_above / (4 * B) < most + 1e-3
    threshold = fit_threshold(sae, _acts(), most)
    assert (_pre_bl(sae) > threshold).sum() == n_above


def test_a_threshold_below_zero_is_refused():
    with pytest.raises(ValueError, match="^threshold = -0.1: must be at least 0"):
        with_fixed_threshold(_make_sae("topk"), -0.1)


def test_rows_may_have_any_leading_axes():
    sae, acts = _make_sae("topk", (1, 1)), _acts()
    assert fit_threshold(sae, acts.reshape(2, -1, acts.shape[-1]), 3) == fit_threshold(
        sae, acts, 3
    )


def test_an_sae_that_chooses_no_k_is_refused():
    setup = make_setup((1, 1), architecture="relu")
    sae = setup.sae(place(setup, make_params("relu"), np.float32))
    with pytest.raises(ValueError, match="this SAE is relu"):
        fit_threshold(sae, _acts(), 3)
    with pytest.raises(ValueError, match="this SAE is relu"):
        with_fixed_threshold(sae, 0.1)
