"""The search over directions against all scores at once, on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax.config import MeshConfig
from sae_jax.directions import (
    Channels,
    RandomDirections,
    Rows,
    find_best,
    look_up,
)
from sae_jax.mesh import make_mesh

L, D, Q = 56, 12, 8
TILE = 3  # does not divide the 7, 14 or 56 directions of a shard
N_HELD = 2**20 // TILE


def _score(unit_td, queries_qd):
    scores_qt = jnp.matmul(queries_qd, unit_td.T, precision=lax.Precision.HIGHEST)
    return scores_qt, (jnp.round(10 * scores_qt),)


def _unit(rows):
    rows = np.asarray(rows, np.float64)
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def _rows(mesh, rows_ld):
    placed = jax.device_put(np.float32(rows_ld), NamedSharding(mesh, P("latent")))
    return Rows(placed)


def _queries(mesh):
    queries_qd = np.random.default_rng(1).normal(size=(Q, D)).astype(np.float32)
    return queries_qd, jax.device_put(queries_qd, NamedSharding(mesh, P("data")))


def _all(kind, mesh):
    """Directions of a kind, and the same in NumPy."""
    if kind == "rows":
        rows_ld = np.random.default_rng(0).normal(size=(L, D)) * 10.0 ** np.arange(D)
        return _rows(mesh, rows_ld), rows_ld
    if kind == "channels":
        return Channels(D), np.eye(D)
    directions = RandomDirections(jax.random.key(3), (L, D))
    return directions, directions.at(jnp.arange(L))


@pytest.mark.parametrize("kind", ["rows", "channels", "random"])
def test_the_best_of_all_is_found(mesh, kind):
    directions, rows_ld = _all(kind, mesh)
    queries_qd, placed_qd = _queries(mesh)
    best = find_best(directions, mesh, _score, N_HELD, placed_qd)
    scores_ql = queries_qd @ _unit(rows_ld).T
    np.testing.assert_array_equal(best.index_q, scores_ql.argmax(axis=1))
    np.testing.assert_allclose(best.score_q, scores_ql.max(axis=1), rtol=1e-5)
    np.testing.assert_allclose(best.extras[0], np.round(10 * best.score_q))
    found_qd = look_up(directions, mesh, best.index_q)
    np.testing.assert_allclose(found_qd, _unit(rows_ld)[best.index_q], atol=1e-6)


def test_the_first_of_equals_wins_and_no_nan_does(mesh):
    rows_ld = np.zeros((L, D))
    rows_ld[[5, 13, 40, 55], 2] = 7
    rows_ld[[0, 20, 54]] = np.nan
    queries_qd = np.zeros((Q, D), np.float32)
    queries_qd[:, 2] = 1
    placed_qd = jax.device_put(queries_qd, NamedSharding(mesh, P("data")))
    best = find_best(_rows(mesh, rows_ld), mesh, _score, N_HELD, placed_qd)
    assert best.index_q.tolist() == [5] * Q and best.score_q.tolist() == [1] * Q
    nothing = find_best(_rows(mesh, rows_ld * np.nan), mesh, _score, N_HELD, placed_qd)
    assert nothing.score_q.tolist() == [-np.inf] * Q


def test_random_directions_favour_none():
    mesh = make_mesh(MeshConfig(1, 1))
    directions = RandomDirections(jax.random.key(0), (20_000, 3))
    unit_ld = np.asarray(look_up(directions, mesh, jnp.arange(20_000)), np.float64)
    np.testing.assert_allclose(np.linalg.norm(unit_ld, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(unit_ld.mean(axis=0), 0, atol=0.02)
    np.testing.assert_allclose(unit_ld.T @ unit_ld / 20_000, np.eye(3) / 3, atol=0.02)
    assert len(np.unique(unit_ld, axis=0)) == 20_000


def test_no_array_of_all_scores_is_held():
    """Nor of all random directions."""
    mesh = make_mesh(MeshConfig(2, 4))
    directions = RandomDirections(jax.random.key(0), (2**22, 64))
    queries_qd = jax.ShapeDtypeStruct((Q, 64), jnp.float32)
    lowered = find_best.lower(directions, mesh, _score, Q, queries_qd)
    held = lowered.compile().memory_analysis().temp_size_in_bytes
    assert held < 2**26  # of 2^27 for a shard's scores, and 2^30 for its directions
