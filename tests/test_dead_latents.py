"""Gradients from dead latents alone against plain NumPy, tile by tile on every mesh."""

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
from sae_jax.dead_latents import Gradients, Weights
from sae_jax.mesh import DATA, LATENT, make_mesh

B, D, L, K = 24, 5, 48, 6
TILE_LATENTS = 4
SCALE = 0.7

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
    """Rows, targets, weights, and gradients to be added to."""
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
    shapes = Gradients((L, D), (L,), (L, D), (D,))
    before = Gradients(*(rng.normal(size=shape) for shape in shapes))
    return x_bd, rng.normal(size=(B, D)), Weights(w_enc_ld, bias_l, w_dec_ld), before


def _want(x_bd, target_bd, weights: Weights, before: Gradients, is_dead_l):
    """The gradients and the sum of squares, which is 0 where none is dead."""
    if not is_dead_l.any():
        return before, np.zeros(())
    w_enc_ld, bias_l, w_dec_ld = weights
    pre_bl = x_bd @ w_enc_ld.T + bias_l
    z_bl = oracle.chosen_values(pre_bl, oracle.choose(pre_bl, K, is_dead_l))
    error_bd = z_bl @ w_dec_ld - target_bd
    g_bd = 2 * SCALE * error_bd
    g_pre_bl = np.where(z_bl > 0, g_bd @ w_dec_ld.T, 0)
    own = g_pre_bl.T @ x_bd, g_pre_bl.sum(0), z_bl.T @ g_bd, g_pre_bl.sum(0) @ w_enc_ld
    return Gradients(*map(np.add, before, own)), np.square(error_bd).sum()


@functools.cache
def _compiled(mesh_shape, tile_size: int | None = None, dtype="float64"):
    """Gradients and sum over the mesh, with the tiles given or the module's."""

    def on_shard(x_bd, target_bd, weights, before, is_dead_l):
        is_first = lax.axis_index(DATA) == 0
        own = jax.tree.map(lambda array: jnp.where(is_first, array, 0), before)
        is_first &= lax.axis_index(LATENT) == 0
        own = own._replace(shift_d=jnp.where(is_first, before.shift_d, 0))
        after, total = dead_latents.add_gradients(
            own, x_bd, target_bd, weights, is_dead_l, SCALE, K, LATENT, dtype
        )
        after, total = lax.psum((after, total), DATA)
        return after._replace(shift_d=lax.psum(after.shift_d, LATENT)), total

    by_latent = P(LATENT)
    placed = Gradients(by_latent, by_latent, by_latent, P())
    mapped = jax.shard_map(
        on_shard,
        mesh=make_mesh(MeshConfig(*mesh_shape)),
        in_specs=(P(DATA), P(DATA), by_latent, placed, by_latent),
        out_specs=(placed, P()),
        check_vma=False,
    )
    run = jax.jit(mapped, compiler_options=QUICK_TO_COMPILE)
    with pytest.MonkeyPatch.context() as patch:
        if tile_size is not None:
            patch.setattr(dead_latents, "_TILE_LATENTS", TILE_LATENTS)
            patch.setattr(dead_latents, "_TILE_SIZE", tile_size)
            patch.setattr(dead_latents, "_LEAST_ROWS", 1)
        # Traced with these tiles once and for all.
        args = *_case(), _dead("none")
        run(*args if dtype == "float64" else jax.tree.map(_as_float32, args))
    return run


def _check(found, want, rtol=1e-10) -> None:
    for array, want_array in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
        atol = rtol * np.abs(want_array).max()
        np.testing.assert_allclose(array, want_array, rtol=rtol, atol=atol)


@every_tile
@pytest.mark.parametrize("kind", ["distinct", "ties", "all equal"])
def test_gradients_and_sum_are_the_oracles(x64, mesh_shape, tile_size, kind):
    """However many are dead."""
    for name in (*DEAD, "the first"):
        args = *_case(kind), _dead(name)
        _check(_compiled(mesh_shape, tile_size)(*args), _want(*args))


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4)])
@pytest.mark.parametrize("kind", ["distinct", "ties"])
def test_one_tile_holds_all_of_a_small_dictionary(x64, mesh_shape, kind):
    for name in ("one", "more than K", "all"):
        args = *_case(kind), _dead(name)
        _check(_compiled(mesh_shape)(*args), _want(*args))


@every_tile
def test_nothing_at_all_is_added_where_none_is_dead(x64, mesh_shape, tile_size):
    *args, before = _case()
    after, total = _compiled(mesh_shape, tile_size)(*args, before, _dead("none"))
    for array, want in zip(after, before):
        np.testing.assert_array_equal(array, want)
    assert total == 0


@every_tile
def test_live_latents_get_no_gradient(x64, mesh_shape, tile_size):
    *args, before = _case()
    for name in ("more than K", "half"):
        is_dead_l = _dead(name)
        after, _ = _compiled(mesh_shape, tile_size)(*args, before, is_dead_l)
        for array, want in zip(after[:3], before[:3]):
            np.testing.assert_array_equal(array[~is_dead_l], want[~is_dead_l])
            assert np.abs(array - want).max() > 1e-3


@pytest.mark.parametrize(
    ("dtype", "kind", "rtol"),
    [("float32", "distinct", 1e-5), ("bfloat16", "distinct", 0.03)],
)
def test_gradients_are_float32_whatever_the_factors(dtype, kind, rtol):
    args = *_case(kind), _dead("half")
    found = _compiled((2, 4), 28, dtype)(*jax.tree.map(_as_float32, args))
    assert {array.dtype for array in jax.tree.leaves(found)} == {np.dtype("float32")}
    _check(found, _want(*args), rtol)


def _as_float32(array: np.ndarray) -> np.ndarray:
    return array if array.dtype == bool else np.float32(array)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_a_row_that_is_not_finite_leaves_the_others_alone(x64, bad):
    """Nor one whose error overflows."""
    x_bd, target_bd, *rest = *_case(), _dead("half")
    others = np.arange(B) != 3
    want = _want(x_bd[others], target_bd[others], *rest)
    x_bd[3, 1] = bad
    _check(_compiled((2, 4), 28)(x_bd, target_bd, *rest), want)


def test_the_pre_activations_of_a_batch_are_never_held():
    n_rows, n_latents, d_model = 4096, 2**16, 16

    @functools.partial(
        jax.shard_map,
        mesh=make_mesh(MeshConfig(1, 1)),
        in_specs=P(),
        out_specs=P(),
        check_vma=False,
    )
    def add(gradients, x_bd, weights, is_dead_l):
        args = x_bd, x_bd, weights, is_dead_l, SCALE, 512, LATENT, jnp.float32
        return dead_latents.add_gradients(gradients, *args)

    w_ld = jax.ShapeDtypeStruct((n_latents, d_model), jnp.float32)
    weights = Weights(w_ld, jax.ShapeDtypeStruct((n_latents,), jnp.float32), w_ld)
    gradients = Gradients(*weights, jax.ShapeDtypeStruct((d_model,), jnp.float32))
    x_bd = jax.ShapeDtypeStruct((n_rows, d_model), jnp.float32)
    is_dead_l = jax.ShapeDtypeStruct((n_latents,), jnp.bool)
    lowered = jax.jit(add).lower(gradients, x_bd, weights, is_dead_l)
    held = lowered.compile(QUICK_TO_COMPILE).memory_analysis().temp_size_in_bytes
    assert held < 4 * n_rows * n_latents / 4
