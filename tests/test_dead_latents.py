"""Reconstruction from dead latents against plain NumPy, tile by tile on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from compare import QUICK_TO_COMPILE
from jax import lax
from jax.sharding import PartitionSpec as P

from sae_jax import dead_latents
from sae_jax.config import MeshConfig
from sae_jax.dead_latents import Weights
from sae_jax.mesh import DATA, LATENT, make_mesh

B, D, L, K = 24, 5, 48, 6
TILE_LATENTS = 4

# Sizes for which either capacity, the few latents' or all's, takes several tiles of
# rows, the last of which reaches back.
TILES = [
    ((1, 1), 56),  # of 48 latents: 7 rows where at most 8 are dead, else 1
    ((1, 1), 240),  # 24 and 5
    ((1, 8), 40),  # of 6: 10 where at most 4 are, else 5
    ((2, 4), 28),  # of 12, and 12 rows: 7 where at most 4 are, else 2
    ((2, 4), 60),  # 12 and 5
    ((8, 1), 16),  # 3 rows: 2 and 1
    ((8, 1), 96),  # 3 and 2
]
DEAD = {
    "none": 0,
    "one": 1,
    "fewer than K": 4,
    "K": K,
    "more than K": 8,
    "half": 24,
    "all but one": L - 1,
    "all": L,
}

every_tile = pytest.mark.parametrize(("mesh_shape", "tile_size"), TILES, ids=str)


def _dead(name: str) -> np.ndarray:
    if name == "the first":  # all of them on one of eight shards
        return np.arange(L) < K + 1
    return np.random.default_rng(2).permutation(L) < DEAD[name]


def _case(kind: str = "distinct"):
    """Rows, weights, and gradients of x̂ [2, B, D]: the part's and all other's."""
    rng = np.random.default_rng(0)
    if kind == "distinct":
        w_enc_ld, w_dec_ld = rng.normal(size=(2, L, D))
        x_bd, bias_l = rng.normal(size=(B, D)), 0.5 * rng.normal(size=L)
    else:  # ties, also at zero
        w_enc_ld, w_dec_ld = np.float64(rng.integers(-1, 2, (2, L, D)))
        x_bd = np.float64(rng.integers(-1, 2, (B, D)))
        bias_l = np.float64(rng.integers(-2, 1, L))
        x_bd[[0, 9, B - 1]] = 0
    if kind == "all equal":
        x_bd[:], bias_l[:] = 0, 1
    return x_bd, Weights(w_enc_ld, bias_l, w_dec_ld), rng.normal(size=(2, B, D))


def _want(x_bd, weights: Weights, is_dead_l, g_2bd):
    """The part, and the gradients of its sum with what all latents would make of x."""
    w_enc_ld, bias_l, w_dec_ld = weights
    g_bd, g_other_bd = g_2bd
    pre_bl = x_bd @ w_enc_ld.T + bias_l
    z_bl = np.zeros((B, L))
    if is_dead_l.any():
        z_bl = oracle.chosen_values(pre_bl, oracle.choose(pre_bl, K, is_dead_l))
    g_pre_bl = np.where(z_bl > 0, g_bd @ w_dec_ld.T, 0) + g_other_bd @ w_dec_ld.T
    return z_bl @ w_dec_ld, Weights(
        g_pre_bl.T @ x_bd, g_pre_bl.sum(0), z_bl.T @ g_bd + pre_bl.T @ g_other_bd
    )


@functools.cache
def _compiled(mesh_shape, tile_size: int | None = None, dtype="float64"):
    """The part and the gradients of weights, with the tiles given or the module's."""

    def on_shard(x_bd, weights, is_dead_l):
        x_bd = lax.pcast(x_bd, LATENT, to="varying")
        weights, is_dead_l = jax.tree.map(
            lambda array: lax.pcast(array, DATA, to="varying"), (weights, is_dead_l)
        )
        part_bd, (w_enc_ld, bias_l, w_dec_ld) = dead_latents.reconstruct(
            x_bd, weights, is_dead_l, K, LATENT, dtype
        )
        other_bd = (x_bd @ w_enc_ld.T + bias_l) @ w_dec_ld
        return lax.psum((part_bd, other_bd), LATENT)

    mapped = jax.shard_map(
        on_shard,
        mesh=make_mesh(MeshConfig(*mesh_shape)),
        in_specs=(P(DATA), P(LATENT), P(LATENT)),
        out_specs=P(DATA),
    )

    @functools.partial(jax.jit, compiler_options=QUICK_TO_COMPILE)
    def differentiate(x_bd, weights, is_dead_l, g_2bd):
        recons, pull = jax.vjp(lambda w: mapped(x_bd, w, is_dead_l), weights)
        return recons[0], *pull(tuple(g_2bd))

    with pytest.MonkeyPatch.context() as patch:
        if tile_size is not None:
            patch.setattr(dead_latents, "_TILE_LATENTS", TILE_LATENTS)
            patch.setattr(dead_latents, "_TILE_SIZE", tile_size)
        # Traced with these tiles once and for all.
        x_bd, weights, g_2bd = _case()
        args = x_bd, weights, _dead("none"), g_2bd
        differentiate(*args if dtype == "float64" else jax.tree.map(_as_float32, args))
    return differentiate


