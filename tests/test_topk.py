"""Choosing K latents, on one device and over latent shards, against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec as P

from sae_jax import topk
from sae_jax.config import MeshConfig
from sae_jax.mesh import DATA, LATENT, make_mesh

B, L = 16, 32
MESHES = [(1, 1), (1, 8), (2, 4), (8, 1)]
KS = [1, 4, 6, L]  # 6 is more than the four latents of a shard on mesh (1, 8)


def _pre(kind: str) -> np.ndarray:
    """Pre-activations [B, L]: distinct, tied many times over, or all equal."""
    rng = np.random.default_rng(0)
    pre_bl = {
        "distinct": rng.normal(size=(B, L)),
        "ties": rng.integers(-2, 3, size=(B, L)),
        "all equal": np.ones((B, L)),
        "one shard wins": rng.normal(size=(B, L)) + 9 * (np.arange(L) // 4 == 5),
        "few finite": np.where(np.arange(L) % 11 == 3, 1.0, -np.inf) * np.ones((B, 1)),
    }[kind]
    return pre_bl.astype(np.float32)


KINDS = ["distinct", "ties", "all equal", "one shard wins", "few finite"]


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("kind", KINDS)
def test_choose_takes_the_oracles_latents_in_its_order(kind, k):
    pre_bl = _pre(kind)
    values_bk, indices_bk = topk.choose(jnp.asarray(pre_bl), k)
    want_bk = np.array(oracle.choose(pre_bl, k))
    np.testing.assert_array_equal(indices_bk, want_bk)
    np.testing.assert_array_equal(values_bk, np.take_along_axis(pre_bl, want_bk, 1))
    assert indices_bk.dtype == jnp.int32


def test_choose_takes_no_more_than_there_are():
    values_bk, indices_bk = topk.choose(jnp.asarray(_pre("ties")[:, :3]), 5)
    assert values_bk.shape == indices_bk.shape == (B, 3)


@pytest.mark.parametrize("mesh_shape", MESHES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", KS)
def test_the_choice_over_latent_shards_is_the_oracles(mesh_shape, kind, k):
    """`rank_global` finds exactly the winners; `merge_codes` lists them in order."""
    mesh = make_mesh(MeshConfig(*mesh_shape))
    kept_bl, values_bk, indices_bk = _choose_over_shards(k, mesh)(_pre(kind))
    want_bk = np.array(oracle.choose(_pre(kind), k))
    want_bl = np.zeros((B, L), bool)
    np.put_along_axis(want_bl, want_bk, True, axis=1)
    np.testing.assert_array_equal(kept_bl, want_bl)
    np.testing.assert_array_equal(indices_bk, want_bk)
    want_values_bk = np.take_along_axis(_pre(kind), want_bk, 1)
    np.testing.assert_array_equal(values_bk, want_values_bk)


@functools.cache
def _choose_over_shards(k: int, mesh: jax.sharding.Mesh):
    n_own = L // mesh.shape[LATENT]

    def on_shard(pre_bl):
        values_bk, indices_bk = topk.choose(pre_bl, k)
        keep_bk = topk.rank_global(values_bk, k, LATENT) < k
        rows_b1 = jnp.arange(len(pre_bl))[:, None]
        kept_bl = jnp.zeros(pre_bl.shape, bool).at[rows_b1, indices_bk].set(keep_bk)
        return kept_bl, *topk.merge_codes(values_bk, indices_bk, k, n_own, LATENT)

    return jax.jit(
        jax.shard_map(
            on_shard,
            mesh=mesh,
            in_specs=P(DATA, LATENT),
            out_specs=(P(DATA, LATENT), P(DATA), P(DATA)),
            check_vma=False,
        )
    )
