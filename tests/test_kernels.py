"""The kernels of each platform, interpreted, and their reference, against NumPy.

What lies past the end of an array is NaN here: a kernel that uses it fails.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from sae_jax import kernels
from sae_jax.config import MeshConfig
from sae_jax.kernels import gpu, reference, tpu
from sae_jax.mesh import make_mesh

PLATFORMS = {"tpu": tpu, "gpu": gpu}


@pytest.fixture(params=["reference", *PLATFORMS])
def call(request):
    """Calls a kernel of this implementation by name; only the TPU's take tiles."""

    def call(name, *args, **tiles):
        if request.param == "reference":
            return getattr(reference, name)(*args)
        kernel = getattr(PLATFORMS[request.param], name)
        tiles = tiles if request.param == "tpu" else {}
        return kernel(*args, interpret=True, **tiles)

    return call


@dataclasses.dataclass(frozen=True)
class Choice:
    """Shapes of one call of bucket_candidates, and the TPU's tiles."""

    rows: int
    width: int
    latents: int
    n_buckets: int
    kept: int
    row_tile: int = 1024
    latent_tile: int = 1024
    dtype: str = "float32"


CHOICES = {
    "one tile, larger than all": Choice(5, 16, 300, 128, 2),
    "many tiles, none of them full": Choice(40, 24, 1300, 256, 3, 16, 512),
    "buckets over several tiles": Choice(33, 24, 1100, 256, 4, 32, 128),
    "fewer latents than buckets": Choice(17, 8, 100, 128, 1, 16, 128),
    "a row wider than a step": Choice(1, 600, 200, 128, 1, dtype="bfloat16"),
}


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES.keys())
def test_candidates_are_the_best_of_each_bucket(call, choice):
    # Small integers: every product is exact, most are ties.
    x_bd, w_ld, bias_l = _integers(choice)
    values, indices = call(
        "bucket_candidates",
        jnp.asarray(x_bd, choice.dtype),
        jnp.asarray(w_ld, choice.dtype),
        jnp.float32(bias_l),
        choice.n_buckets,
        choice.kept,
        row_tile=choice.row_tile,
        latent_tile=choice.latent_tile,
    )
    expected_values, expected_indices = _choose(
        x_bd @ w_ld.T + bias_l, choice.n_buckets, choice.kept
    )
    assert (values.dtype, indices.dtype) == (jnp.float32, jnp.int32)
    np.testing.assert_array_equal(values, expected_values)
    np.testing.assert_array_equal(indices, expected_indices)


def test_latents_of_minus_infinity_and_nan_are_no_candidates(call):
    bias_l = np.full(300, -20.0)  # all are negative
    bias_l[[0, 1, 129]], bias_l[[2, 130]] = -np.inf, np.nan
    x_bd, w_ld, _ = _integers(Choice(4, 8, 300, 128, 2))
    values, indices = call(
        "bucket_candidates", *map(jnp.float32, (x_bd, w_ld, bias_l)), 128, 2
    )
    pre_bl = x_bd @ w_ld.T + bias_l
    expected = _choose(np.where(np.isnan(pre_bl), -np.inf, pre_bl), 128, 2)
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(indices, expected[1])
    assert not np.isin(indices[values > -np.inf], [0, 1, 2, 129, 130]).any()


def test_zeros_past_the_last_latent_are_no_candidates():
    """A TPU may find anything there; a zero would be the best of these."""
    choice = Choice(4, 8, 300, 128, 3)
    x_bd, w_ld, bias_l = _integers(choice)
    bias_l = bias_l - 100
    values, indices = tpu.bucket_candidates(
        *map(jnp.float32, (x_bd, w_ld, bias_l)),
        choice.n_buckets,
        choice.kept,
        latent_tile=128,
        interpret=pltpu.InterpretParams(uninitialized_memory="zero"),
    )
    expected = _choose(x_bd @ w_ld.T + bias_l, choice.n_buckets, choice.kept)
    np.testing.assert_array_equal(values, expected[0])
    np.testing.assert_array_equal(indices, expected[1])


@pytest.mark.parametrize("platform", PLATFORMS)
def test_bfloat16_factors_are_summed_in_float32(platform):
    rng = np.random.default_rng(0)
    x_bd, w_ld = rng.normal(size=(8, 512)), rng.normal(size=(128, 512))
    x_bd, w_ld = jnp.bfloat16(x_bd), jnp.bfloat16(w_ld)
    values, _ = PLATFORMS[platform].bucket_candidates(
        x_bd, w_ld, jnp.zeros(128), 128, 1, interpret=True
    )
    expected = np.float64(x_bd) @ np.float64(w_ld).T
    np.testing.assert_allclose(values, expected, atol=1e-4)


