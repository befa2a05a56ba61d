"""The n-th largest value of a batch against sorting, on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives
from jax.sharding import PartitionSpec as P
from small_sae import MESHES

from sae_jax import topk
from sae_jax.config import MeshConfig
from sae_jax.mesh import DATA, LATENT, make_mesh

B, L = 16, 32
TINY = 1e-42  # float32 has no normal numbers so small

every_mesh = pytest.mark.parametrize("mesh_shape", MESHES)


def _values(kind: str) -> np.ndarray:
    """Values [B, L], none of them negative, exact in float32."""
    rng = np.random.default_rng(0)
    positive_bl = np.abs(rng.normal(size=(B, L)))
    values_bl = {
        "distinct": positive_bl,
        "ties": rng.integers(0, 4, size=(B, L)),
        "all equal": np.full((B, L), 0.3),
        "few positive": np.where(rng.random((B, L)) < 0.1, positive_bl, 0),
        "one shard has them": np.where(np.arange(L) < 3, 1 + positive_bl, 0),
        "far apart": 10.0 ** rng.uniform(-37, 37, size=(B, L)),
        "subnormal": TINY * rng.integers(0, 9, size=(B, L)),
        "negative zeros": np.where(rng.random((B, L)) < 0.2, positive_bl, -0.0),
        "infinite": np.where(rng.random((B, L)) < 0.1, np.inf, positive_bl),
    }[kind]
    return np.asarray(values_bl, np.float32)


KINDS = [
    "distinct",
    "ties",
    "all equal",
    "few positive",
    "one shard has them",
    "far apart",
    "subnormal",
    "negative zeros",
    "infinite",
]


@every_mesh
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 96, B * L])
def test_the_nth_largest_is_what_sorting_finds(mesh_shape, kind, n):
    _check(mesh_shape, _values(kind), n)


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4)])
@pytest.mark.parametrize("kind", ["distinct", "ties", "few positive", "far apart"])
def test_the_nth_largest_is_exact_in_float64(x64, mesh_shape, kind):
    values_bl = np.float64(_values(kind)) * (1 + 2**-40)  # no float32 has these bits
    _check(mesh_shape, values_bl, 96)


def _check(mesh_shape, values_bl, n: int) -> None:
    found = _nth_largest(mesh_shape, n)(values_bl)
    assert found.shape == () and found.dtype == values_bl.dtype
    want = np.sort(values_bl, axis=None)[::-1][n - 1]
    # As bits: comparing subnormal numbers may take them for 0.
    assert np.asarray(found).tobytes() == np.abs(want).tobytes()
    every = [np.asarray(shard.data).tobytes() for shard in found.addressable_shards]
    assert len(every) == mesh_shape[0] * mesh_shape[1] and len(set(every)) == 1


@every_mesh
def test_there_is_no_nth_largest_beyond_all_values(mesh_shape):
    assert _nth_largest(mesh_shape, B * L + 1)(_values("distinct")) == 0


def test_no_gradient_passes():
    g_bl = jax.grad(_nth_largest((2, 4), 96))(jnp.asarray(_values("distinct")))
    np.testing.assert_array_equal(g_bl, 0)


@every_mesh
def test_nothing_but_numbers_moves(mesh_shape):
    lowered = _nth_largest(mesh_shape, 96).lower(_values("distinct"))
    moved = collectives(lowered.compile())
    assert bool(moved) == (mesh_shape != (1, 1))
    assert {kind for kind, _ in moved} <= {"all-reduce"}
    # Two kinds of counts of three patterns, for every two bits.
    assert sum(size for _, size in moved) <= 6


@pytest.mark.parametrize("n", [2**30 + 1, 2**40])
def test_more_than_integers_can_count_are_refused(n):
    with pytest.raises(ValueError, match=rf"{n} is more than {2**30}: .*smaller"):
        _nth_largest((1, 1), n)(_values("distinct"))


@functools.cache
def _nth_largest(mesh_shape, n: int):
    return jax.jit(
        jax.shard_map(
            lambda values_bl: topk.nth_largest(values_bl, n, (DATA, LATENT)),
            mesh=make_mesh(MeshConfig(*mesh_shape)),
            in_specs=P(DATA, LATENT),
            out_specs=P(),
        )
    )
