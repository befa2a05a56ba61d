"""Sparse products and their gradients against the dense ones, in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import QUICK_TO_COMPILE
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh
from jax.sharding import PartitionSpec as P

from sae_jax import kernels, sparse
from sae_jax.config import MeshConfig
from sae_jax.mesh import DATA, LATENT, make_mesh

B, K, L, D = 7, 6, 11, 5  # a pass takes four columns of K
SHAPES = [
    (B, K, L, D),
    (B, 4, L, D),  # one pass, and full
    (B, 9, L, D),
    (1, K, L, D),
    (B, 1, L, D),
    (B, K, 1, D),
    (B, K, L, 1),
    (1, 1, 1, 1),
]
USES = ["all", "some", "late", "none"]


def _case(shape=(B, K, L, D), use="some", seed=0):
    """values [B, K], indices [B, K], rows [B, D], weights [L, D] and a bias [L]."""
    n_rows, k, n_latents, d_model = shape
    rng = np.random.default_rng(seed)
    is_used_bk = {
        "all": np.ones((n_rows, k), bool),
        "some": rng.random((n_rows, k)) < 0.5,
        "late": np.arange(k) == np.full((n_rows, 1), k - 1),
        "none": np.zeros((n_rows, k), bool),
    }[use]
    return (
        np.where(is_used_bk, rng.normal(size=(n_rows, k)), 0),
        rng.integers(0, n_latents, (n_rows, k)).astype(np.int32),  # also twice in a row
        rng.normal(size=(n_rows, d_model)),
        rng.normal(size=(n_latents, d_model)),
        rng.normal(size=n_latents),
    )


def _dense(values_bk, indices_bk, n_latents: int) -> np.ndarray:
    code_bl = np.zeros((len(values_bk), n_latents))
    for row, (values_k, indices_k) in enumerate(zip(values_bk, indices_bk)):
        np.add.at(code_bl[row], indices_k, values_k)
    return code_bl


def _want_decode(values_bk, indices_bk, g_bd, w_ld):
    """x̂, and the gradients of values and of weights."""
    code_bl = _dense(values_bk, indices_bk, len(w_ld))
    g_values_bk = np.take_along_axis(g_bd @ w_ld.T, indices_bk, 1)
    return code_bl @ w_ld, np.where(values_bk, g_values_bk, 0), code_bl.T @ g_bd


def _want_multiply(g_bk, indices_bk, x_bd, w_ld):
    """The gradients of rows, of weights and of the bias."""
    g_bl = _dense(g_bk, indices_bk, len(w_ld))
    return g_bl @ w_ld, g_bl.T @ x_bd, g_bl.sum(0)


def _jit(function):
    return jax.jit(function, compiler_options=QUICK_TO_COMPILE)


@functools.cache
def _decoder(dtype, own=None):
    """Compiled: x̂ and the gradients of values and of weights."""

    def decode(values_bk, indices_bk, g_bd, w_ld):
        recon_bd, pull = jax.vjp(
            lambda values, w: sparse.decode(values, indices_bk, w, dtype, own),
            values_bk,
            w_ld,
        )
        return recon_bd, *pull(g_bd)

    return _jit(decode)


@functools.cache
def _multiplier(dtype, own=None):
    """Compiled: what is handed on, its gradient, and those of the factors."""

    def multiply(g_bk, indices_bk, x_bd, w_ld, bias_l):
        pre_bk = jnp.full_like(g_bk, 0.25)
        found_bk, pull = jax.vjp(
            lambda pre, *rest: sparse.multiply_at(pre, indices_bk, *rest, dtype, own),
            *(pre_bk, x_bd, w_ld, bias_l),
        )
        return found_bk, *pull(g_bk)

    return _jit(multiply)


def _check(got, want, rtol=1e-10):
    for found, array in zip(got, want, strict=True):
        assert found.shape == array.shape
        atol = rtol * (np.abs(array).max() + 1e-300)
        np.testing.assert_allclose(found, array, rtol=rtol, atol=atol)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decode_and_its_gradients_are_those_of_the_dense_product(x64, shape, use):
    values_bk, indices_bk, g_bd, w_ld, _ = _case(shape, use)
    got = _decoder("float64")(values_bk, indices_bk, g_bd, w_ld)
    _check(got, _want_decode(values_bk, indices_bk, g_bd, w_ld))
    np.testing.assert_array_equal(np.asarray(got[1])[values_bk == 0], 0)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradient_at_sparse_indices_is_that_of_the_dense_product(x64, shape, use):
    g_bk, indices_bk, x_bd, w_ld, bias_l = _case(shape, use)
    pre_bk, g_pre_bk, *got = _multiplier("float64")(
        g_bk, indices_bk, x_bd, w_ld, bias_l
    )
    _check(got, _want_multiply(g_bk, indices_bk, x_bd, w_ld))
    np.testing.assert_array_equal(pre_bk, 0.25)  # handed on as it is
    np.testing.assert_array_equal(g_pre_bk, 0)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_with_kernels_all_are_those_of_the_dense_product(platform, use):
    own = kernels.find(platform, interpret=True)
    shape = (B, 9, L, D)
    case = [np.float32(array) for array in _case(shape, use)]
    values_bk, _, x_bd, w_ld, bias_l = case
    indices_bk = _case(shape, use)[1]
    got = _decoder("float32", own)(values_bk, indices_bk, x_bd, w_ld)
    _check(got, _want_decode(values_bk, indices_bk, x_bd, w_ld), rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(got[1])[values_bk == 0], 0)
    pre_bk, g_pre_bk, *got = _multiplier("float32", own)(
        values_bk, indices_bk, x_bd, w_ld, bias_l
    )
    _check(got, _want_multiply(values_bk, indices_bk, x_bd, w_ld), rtol=1e-5)
    np.testing.assert_array_equal(pre_bk, 0.25)
    np.testing.assert_array_equal(g_pre_bk, 0)


@pytest.mark.parametrize("owners", [[0, 1, 3], [1]], ids=str)
@pytest.mark.parametrize("n_slots", [1, 2, 3, 64, 65, 300])
def test_sums_in_order_have_slots_of_any_number(n_slots, owners):
    """The gradient of a bias, where few latents own all slots."""
    own = kernels.find("gpu", interpret=True)
    g_bk, indices_bk, x_bd, w_ld, bias_l = _case((n_slots, 1, 4, 1), "all")
    indices_bk = np.int32(owners)[indices_bk % len(owners)]
    factors = (np.float32(array) for array in (x_bd, w_ld, bias_l))
    *_, g_bias_l = _multiplier("float32", own)(np.float32(g_bk), indices_bk, *factors)
    _check([g_bias_l], [_dense(g_bk, indices_bk, 4).sum(0)], rtol=1e-5)


def test_with_kernels_for_a_gpu_no_float_is_added_in_any_order():
    def differentiate(own, g_bk, indices_bk, x_bd, w_ld):
        def run(pre_bk, x_bd, w_ld):
            bias_l = w_ld[:, 0]
            args = pre_bk, indices_bk, x_bd, w_ld, bias_l, jnp.float32, own
            values_bk = sparse.multiply_at(*args)
            return sparse.decode(values_bk, indices_bk, w_ld, jnp.float32, own)

        return jax.vjp(run, g_bk, x_bd, w_ld)[1](x_bd)

    shapes = (16, 8), (16, 8), (16, 128), (64, 128)
    case = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    case[1] = case[1].update(dtype=jnp.int32)
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="cuda")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    scatters = []
    for own in (None, kernels.find("gpu")):
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(differentiate, static_argnums=0).trace(own, *case)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        scatters.append(text.count('"stablehlo.scatter"('))
    # Of plain JAX, two sums of weights and one of a bias, and products put in place.
    assert scatters == [4, 0]


def test_an_unused_slot_points_anywhere(x64):
    """What it points at is no part of any sum."""
    values_bk, indices_bk, g_bd, w_ld, bias_l = _case()
    moved_bk = np.where(values_bk, indices_bk, (indices_bk + 3) % L)
    for compiled, rest in (
        (_decoder("float64"), (g_bd, w_ld)),
        (_multiplier("float64"), (g_bd, w_ld, bias_l)),
    ):
        got = compiled(values_bk, moved_bk, *rest)
        want = compiled(values_bk, indices_bk, *rest)
        for found, array in zip(got, want):
            np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("slots", [0, 1, 4, 6, 8, 41, 42])
def test_slots_are_summed_in_chunks_of_any_size(x64, monkeypatch, slots):
    """B K = 42 slots; 0: a row is longer than a chunk, which then holds one slot."""
    monkeypatch.setattr(sparse, "_CHUNK_SIZE", slots * D + D // 2)
    outer_sum = _jit(lambda *args: sparse.outer_sum(*args, L, "float64"))
    for use in USES:
        values_bk, indices_bk, x_bd, _, _ = _case(use=use)
        sum_ld = outer_sum(values_bk, indices_bk, x_bd)
        _check([sum_ld], [_dense(values_bk, indices_bk, L).T @ x_bd])


def test_sums_have_the_same_bits_every_time():
    shape = (64, 8, 5, 16)  # about a hundred slots of each latent
    values_bk, indices_bk, x_bd, _, _ = (np.float32(a) for a in _case(shape))
    indices_bk = indices_bk.astype(np.int32)
    outer_sum = jax.jit(lambda *args: sparse.outer_sum(*args, 5, "float32"))
    first_ld, again_ld = (outer_sum(values_bk, indices_bk, x_bd) for _ in range(2))
    assert np.asarray(first_ld).tobytes() == np.asarray(again_ld).tobytes()
    _check([first_ld], [_dense(values_bk, indices_bk, 5).T @ x_bd], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_rounded_and_sums_are_not(dtype):
    """float32 sums of the factors as they are after rounding to `dtype`."""
    case = [np.float32(array) for array in _case((33, 8, 6, 48), "all")]
    values_bk, indices_bk, g_bd, w_ld, bias_l = case
    indices_bk = indices_bk.astype(np.int32)
    rows_bd, rows_ld = (np.float64(jnp.asarray(a, dtype)) for a in (g_bd, w_ld))
    got = _decoder(dtype)(values_bk, indices_bk, g_bd, w_ld)
    want = _want_decode(np.float64(values_bk), indices_bk, rows_bd, rows_ld)
    _check(got, want, rtol=1e-5)
    _, _, *products = _multiplier(dtype)(values_bk, indices_bk, g_bd, w_ld, bias_l)
    _check(
        products,
        _want_multiply(np.float64(values_bk), indices_bk, rows_bd, rows_ld),
        rtol=1e-5,
    )
    assert {array.dtype for array in (*got, *products)} == {jnp.dtype("float32")}


def test_gradients_have_the_types_of_what_they_are_of():
    values_bk, indices_bk, g_bd, w_ld, bias_l = _case()
    w_ld, bias_l = jnp.bfloat16(w_ld), jnp.bfloat16(bias_l)
    values_bk, g_bd = np.float32(values_bk), np.float32(g_bd)
    recon_bd, g_values_bk, g_w_ld = _decoder("bfloat16")(
        values_bk, indices_bk, g_bd, w_ld
    )
    assert recon_bd.dtype == g_values_bk.dtype == jnp.float32
    assert g_w_ld.dtype == jnp.bfloat16
    got = _multiplier("bfloat16")(values_bk, indices_bk, g_bd, w_ld, bias_l)
    assert [a.dtype.name for a in got[2:]] == ["float32", "bfloat16", "bfloat16"]


def test_latent_shards_add_up_to_the_whole(x64):
    """Inside `jax.shard_map`: rows over `data`, weights and slots over `latent`."""
    mesh, n_rows, n_own = make_mesh(MeshConfig(2, 4)), 6, 3
    shards = [_case((n_rows, K, n_own, D), seed=seed) for seed in range(4)]
    values_bk, indices_bk = (np.concatenate(a, 1) for a in list(zip(*shards))[:2])
    w_ld, bias_l = (np.concatenate(a) for a in list(zip(*shards))[3:])
    x_bd = shards[0][2]
    offsets_k = np.repeat(np.arange(4, dtype=np.int32), K) * n_own
    local = (P(DATA, LATENT), P(DATA, LATENT), P(DATA, None), P(LATENT), P(LATENT))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=local, out_specs=(P(DATA), P(DATA))
    )
    def on_shard(values_bk, indices_bk, x_bd, w_ld, bias_l):
        x_bd = lax.pcast(x_bd, LATENT, to="varying")
        w_ld, bias_l = (lax.pcast(a, DATA, to="varying") for a in (w_ld, bias_l))
        args = values_bk, indices_bk, x_bd, w_ld, bias_l
        handed_on_bk = sparse.multiply_at(*args, jnp.float64)
        recon_bd = sparse.decode(values_bk, indices_bk, w_ld, jnp.float64)
        return lax.psum(recon_bd, LATENT), lax.psum(jnp.sum(handed_on_bk, 1), LATENT)

    @_jit
    def differentiate(values_bk, g_bd, x_bd, w_ld, bias_l):
        def run(values_bk, x_bd, w_ld, bias_l):
            return on_shard(values_bk, indices_bk, x_bd, w_ld, bias_l)

        (recon_bd, _), pull = jax.vjp(run, values_bk, x_bd, w_ld, bias_l)
        return recon_bd, *pull((g_bd, jnp.arange(1.0, 1 + n_rows)))

    g_bd = np.random.default_rng(9).normal(size=(n_rows, D))
    got = differentiate(values_bk, g_bd, x_bd, w_ld, bias_l)
    global_bk = indices_bk + offsets_k
    recon_bd, g_values_bk, g_w_ld = _want_decode(values_bk, global_bk, g_bd, w_ld)
    ones_bk = np.tile(np.arange(1.0, 1 + n_rows)[:, None], (1, 4 * K))
    g_x_bd, more_w_ld, g_bias_l = _want_multiply(ones_bk, global_bk, x_bd, w_ld)
    _check(got, [recon_bd, g_values_bk, g_x_bd, g_w_ld + more_w_ld, g_bias_l])


def _decode(values_bk, indices_bk, x_bd, w_ld):
    return sparse.decode(values_bk, indices_bk, w_ld, jnp.float32)


def _outer_sum(values_bk, indices_bk, x_bd, w_ld):
    return sparse.outer_sum(values_bk, indices_bk, x_bd, len(w_ld), jnp.float32)


def _gradients(values_bk, indices_bk, x_bd, w_ld):
    return jax.vjp(
        lambda values, w: sparse.decode(values, indices_bk, w, jnp.float32),
        values_bk,
        w_ld,
    )[1](x_bd)


def _gradients_at(g_bk, indices_bk, x_bd, w_ld):
    return jax.vjp(
        lambda *factors: sparse.multiply_at(g_bk, indices_bk, *factors, jnp.float32),
        *(x_bd, w_ld, w_ld[:, 0]),
    )[1](g_bk)


@pytest.mark.parametrize(
    "function", [_decode, _outer_sum, _gradients, _gradients_at]
)
def test_neither_a_dense_code_nor_all_gathered_rows_are_held(function):
    n_rows, k, d_model, n_latents = 2048, 64, 256, 2**16
    abstract = [
        jax.ShapeDtypeStruct((n_rows, k), jnp.float32),
        jax.ShapeDtypeStruct((n_rows, k), jnp.int32),
        jax.ShapeDtypeStruct((n_rows, d_model), jnp.float32),
        jax.ShapeDtypeStruct((n_latents, d_model), jnp.float32),
    ]
    compiled = jax.jit(function).lower(*abstract).compile(QUICK_TO_COMPILE)
    held = compiled.memory_analysis().temp_size_in_bytes
    assert held < 4 * min(n_rows * k * d_model, n_rows * n_latents) / 8


def test_to_dense_adds_what_is_at_the_same_index(x64):
    values_bk, indices_bk, *_ = _case((6, K, L, D))
    got = sparse.to_dense(
        jnp.reshape(values_bk, (2, 3, K)), jnp.reshape(indices_bk, (2, 3, K)), L
    )
    assert got.shape == (2, 3, L)
    want_bl = _dense(values_bk, indices_bk, L)
    np.testing.assert_allclose(got.reshape(6, L), want_bl, rtol=1e-14)