@pytest.mark.parametrize("rows, width, latents, k", [(5, 16, 30, 1), (19, 300, 40, 13)])
def test_decode_and_sampled_product(call, rows, width, latents, k):
    rng = np.random.default_rng(k)
    x_bd, w_ld = rng.normal(size=(rows, width)), rng.normal(size=(latents, width))
    values_bk = rng.normal(size=(rows, k))
    indices_bk = rng.integers(0, latents, (rows, k))  # a row may hold one twice
    indices_bk[:, 0] = latents - 1
    x, w, values = map(jnp.float32, (x_bd, w_ld, values_bk))
    indices = jnp.int32(indices_bk)
    recon = call("decode", values, indices, w, row_tile=8)
    products = call("sampled_product", x, w, indices, row_tile=8)
    chosen_bkd = w_ld[indices_bk]
    expected_recon = np.einsum("bk,bkd->bd", values_bk, chosen_bkd)
    expected_products = np.einsum("bd,bkd->bk", x_bd, chosen_bkd)
    assert recon.dtype == products.dtype == jnp.float32
    np.testing.assert_allclose(recon, expected_recon, atol=2e-5)
    np.testing.assert_allclose(products, expected_products, atol=1e-4)


OWNERS = {
    "entries of random latents": lambda rng: rng.integers(0, 500, 2500),
    "one latent owns everything": lambda rng: np.full(3000, 499),
    "few latents own much": lambda rng: rng.integers(0, 5, 2048) * 70 + 20,
    "fewer entries than latents": lambda rng: rng.integers(0, 300, 7),
}


@pytest.mark.parametrize("draw", OWNERS.values(), ids=OWNERS.keys())
def test_segments_are_summed_over_their_entries(call, draw):
    rng = np.random.default_rng(0)
    latents_n = np.sort(draw(rng))
    _check_segments(call, rng, latents_n, 500, slice(None))


def test_entries_of_other_shards_are_left_out(call):
    """A shard of the latents may be given all entries: its own are in the middle."""
    rng = np.random.default_rng(0)
    latents_n = np.sort(rng.integers(0, 600, 5000))
    _check_segments(call, rng, latents_n, 600, slice(200, 400))


def _check_segments(call, rng, latents_n, n_latents, own):
    values_n = rng.normal(size=latents_n.size)
    rows_n = rng.integers(0, 9, latents_n.size)
    g_bd = rng.normal(size=(9, 130))
    starts_l = np.searchsorted(latents_n, np.arange(n_latents + 1))
    expected_ld = np.zeros((n_latents, 130))
    np.add.at(expected_ld, latents_n, values_n[:, None] * g_bd[rows_n])
    ends_l = starts_l[1:][own]
    sums_ld = call(
        "segment_outer",
        jnp.float32(values_n),
        jnp.int32(rows_n),
        jnp.int32(np.append(starts_l[:-1][own], ends_l[-1])),
        jnp.float32(g_bd),
        latent_tile=128,
        width_tile=128,
    )
    assert sums_ld.dtype == jnp.float32
    np.testing.assert_allclose(sums_ld, expected_ld[own], atol=1e-3)


@pytest.mark.slow
def test_a_tpu_reads_no_copy_before_it_has_arrived(capfd):
    """Copies are made as late as they may be, into memory that is NaN until then."""
    races = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait")
    rng = np.random.default_rng(0)
    x_bd, w_ld, g_bd = (jnp.float32(rng.normal(size=(n, 8))) for n in (20, 30, 20))
    values_bk = jnp.float32(rng.normal(size=(20, 11)))
    indices_bk = jnp.int32(rng.integers(0, 30, (20, 11)))
    values_n = jnp.float32(rng.normal(size=2100))
    rows_n = jnp.int32(rng.integers(0, 20, 2100))
    starts_l = jnp.int32([0, 1, 500, 500, 1500, 2050, 2100])
    for name, *args in [
        ("decode", values_bk, indices_bk, w_ld),
        ("sampled_product", x_bd, w_ld, indices_bk),
        ("segment_outer", values_n, rows_n, starts_l, g_bd),
    ]:
        ours = getattr(tpu, name)(*args, interpret=races)
        np.testing.assert_allclose(ours, getattr(reference, name)(*args), atol=1e-4)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("platform", PLATFORMS)
def test_shards_give_what_the_whole_gives(platform):
    mesh = make_mesh(MeshConfig(2, 2))
    x_bd, w_ld, bias_l = map(jnp.float32, _integers(Choice(6, 8, 256, 128, 1)))
    own = functools.partial(
        PLATFORMS[platform].bucket_candidates, n_buckets=128, kept=1, interpret=True
    )
    rows, latents = P("data", None), P("latent", None)
    values, indices = jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(rows, latents, P("latent")),
        out_specs=P("data", "latent"),
        check_vma=False,
    )(x_bd, w_ld, bias_l)
    np.testing.assert_array_equal(values, x_bd @ w_ld.T + bias_l)
    np.testing.assert_array_equal(indices, np.tile(np.arange(128), (6, 2)))


