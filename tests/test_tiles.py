"""Sums over latents, tile by tile, against the same sums in one tile."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import collectives
from compare import check_gradients
from rival_cases import make_params
from small_sae import (
    B,
    D,
    L,
    make_counters,
    make_rows,
    make_setup,
    place,
    random_dead,
)

from sae_jax import state as states
from sae_jax.mesh import DATA, LATENT, batch_sharding
from sae_jax.saes import tiles

CASES = {
    "relu": {},
    "relu_decoder_norm": {},
    "prolu": {},
    "gated": {},
    "jumprelu": {"bandwidth": 0.4, "target_l0": 9.0},
}


def _differentiate(setup):
    """(loss, (fired_l, metrics)), gradients; compiled anew for every tile size."""

    def loss(params, rows_bd, counters):
        total, aux = setup.sae(params).loss((rows_bd, rows_bd), counters)
        return total, (aux["fired_l"], aux["metrics"])

    return jax.value_and_grad(loss, has_aux=True)


def _inputs(setup):
    params = place(setup, make_params(setup.config.sae.architecture))
    rows_bd = jax.device_put(make_rows(), batch_sharding(setup.mesh))
    return params, rows_bd, make_counters(random_dead(12))


def _use_tiles(monkeypatch, setup, n_tiles: int, n_rows: int = B) -> None:
    n_own = setup.config.sae.n_latents // setup.mesh.shape[LATENT]
    tile_size = n_rows // setup.mesh.shape[DATA] * n_own // n_tiles
    monkeypatch.setattr(tiles, "TILE_SIZE", tile_size)


@pytest.mark.parametrize(
    ("architecture", "mesh_shape", "n_tiles"),
    [
        *((name, (2, 4), 4) for name in CASES),
        ("gated", (1, 1), 2),
        ("jumprelu", (1, 8), 2),
    ],
)
def test_tiles_give_the_loss_and_gradients_of_one_tile(
    x64, monkeypatch, architecture, mesh_shape, n_tiles
):
    fields = {"firing_threshold": 5.0, **CASES[architecture]}
    setup = make_setup(mesh_shape, architecture=architecture, **fields)
    (loss, aux), gradients = jax.jit(_differentiate(setup))(*_inputs(setup))
    assert 0 < aux[0].sum() < L  # or the order of tiles would not matter
    _use_tiles(monkeypatch, setup, n_tiles)
    found = jax.jit(_differentiate(setup))(*_inputs(setup))
    (tiled_loss, tiled_aux), tiled_gradients = found
    np.testing.assert_allclose(tiled_loss, loss, rtol=1e-12)
    np.testing.assert_array_equal(tiled_aux[0], aux[0])
    for name, value in aux[1].items():
        np.testing.assert_allclose(tiled_aux[1][name], value, rtol=1e-12)
    want = {name: np.asarray(value) for name, value in gradients.items()}
    check_gradients(tiled_gradients, want, rtol=1e-12)


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4)])
@pytest.mark.parametrize("architecture", ["gated", "jumprelu"])
def test_tiles_never_hold_the_dense_code(monkeypatch, architecture, mesh_shape):
    """Forward, backward and between: no array is half as large as a shard's code."""
    fields = {"n_latents": 256, **CASES[architecture]}
    setup = make_setup(mesh_shape, architecture=architecture, **fields)
    n_rows = 512  # many more than D, so that weights and rows are small beside a code
    dense = n_rows // mesh_shape[0] * 256 // mesh_shape[1]
    assert _largest_array(setup, n_rows) >= dense
    n_tiles = 4
    _use_tiles(monkeypatch, setup, n_tiles, n_rows)
    largest = _largest_array(setup, n_rows)
    assert dense / n_tiles <= largest < dense / 2


def _largest_array(setup, n_rows: int) -> int:
    """Elements of the largest array in the step's program."""
    state = states.abstract(setup)
    rows_bd = jax.ShapeDtypeStruct((n_rows, D), jnp.float32)
    program = jax.make_jaxpr(_differentiate(setup))(
        state.params, rows_bd, state.counters
    )
    shapes = re.findall(r"\b[a-z]+\d*\[(\d+(?:,\d+)*)\]", str(program))
    return max(math.prod(int(n) for n in shape.split(",")) for shape in shapes)


@pytest.mark.parametrize(
    ("mesh_shape", "tile_size", "width"),
    [
        ((1, 1), B * L, 32),
        ((1, 1), B * L - 1, 16),
        ((1, 1), 7 * B, 4),  # 5 tiles would do, but 8 are the least that divide 32
        ((1, 1), B, 1),
        ((1, 1), 1, 1),  # never less than a latent
        ((2, 4), 3 * B // 2, 2),  # a shard has half the rows and 8 latents
    ],
)
def test_tiles_are_the_fewest_that_divide_a_shards_latents(
    monkeypatch, mesh_shape, tile_size, width
):
    monkeypatch.setattr(tiles, "TILE_SIZE", tile_size)
    setup, seen = make_setup(mesh_shape, architecture="relu"), set()
    sae = setup.sae(place(setup, make_params("relu"), np.float32))

    def on_tile(normed_bd, weights):
        seen.add(weights["w_enc_ld"].shape[0])
        code_bl = sae.activate(sae.project(normed_bd, weights), weights)
        return {"penalty": jnp.sum(code_bl, axis=1)}, code_bl > 0

    rows_bd = jnp.float32(make_rows())
    sums, fired_l = jax.jit(
        lambda rows_bd: tiles.sum_over_latents(sae, on_tile, rows_bd)
    )(rows_bd)
    assert seen == {width}
    code_bl = np.asarray(sae.encode_dense(rows_bd))
    np.testing.assert_allclose(sums["penalty"], code_bl.sum(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(sums["l0"], (code_bl > 0).sum(axis=1))
    np.testing.assert_array_equal(fired_l, (code_bl > 0).any(axis=0))


@pytest.mark.parametrize(("architecture", "n_sums"), [("relu", 1), ("gated", 2)])
def test_a_step_on_latent_shards_moves_its_sums_only(architecture, n_sums):
    setup = make_setup((1, 8), architecture=architecture)
    lowered = jax.jit(_differentiate(setup)).lower(*_inputs(setup))
    moved = collectives(lowered.compile())
    assert {kind for kind, _ in moved} == {"all-reduce"}
    n_reduced = sum(size for _, size in moved)
    # Beside reconstructions: each row's penalty and L0, and the gradient of b_dec.
    assert n_sums * B * D <= n_reduced <= n_sums * B * D + 2 * B + 2 * D + 16
