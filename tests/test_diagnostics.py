"""Diagnostics against slow float64 NumPy, and on SAEs whose answers are planted."""

import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import planted
import pytest
from small_sae import B, D, K, L, make_params, make_rows, make_setup, place

from sae_jax import diagnostics
from sae_jax.config import MeshConfig
from sae_jax.mesh import LATENT, make_mesh
from sae_jax.normalize import Normalization

both_meshes = pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4)])


@pytest.fixture
def x64():
    with jax.enable_x64():
        yield


def _make_sae(mesh_shape, params, kind):
    setup = make_setup(mesh_shape, Normalization(kind))
    return setup.sae(place(setup, params))


def _few_active():
    """Parameters of which many rows have fewer than K active latents."""
    params = make_params()
    return params | {"b_enc_l": params["b_enc_l"] - 3}


def _crowded():
    """The same, with decoder rows of cosine 0.7 or so and lengths from 0.3 to 3."""
    params = _few_active()
    unit_ld = oracle.unit_norm_rows(params["w_dec_ld"] + 1.5 * np.eye(D)[0])
    return params | {"w_dec_ld": np.geomspace(0.3, 3, L)[:, None] * unit_ld}


def _perfect_sae(gain: float, mesh_shape=None):
    """Rebuilds a row exactly, `gain` times too large."""
    params = planted.perfect_params()
    params["w_enc_ld"] = gain * params["w_enc_ld"]
    return planted.make_sae(params, k=D, mesh_shape=mesh_shape)


# Shrinkage ----------------------------------------------------------------------------


def test_shrinkage_is_the_best_divisor():
    target_bd = make_rows()
    recon_bd = 0.6 * target_bd + 0.2 * make_rows(seed=2)
    gamma = float(diagnostics.shrinkage(jnp.asarray(recon_bd), jnp.asarray(target_bd)))

    def error(divisor):
        return ((recon_bd / divisor - target_bd) ** 2).sum()

    divisors = np.linspace(0.4, 1.6, 100_001)
    best = divisors[np.argmin([error(divisor) for divisor in divisors[::100]]) * 100]
    assert gamma == pytest.approx(best, abs=1.5e-3)
    assert error(gamma) < min(error(gamma * 1.001), error(gamma / 1.001))
    # The paper's other form.
    power, squares = (target_bd**2).sum(), (recon_bd**2).sum()
    want = 2 * squares / (squares + power - ((recon_bd - target_bd) ** 2).sum())
    assert gamma == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("gain", [0.5, 1.0, 2.0])
def test_shrinkage_of_a_planted_sae(gain):
    sae, acts_bd = _perfect_sae(gain), jnp.asarray(make_rows())
    recon_bd = sae.decode(sae.encode(acts_bd))
    assert float(diagnostics.shrinkage(recon_bd, acts_bd)) == pytest.approx(gain)


# Refinement ---------------------------------------------------------------------------


def _best_values(rows_kd, wanted_d):
    """The least squares solution >= 0, by trying every set of positive values."""
    best_k, least = np.zeros(len(rows_kd)), (wanted_d**2).sum()
    for is_free in itertools.product([False, True], repeat=len(rows_kd)):
        free = np.flatnonzero(is_free)
        if not len(free):
            continue
        solution = np.linalg.lstsq(rows_kd[free].T, wanted_d, rcond=None)[0]
        error = ((solution @ rows_kd[free] - wanted_d) ** 2).sum()
        if (solution >= 0).all() and error < least:
            best_k, least = np.zeros(len(rows_kd)), error
            best_k[free] = solution
    return best_k


def _refine_slowly(params, acts_bd, kind):
    """Dense refined codes [B, L], and which latents were active before."""
    normed_bd, _, _ = oracle.normalize(kind, acts_bd)
    values_bk, indices_bk = oracle.encode(params, normed_bd, K)
    refined_bl = np.zeros((len(acts_bd), L))
    active_bl = np.zeros((len(acts_bd), L), bool)
    for row, (values_k, indices_k) in enumerate(zip(values_bk, indices_bk)):
        support = indices_k[values_k > 0]
        wanted_d = normed_bd[row] - params["b_dec_d"]
        refined_bl[row, support] = _best_values(params["w_dec_ld"][support], wanted_d)
        active_bl[row, support] = True
    return refined_bl, active_bl


