"""Attention in blocks of queries: against NumPy in float64, in values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sae_jax.mesh import DATA, LATENT
from sae_jax.subjects.layers import MAX_QUERIES, attend

# One block, two whole ones, and three of which the last is filled up.
LENGTHS = [MAX_QUERIES, 2 * MAX_QUERIES, 2 * MAX_QUERIES + 3]


def _draw(t: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two rows of queries of four heads, and of keys and values of two."""
    rng = np.random.default_rng(t)
    return tuple(rng.normal(size=(2, heads, t, 8)) for heads in (4, 2, 2))


def _attend_numpy(query_bhte, key_bgse, value_bgse, window=None):
    """The mixed values, and the patterns that mix them."""
    t = query_bhte.shape[2]
    key_bhse, value_bhse = (x.repeat(2, axis=1) for x in (key_bgse, value_bgse))
    before_ts = np.arange(t)[:, None] - np.arange(t)
    is_seen_ts = (before_ts >= 0) & (before_ts < (window or t))
    scores_bhts = np.where(is_seen_ts, query_bhte @ key_bhse.mT, -np.inf)
    shares_bhts = np.exp(scores_bhts - scores_bhts.max(-1, keepdims=True))
    shares_bhts /= shares_bhts.sum(-1, keepdims=True)
    mixed_bhte = shares_bhts @ value_bhse
    return mixed_bhte.transpose(0, 2, 1, 3).reshape(2, t, -1), shares_bhts


@pytest.mark.parametrize("window", [None, 1, MAX_QUERIES + 9])
@pytest.mark.parametrize("t", LENGTHS)
def test_it_is_that_of_numpy(t, window):
    arrays = _draw(t)
    found_bth = jax.jit(attend, static_argnums=3)(*map(jnp.float32, arrays), window)
    want_bth, _ = _attend_numpy(*arrays, window)
    np.testing.assert_allclose(found_bth, want_bth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("t", LENGTHS)
def test_gradients_are_those_of_numpy(t, window):
    query_bhte, key_bgse, value_bgse = _draw(t)
    to_bth = np.random.default_rng(1).normal(size=(2, t, 32))

    @jax.jit
    def differentiate(*arrays):
        def weigh(*arrays):
            return (attend(*arrays, window) * jnp.float32(to_bth)).sum()

        return jax.grad(weigh, argnums=(0, 1, 2))(*arrays)

    found = differentiate(*map(jnp.float32, (query_bhte, key_bgse, value_bgse)))
    _, shares_bhts = _attend_numpy(query_bhte, key_bgse, value_bgse, window)
    key_bhse, value_bhse = (x.repeat(2, axis=1) for x in (key_bgse, value_bgse))
    to_bhte = to_bth.reshape(2, t, 4, 8).transpose(0, 2, 1, 3)
    to_shares_bhts = to_bhte @ value_bhse.mT
    mean_bht1 = (shares_bhts * to_shares_bhts).sum(-1, keepdims=True)
    to_scores_bhts = shares_bhts * (to_shares_bhts - mean_bht1)

    def add_up(x_bhse):
        return x_bhse.reshape(2, 2, 2, t, 8).sum(axis=2)

    want = (
        to_scores_bhts @ key_bhse,
        add_up(to_scores_bhts.mT @ query_bhte),
        add_up(shares_bhts.mT @ to_bhte),
    )
    for found_bhte, want_bhte in zip(found, want, strict=True):
        np.testing.assert_allclose(found_bhte, want_bhte, rtol=1e-3, atol=1e-4)


def _count_temporaries(run, b: int, h: int, t: int) -> int:
    shapes = [jax.ShapeDtypeStruct((b, n, t, 8), jnp.float32) for n in (h, h, h)]
    return jax.jit(run).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("is_gradient", [False, True])
def test_no_more_than_the_scores_of_a_block_are_held(is_gradient):
    b, h, t = 2, 4, 2048
    run = attend
    if is_gradient:
        run = jax.grad(lambda *arrays: attend(*arrays).sum(), argnums=(0, 1, 2))
    block_bytes = 4 * b * h * MAX_QUERIES * t
    assert _count_temporaries(run, b, h, t) < 5 * block_bytes < 4 * b * h * t * t


@pytest.mark.parametrize("mesh", [(8, 1), (2, 4)], indirect=True)
def test_devices_attend_with_their_own_heads_and_rows(mesh):
    t = 2 * MAX_QUERIES + 3
    spread = NamedSharding(mesh, PartitionSpec(DATA, LATENT))
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(8, n, t, 4)).astype(np.float32) for n in (8, 4, 4)]
    run = jax.jit(functools.partial(attend, window=9))
    want_bth = run(*arrays)
    compiled = run.lower(*jax.device_put(arrays, spread)).compile()
    assert not any(word in compiled.as_text() for word in ("all-", "collective-"))
    found_bth = compiled(*jax.device_put(arrays, spread))
    np.testing.assert_allclose(found_bth, want_bth, rtol=1e-5, atol=1e-5)