def _check(found, want, rtol=1e-10) -> None:
    for array, want_array in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        atol = rtol * np.abs(want_array).max()
        np.testing.assert_allclose(array, want_array, rtol=rtol, atol=atol)


@every_tile
@pytest.mark.parametrize("kind", ["distinct", "ties", "all equal"])
def test_part_and_gradients_are_the_oracles(x64, mesh_shape, tile_size, kind):
    """However many are dead; the gradients of other uses of the weights come along."""
    differentiate = _compiled(mesh_shape, tile_size)
    x_bd, weights, g_2bd = _case(kind)
    for name in (*DEAD, "the first"):
        args = x_bd, weights, _dead(name), g_2bd
        _check(differentiate(*args), _want(*args))


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4)])
@pytest.mark.parametrize("kind", ["distinct", "ties"])
def test_one_tile_holds_all_of_a_small_dictionary(x64, mesh_shape, kind):
    x_bd, weights, g_2bd = _case(kind)
    for name in ("one", "more than K", "all"):
        args = x_bd, weights, _dead(name), g_2bd
        _check(_compiled(mesh_shape)(*args), _want(*args))


@every_tile
def test_nothing_at_all_is_added_where_none_is_dead(x64, mesh_shape, tile_size):
    x_bd, weights, g_2bd = _case()
    g_2bd[1] = 0
    part_bd, gradients = _compiled(mesh_shape, tile_size)(
        x_bd, weights, _dead("none"), g_2bd
    )
    for array in (part_bd, *gradients):
        np.testing.assert_array_equal(array, 0)


@every_tile
def test_live_latents_get_no_gradient(x64, mesh_shape, tile_size):
    x_bd, weights, g_2bd = _case()
    g_2bd[1] = 0
    for name in ("more than K", "half"):
        is_dead_l = _dead(name)
        _, gradients = _compiled(mesh_shape, tile_size)(
            x_bd, weights, is_dead_l, g_2bd
        )
        for array in gradients:
            np.testing.assert_array_equal(np.asarray(array)[~is_dead_l], 0)
            assert np.abs(array).max() > 1e-3


@pytest.mark.parametrize(
    ("dtype", "kind", "rtol"), [("float32", "distinct", 1e-5), ("bfloat16", "ties", 0)]
)
def test_parts_and_gradients_are_float32_whatever_the_factors(dtype, kind, rtol):
    """Of small whole numbers and their quarters, products of bfloat16 are exact."""
    x_bd, weights, g_2bd = _case(kind)
    args = x_bd, weights, _dead("half"), np.round(4 * g_2bd) / 4
    found = _compiled((2, 4), 28, dtype)(*jax.tree.map(_as_float32, args))
    assert {array.dtype for array in jax.tree.leaves(found)} == {np.dtype("float32")}
    _check(found, _want(*args), rtol)


def _as_float32(array: np.ndarray) -> np.ndarray:
    return array if array.dtype == bool else np.float32(array)


def test_a_row_that_is_not_finite_leaves_the_others_alone(x64):
    x_bd, weights, g_2bd = _case()
    args = _dead("half"), g_2bd
    want_bd, _ = _want(x_bd, weights, *args)
    x_bd[3, 1] = np.nan
    part_bd, _ = _compiled((2, 4), 28)(x_bd, weights, *args)
    others = np.arange(B) != 3
    _check(part_bd[others], want_bd[others])


def test_the_pre_activations_of_a_batch_are_never_held():
    n_rows, n_latents, d_model = 4096, 2**16, 16

    @functools.partial(
        jax.shard_map,
        mesh=make_mesh(MeshConfig(1, 1)),
        in_specs=(P(DATA), P(LATENT), P(LATENT)),
        out_specs=P(DATA),
        check_vma=False,
    )
    def part(x_bd, weights, is_dead_l):
        args = x_bd, weights, is_dead_l, 512, LATENT, jnp.float32
        return dead_latents.reconstruct(*args)[0]

    def loss(weights, x_bd, is_dead_l):
        return jnp.sum(jnp.square(part(x_bd, weights, is_dead_l)))

    w_ld = jax.ShapeDtypeStruct((n_latents, d_model), jnp.float32)
    weights = Weights(w_ld, jax.ShapeDtypeStruct((n_latents,), jnp.float32), w_ld)
    x_bd = jax.ShapeDtypeStruct((n_rows, d_model), jnp.float32)
    is_dead_l = jax.ShapeDtypeStruct((n_latents,), jnp.bool)
    lowered = jax.jit(jax.grad(loss)).lower(weights, x_bd, is_dead_l)
    held = lowered.compile(QUICK_TO_COMPILE).memory_analysis().temp_size_in_bytes
    assert held < 4 * n_rows * n_latents / 4