@both_meshes
@pytest.mark.parametrize("make", [_few_active, _crowded])
def test_refined_values_are_the_least_squares(x64, mesh_shape, make):
    params, acts_bd = make(), 5 + 3 * make_rows()
    acts_bd[0] = 5  # no variation: a row of zeros after normalising
    want_bl, active_bl = _refine_slowly(params, acts_bd, "layer_norm")
    assert (active_bl & (want_bl == 0)).any() and (active_bl.sum(1) < K).any()
    sae = _make_sae(mesh_shape, params, "layer_norm")
    code = sae.encode(jnp.asarray(acts_bd.reshape(2, B // 2, D)))
    refined = diagnostics.refine(sae, jnp.asarray(acts_bd.reshape(2, B // 2, D)))
    assert refined.values.shape == refined.indices.shape == (2, B // 2, K)
    np.testing.assert_allclose(
        refined.to_dense(L).reshape(B, L), want_bl, rtol=1e-6, atol=1e-9
    )
    assert (np.asarray(refined.to_dense(L)).reshape(B, L)[~active_bl] == 0).all()
    values, indices = np.asarray(refined.values), np.asarray(refined.indices)
    assert (np.diff(values) <= 0).all() and (values >= 0).all()
    assert (np.sort(indices) == np.sort(code.indices)).all()
    assert (indices != np.asarray(code.indices)).any(), "the order never changed"
    np.testing.assert_array_equal(refined.shift, code.shift)
    np.testing.assert_array_equal(refined.scale, code.scale)


@pytest.mark.parametrize("n_steps", [1, 3, 30])
def test_refining_lowers_the_error_from_the_first_step(n_steps):
    sae, acts_bd = _make_sae((1, 1), make_params(), "none"), jnp.asarray(make_rows())
    codes = [sae.encode(acts_bd), diagnostics.refine(sae, acts_bd, n_steps)]
    before, after = (np.square(sae.decode(c) - acts_bd).sum(1) for c in codes)
    assert (after <= before * (1 + 1e-6)).all() and after.sum() < 0.95 * before.sum()


@both_meshes
def test_refining_restores_shrunken_values(mesh_shape):
    acts_bd = jnp.asarray(make_rows())
    refined = diagnostics.refine(_perfect_sae(0.5, mesh_shape), acts_bd)
    want = _perfect_sae(1.0).encode(acts_bd)
    np.testing.assert_allclose(refined.to_dense(L), want.to_dense(L), rtol=1e-5)
    recon_bd = _perfect_sae(0.5, mesh_shape).decode(refined)
    assert float(diagnostics.shrinkage(recon_bd, acts_bd)) == pytest.approx(1)


def test_refining_leaves_the_best_values_alone():
    sae, acts_bd = _perfect_sae(1.0), jnp.asarray(make_rows())
    code, refined = sae.encode(acts_bd), diagnostics.refine(sae, acts_bd)
    np.testing.assert_allclose(refined.values, code.values, rtol=1e-6)
    used = np.asarray(code.values) > 0
    np.testing.assert_array_equal(refined.indices[used], code.indices[used])


# Prefixes and firing ------------------------------------------------------------------


@both_meshes
@pytest.mark.parametrize("kind", ["none", "layer_norm"])
def test_progressive_nmse_is_that_of_numpy(mesh_shape, kind):
    params, acts_bd, kept = make_params(), 5 + 3 * make_rows(), (0, 1, 3, K, K + 9)
    normed_bd, _, _ = oracle.normalize(kind, acts_bd)
    values_bk, indices_bk = oracle.encode(params, normed_bd, K)
    want = []
    for n_kept in kept:
        prefix_bk = np.array([[*v[:n_kept], *[0.0] * K][:K] for v in values_bk])
        error_bd = oracle.decode(params, prefix_bk, indices_bk) - normed_bd
        want.append((error_bd**2).sum() / ((normed_bd - normed_bd.mean(0)) ** 2).sum())
    sae = _make_sae(mesh_shape, params, kind)
    acts = jnp.asarray(acts_bd.reshape(2, B // 2, D))
    got = diagnostics.progressive_nmse(sae, acts, kept)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert len(np.unique(want)) == len(kept) - 1


def test_progressive_nmse_falls_as_known():
    """With the identity as decoder, what is left is the weaker coordinates."""
    acts_bd = make_rows()
    acts_bd -= acts_bd.mean(0)
    left_bd = np.sort(acts_bd**2, axis=1)
    want = [left_bd[:, : D - kept].sum() / left_bd.sum() for kept in range(D + 1)]
    got = diagnostics.progressive_nmse(
        _perfect_sae(1.0), jnp.asarray(acts_bd), range(D + 1)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-10)


@both_meshes
def test_firing_is_counted_where_values_are_above_zero(mesh_shape):
    params = planted.random_params()
    code_bl, _ = planted.encode(params, make_rows(n_rows=30), planted.K)
    sae = planted.make_sae(params, mesh_shape=mesh_shape)
    code = sae.encode(jnp.asarray(make_rows(n_rows=30).reshape(3, 10, D)))
    l0 = diagnostics.l0_per_row(code)
    np.testing.assert_array_equal(l0, (code_bl > 0).sum(1).reshape(3, 10))
    frequency_l = diagnostics.firing_frequency(code, planted.L)
    np.testing.assert_allclose(frequency_l, (code_bl > 0).mean(0), rtol=1e-6)
    assert 0 == frequency_l[0] == frequency_l[7] < frequency_l.max()


def test_dense_latents_fire_at_least_so_often():
    """Latents 4, 1, 2, 0 fire on 3, 9, 3, 2 of 30 rows; 3 fills unused slots."""
    latents = np.repeat([4, 1, 2, 0, 3], [3, 9, 3, 2, 13])[:, None]
    values = (latents != 3).astype(np.float32)
    code = dataclasses.replace(
        _perfect_sae(1.0).encode(jnp.asarray(make_rows(n_rows=30))),
        values=jnp.asarray(values),
        indices=jnp.asarray(latents),
    )
    frequency_l = diagnostics.firing_frequency(code, 5)
    assert diagnostics.dense_latents(frequency_l).tolist() == [1, 2, 4]
    assert diagnostics.dense_latents(frequency_l, 0.2).tolist() == [1]
    assert diagnostics.dense_latents(frequency_l, 0.31).tolist() == []
    equal_l = np.nextafter(np.full(100, 0.1, np.float32), np.float32(0))
    assert diagnostics.dense_latents(equal_l).tolist() == list(range(100))


# Neighbours ---------------------------------------------------------------------------

MANY = 600  # two whole tiles and a part


def _place_decoder(w_dec_ld, mesh_shape):
    mesh = make_mesh(MeshConfig(*mesh_shape))
    sharding = jax.NamedSharding(mesh, jax.P(LATENT, None))
    return jax.device_put(jnp.asarray(w_dec_ld), sharding)


@both_meshes
def test_neighbours_are_those_of_numpy(x64, mesh_shape):
    rng = np.random.default_rng(0)
    w_dec_ld = rng.uniform(0.1, 9, size=(MANY, 1)) * rng.normal(size=(MANY, D))
    unit_ld = oracle.unit_norm_rows(w_dec_ld)
    cosines_ll = unit_ld @ unit_ld.T
    np.fill_diagonal(cosines_ll, -2)
    want_ln = np.argsort(-cosines_ll, axis=1)[:, :3]
    placed_ld = _place_decoder(w_dec_ld, mesh_shape)
    cosines_ln, indices_ln = diagnostics.decoder_neighbours(placed_ld, 3)
    np.testing.assert_array_equal(indices_ln, want_ln)
    want_cosines = np.take_along_axis(cosines_ll, want_ln, axis=1)
    np.testing.assert_allclose(cosines_ln, want_cosines, rtol=1e-10, atol=1e-12)


@both_meshes
def test_a_rotated_pair_are_neighbours(mesh_shape):
    w_dec_ld = np.eye(D, dtype=np.float32)
    w_dec_ld[7] = 5 * (math.cos(0.3) * w_dec_ld[2] + math.sin(0.3) * w_dec_ld[7])
    w_dec_ld[4] = -w_dec_ld[0]  # opposite, and so the farthest
    w_dec_ld[9] = 0
    placed_ld = _place_decoder(w_dec_ld, mesh_shape)
    cosines_ln, indices_ln = diagnostics.decoder_neighbours(placed_ld)
    assert indices_ln.shape == cosines_ln.shape == (D, 1)
    assert (indices_ln[2, 0], indices_ln[7, 0]) == (7, 2)
    want = np.zeros(D)
    want[[2, 7]] = math.cos(0.3)
    np.testing.assert_allclose(cosines_ln[:, 0], want, atol=1e-6)
    assert (indices_ln[:, 0] != np.arange(D)).all() and indices_ln[0, 0] != 4


def test_no_device_holds_more_than_its_part_of_a_tile():
    placed_ld = _place_decoder(np.ones((MANY, D), np.float32), (2, 4))
    compiled = diagnostics.decoder_neighbours.lower(placed_ld, 3).compile().as_text()
    shapes = {
        tuple(map(int, sizes.split(",")))
        for sizes in re.findall(r"f32\[([\d,]+)\]", compiled)
    }
    assert (MANY // 4, D) in shapes and (MANY, D) not in shapes
    assert max(math.prod(shape) for shape in shapes) <= 256 * MANY // 4


@pytest.mark.parametrize("n", [0, 3])
def test_neighbours_that_are_not_there_are_refused(n):
    with pytest.raises(ValueError, match=f"n = {n} neighbours of each of 3 latents.*2"):
        diagnostics.decoder_neighbours(jnp.eye(3), n)