@pytest.mark.parametrize(
    "arguments, fault",
    [
        ({"n_buckets": 100}, "n_buckets is 100"),
        ({"n_buckets": 0}, "n_buckets is 0"),
        ({"kept": 0}, "kept is 0"),
        ({"kept": 5}, "kept is 5"),
        ({"w_ld": jnp.zeros((300, 8), jnp.bfloat16)}, "bfloat16"),
        ({"w_ld": jnp.zeros((300, 9))}, "do not fit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_arguments_that_do_not_fit_are_refused(platform, arguments, fault):
    x_bd, w_ld, bias_l = jnp.zeros((4, 8)), jnp.zeros((300, 8)), jnp.zeros(300)
    fitting = dict(x_bd=x_bd, w_ld=w_ld, bias_l=bias_l, n_buckets=128, kept=1)
    with pytest.raises(ValueError, match=fault):
        PLATFORMS[platform].bucket_candidates(**fitting | arguments)


def test_a_tpu_copies_rows_of_float32_alone():
    indices_bk, w_ld = jnp.zeros((2, 1), jnp.int32), jnp.zeros((4, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match="bfloat16: cast it to float32"):
        tpu.decode(jnp.zeros((2, 1)), indices_bk, w_ld)


def test_kernels_are_found_by_platform_alone(monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda *args: warnings.append(args))
    kernels._tell_plain.cache_clear()
    kernels.find.cache_clear()
    assert kernels.find("tpu").decode.args == (tpu.decode,)
    assert kernels.find("gpu").segment_outer.args == (gpu.segment_outer,)
    assert not warnings
    for _ in range(2):
        assert kernels.find("METAL") is None
    assert len(warnings) == 1 and "'METAL'" in warnings[0][1]


@pytest.mark.parametrize(
    ("platform", "name", "arguments", "why"),
    [
        ("tpu", "decode", (((2, 1), "f4"), ((2, 1), "i4"), ((4, 8), "f2")), "float16"),
        (
            "tpu",
            "segment_outer",
            (((9,), "f4"), ((9,), "i4"), ((5,), "i4"), ((90000, 8), "f4")),
            "90000 rows do not fit",
        ),
        (
            "tpu",
            "bucket_candidates",
            (((8, 2**18), "f4"), ((256, 2**18), "f4"), ((256,), "f4")),
            "do not fit in VMEM",
        ),
        (
            "gpu",
            "bucket_candidates",
            (((4, 8), "f4"), ((300, 8), "f4"), ((300,), "f4")),
            "choose a power of two",
        ),
    ],
)
def test_what_a_kernel_refuses_is_plain_jaxs_and_told_once(
    monkeypatch, platform, name, arguments, why
):
    warnings = []
    monkeypatch.setattr(
        logging, "warning", lambda text, *args: warnings.append(text % args)
    )
    kernels._tell_plain.cache_clear()
    kernel = getattr(kernels.find(platform), name)
    if name == "bucket_candidates":
        n_buckets = 128 if platform == "tpu" else 100
        kernel = functools.partial(kernel, n_buckets=n_buckets, kept=1)
    for _ in range(2):
        given = [jax.ShapeDtypeStruct(*argument) for argument in arguments]
        assert jax.eval_shape(kernel, *given) is None
    assert len(warnings) == 1
    assert name in warnings[0] and why in warnings[0]


def test_a_fault_of_the_caller_is_no_refusal():
    kernel = kernels.find("gpu", interpret=True).bucket_candidates
    with pytest.raises(ValueError, match="do not fit"):
        kernel(jnp.zeros((4, 8)), jnp.zeros((300, 9)), jnp.zeros(300), 128, 1)


def _integers(choice):
    rng = np.random.default_rng(choice.latents)
    shapes = (choice.rows, choice.width), (choice.latents, choice.width)
    return [rng.integers(-3, 4, shape) for shape in (*shapes, choice.latents)]


def _choose(pre_bl, n_buckets, kept):
    """What bucket_candidates gives, bucket by bucket."""
    shape = len(pre_bl), kept, n_buckets
    values, indices = np.full(shape, -np.inf), np.zeros(shape, int)
    for bucket in range(min(n_buckets, pre_bl.shape[1])):
        own_bl = pre_bl[:, bucket::n_buckets]
        order = np.argsort(-own_bl, axis=1, kind="stable")[:, :kept]
        levels = slice(order.shape[1])
        values[:, levels, bucket] = np.take_along_axis(own_bl, order, axis=1)
        indices[:, levels, bucket] = bucket + n_buckets * order
    indices[values == -np.inf] = 0
    return values.reshape(len(pre_bl), -1), indices.reshape(len(pre_bl), -1)
