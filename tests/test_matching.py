"""Nearest and assigned directions against brute force, and planted dictionaries."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax import matching
from sae_jax.config import MeshConfig
from sae_jax.directions import RandomDirections, Rows
from sae_jax.mesh import make_mesh

L, D = 16, 24
ONE = MeshConfig(1, 1)


@pytest.fixture(params=[(1, 1), (2, 4)], ids=str)
def mesh(request):
    return make_mesh(MeshConfig(*request.param))


def _place(mesh, rows_ld):
    return jax.device_put(np.float32(rows_ld), NamedSharding(mesh, P("latent")))


def _random_rows(seed, n=L):
    return np.random.default_rng(seed).normal(size=(n, D))


def _cosines(a_nd, b_nd):
    a_nd, b_nd = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a_nd, b_nd))
    return a_nd @ b_nd.T


def test_nearest_of_any_number_of_rows(mesh, monkeypatch):
    monkeypatch.setattr(matching, "_BLOCK", 5)
    rows_nd, others_ld = _random_rows(0, 13) * 100, _random_rows(1)
    cosine_n, number_n = matching.find_nearest(
        rows_nd, Rows(_place(mesh, others_ld)), mesh
    )
    cosines_nl = _cosines(rows_nd, others_ld)
    np.testing.assert_array_equal(number_n, cosines_nl.argmax(axis=1))
    np.testing.assert_allclose(cosine_n, cosines_nl.max(axis=1), rtol=1e-5)


def test_the_assignment_is_the_best_of_all(mesh, monkeypatch):
    monkeypatch.setattr(matching, "_BLOCK", 7)  # which does not divide 8
    rows_nd, others_ld = _random_rows(2, 4), _random_rows(3, 8)
    rows_nd[1] = rows_nd[0] + 0.1 * rows_nd[1]  # both are nearest to the same
    cosine_n, number_n = matching.assign(rows_nd, Rows(_place(mesh, others_ld)), mesh)
    cosines_nl = _cosines(rows_nd, others_ld)
    assert len(set(cosines_nl.argmax(axis=1))) < 4 == len(set(number_n.tolist()))
    best = max(
        cosines_nl[np.arange(4), list(partners)].sum()
        for partners in itertools.permutations(range(8), 4)
    )
    assert cosine_n.sum() == pytest.approx(best, rel=1e-5)
    np.testing.assert_allclose(cosine_n, cosines_nl[np.arange(4), number_n], rtol=1e-5)


def test_a_permuted_copy_is_matched_exactly(mesh):
    rows_ld = _random_rows(4)
    order_l = np.random.default_rng(5).permutation(L)
    scale_l1 = np.random.default_rng(6).uniform(0.1, 9, size=(L, 1))
    copy = Rows(_place(mesh, (scale_l1 * rows_ld)[order_l]))
    match = matching.match(_place(mesh, rows_ld), copy, mesh)
    np.testing.assert_array_equal(order_l[match.assigned_to_n], np.arange(L))
    np.testing.assert_array_equal(match.nearest_to_n, match.assigned_to_n)
    for cosine_n in (match.nearest_n, match.assigned_n):
        np.testing.assert_allclose(cosine_n, 1, rtol=1e-5)


def test_a_rotation_lowers_cosines_to_its_own(mesh):
    """Each of 8 orthogonal rows is turned by 0.4 towards a direction of its own."""
    rows_ld, others_ld = np.eye(D)[:8], np.eye(D)[8:16]
    turned_ld = np.cos(0.4) * rows_ld + np.sin(0.4) * others_ld
    match = matching.match(_place(mesh, rows_ld), Rows(_place(mesh, turned_ld)), mesh)
    np.testing.assert_array_equal(match.assigned_to_n, np.arange(8))
    np.testing.assert_allclose(match.assigned_n, np.cos(0.4), rtol=1e-6)
    np.testing.assert_allclose(match.nearest_n, np.cos(0.4), rtol=1e-6)


def test_latents_are_drawn_and_matched_with_all_others():
    mesh = make_mesh(ONE)
    rows_ld = _random_rows(7)
    others = Rows(_place(mesh, rows_ld[::-1]))
    w_dec_ld = _place(mesh, rows_ld)
    match = matching.match(w_dec_ld, others, mesh, seed=1, n_most=5)
    assert len(match.latents_n) == 5
    np.testing.assert_array_equal(match.assigned_to_n, L - 1 - match.latents_n)
    again = matching.match(w_dec_ld, others, mesh, seed=1, n_most=5)
    other = matching.match(w_dec_ld, others, mesh, seed=2, n_most=5)
    np.testing.assert_array_equal(again.latents_n, match.latents_n)
    assert other.latents_n.tolist() != match.latents_n.tolist()


def test_what_is_not_paired(monkeypatch):
    mesh = make_mesh(ONE)
    w_dec_ld, few = _place(mesh, _random_rows(8)), _random_rows(9, 8)
    match = matching.match(w_dec_ld, Rows(_place(mesh, few)), mesh)
    assert match.assigned_n is None and len(match.nearest_n) == L
    with pytest.raises(ValueError, match="16 directions cannot be paired with 8"):
        matching.assign(_random_rows(8), Rows(_place(mesh, few)), mesh)
    monkeypatch.setattr(matching, "MAX_COSINES", L * L - 1)
    random = RandomDirections(jax.random.key(0), (L, D))
    match = matching.match(w_dec_ld, random, mesh)
    assert match.assigned_n is None and match.nearest_n.max() < 1
    broken = Rows(_place(mesh, np.full((L, D), np.nan)))
    with pytest.raises(ValueError, match="not finite"):
        matching.assign(few, broken, mesh)
