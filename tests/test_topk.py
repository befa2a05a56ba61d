"""Choosing K latents, on one device and over latent shards, against the oracle."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from collectives import collectives
from jax.sharding import PartitionSpec as P

from sae_jax import topk
from sae_jax.config import MeshConfig
from sae_jax.config.sae import EXCHANGES
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
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_choice_over_latent_shards_is_the_oracles(mesh_shape, kind, k, exchange):
    """`are_best` finds exactly the winners."""
    mesh, pre_bl = make_mesh(MeshConfig(*mesh_shape)), np.maximum(_pre(kind), 0)
    ks = (k, 1) if k == L else (k,)
    for one_k, kept_bl in zip(ks, _find_winners(ks, mesh, exchange)(pre_bl)):
        want_bl = np.zeros((B, L), bool)
        np.put_along_axis(want_bl, np.array(oracle.choose(pre_bl, one_k)), True, axis=1)
        np.testing.assert_array_equal(kept_bl, want_bl)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_value_that_is_not_a_number_is_among_the_best(exchange):
    """With the sign that the encoder gives it, so that the loss shows it."""
    pre_bl = np.abs(_pre("distinct"))
    pre_bl[3, 5] = np.nan
    mesh = make_mesh(MeshConfig(1, 8))
    (kept_bl,) = _find_winners((4,), mesh, exchange)(pre_bl)
    assert kept_bl[3, 5]
    np.testing.assert_array_equal(kept_bl.sum(1), 4)


@pytest.mark.parametrize(
    ("exchange", "moved"),
    [
        ("gather", {"all-gather": B * 8 * 4}),
        ("tree", {"collective-permute": 3 * B * 4, "all-gather": 8 * B, "sum": B}),
        ("count", {"all-gather": 8 * B, "sum": 3 * B + B}),
    ],
)
def test_what_an_exchange_moves(exchange, moved):
    """`count` sums in a loop, which is written once."""
    mesh = make_mesh(MeshConfig(1, 8))
    compiled = _find_winners((4,), mesh, exchange).lower(_pre("distinct")).compile()
    found = collections.Counter()
    for kind, size in collectives(compiled):
        found[kind.replace("all-reduce", "sum")] += size
    assert found == moved


@pytest.mark.parametrize("mesh_shape", MESHES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", KS)
def test_merged_codes_list_the_oracles_latents_in_order(mesh_shape, kind, k):
    mesh = make_mesh(MeshConfig(*mesh_shape))
    values_bk, indices_bk = _merge(k, mesh)(_pre(kind))
    want_bk = np.array(oracle.choose(_pre(kind), k))
    np.testing.assert_array_equal(indices_bk, want_bk)
    want_values_bk = np.take_along_axis(_pre(kind), want_bk, 1)
    np.testing.assert_array_equal(values_bk, want_values_bk)


@functools.cache
def _find_winners(ks: tuple[int, ...], mesh: jax.sharding.Mesh, exchange: str):
    """Which latents are kept, bool [B, L] for each K."""

    def on_shard(pre_bl):
        values_bk, indices_bk = topk.choose(pre_bl, max(ks))
        rows_b1 = jnp.arange(len(pre_bl))[:, None]
        nothing_bl = jnp.full_like(pre_bl, 0, dtype=bool)
        return [
            nothing_bl.at[rows_b1, indices_bk].set(keep_bk)
            for keep_bk in topk.are_best(values_bk, ks, LATENT, exchange)
        ]

    spec = P(DATA, LATENT)
    return jax.jit(
        jax.shard_map(on_shard, mesh=mesh, in_specs=spec, out_specs=[spec] * len(ks))
    )


@functools.cache
def _merge(k: int, mesh: jax.sharding.Mesh):
    n_own = L // mesh.shape[LATENT]

    def on_shard(pre_bl):
        return topk.merge_codes(*topk.choose(pre_bl, k), k, n_own, LATENT)

    return jax.jit(
        jax.shard_map(
            on_shard,
            mesh=mesh,
            in_specs=P(DATA, LATENT),
            out_specs=(P(DATA), P(DATA)),
            check_vma=False,
        )
    )
