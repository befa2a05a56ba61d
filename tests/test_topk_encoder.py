"""Encoder and choice in one pass against sorting, for every method, and its gradient.

With the identity for an encoder, rows are pre-activations: any can be written down.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from compare import QUICK_TO_COMPILE

from sae_jax import kernels, topk
from sae_jax.topk import Choice

B, L, K = 11, 100, 5
BUCKETS = {"n_buckets": 8, "kept": 2}

# Small tiles, so that there are several of rows and of latents.
_SORTED = Choice("exact", K, 0, 0, 4, 24, L, recall_target=0.9, recall=1.0)


def _choice(method="exact", **fields) -> Choice:
    return dataclasses.replace(_SORTED, method=method, **fields)


CHOICES = {
    "proven": _choice(**BUCKETS),
    "bucketed": _choice("bucketed", **BUCKETS),
    "sorted": _choice(),
    "approx": _choice("approx"),
}
EXACT = ["proven", "sorted", "approx"]  # `approx` is, on a CPU
KINDS = [
    "distinct",
    "ties",
    "all equal",
    "all negative",
    "one bucket wins",
    "the last tile wins",
]

every_method = pytest.mark.parametrize("name", CHOICES)
every_exact_method = pytest.mark.parametrize("name", EXACT)


def _pre(kind: str, shape=(B, L)) -> np.ndarray:
    """Pre-activations, all of them whole numbers."""
    rng, (n_rows, n_latents) = np.random.default_rng(0), shape
    places_l = np.arange(n_latents)
    distinct_bl = rng.permuted(np.tile(places_l, (n_rows, 1)), axis=1)
    pre_bl = {
        "distinct": distinct_bl - n_latents // 2,
        "ties": rng.integers(-2, 3, size=shape),
        "all equal": np.ones(shape),
        "all negative": distinct_bl - n_latents,
        "one bucket wins": distinct_bl + n_latents * (places_l % 8 == 3),
        "the last tile wins": places_l,
    }[kind]
    return np.float32(np.broadcast_to(pre_bl, shape))


@functools.cache
def _compiled(choice: Choice, own: kernels.Kernels | None = None):
    return jax.jit(
        lambda x, w, bias: topk.encode(x, w, bias, choice, jnp.float32, own),
        compiler_options=QUICK_TO_COMPILE,
    )


def _encode(choice: Choice, x_bd, bias_l=None):
    """Values, columns, and how many rows were chosen for again."""
    d_model = x_bd.shape[1]
    bias_l = np.zeros(d_model) if bias_l is None else bias_l
    factors = np.eye(d_model, dtype=np.float32), np.float32(bias_l)
    values_bk, columns_bk, n_resorted = _compiled(choice)(x_bd, *factors)
    assert values_bk.shape == columns_bk.shape == (len(x_bd), choice.k)
    assert columns_bk.dtype == n_resorted.dtype == jnp.int32
    return np.asarray(values_bk), np.asarray(columns_bk), int(n_resorted)


def _check_exact(choice: Choice, x_bd, bias_l=None) -> int:
    """The oracle's choice in its order; how many rows were chosen for again."""
    pre_bl = x_bd if bias_l is None else x_bd + bias_l
    values_bk, columns_bk, n_resorted = _encode(choice, x_bd, bias_l)
    want_bk = np.array(oracle.choose(pre_bl, choice.k))
    np.testing.assert_array_equal(columns_bk, want_bk)
    np.testing.assert_array_equal(values_bk, np.take_along_axis(pre_bl, want_bk, 1))
    return n_resorted


def _check_code(values_bk, columns_bk, pre_bl) -> None:
    """What any choice promises: falling, distinct, in range, and true."""
    assert (np.diff(values_bk) <= 0).all()
    assert all(len(set(columns_k)) == len(columns_k) for columns_k in columns_bk)
    assert (0 <= columns_bk).all() and (columns_bk < pre_bl.shape[1]).all()
    np.testing.assert_array_equal(values_bk, np.take_along_axis(pre_bl, columns_bk, 1))


# Exact methods ------------------------------------------------------------------------


@every_exact_method
@pytest.mark.parametrize("kind", KINDS)
def test_the_choice_is_the_oracles_and_in_its_order(name, kind):
    _check_exact(CHOICES[name], _pre(kind))


@every_exact_method
def test_latents_that_are_ruled_out_come_last(name):
    """A bias of -inf: the few others are chosen, then the lowest of those."""
    bias_l = np.where(np.arange(L) % 33 == 7, 0, -np.inf)
    _check_exact(CHOICES[name], _pre("ties"), bias_l)


@pytest.mark.parametrize("kind", ["distinct", "ties"])
@pytest.mark.parametrize(
    ("n_rows", "n_latents", "fields"),
    [
        (1, 100, BUCKETS),
        (8, 96, BUCKETS),  # whole tiles of both
        (3, 24, BUCKETS),  # one tile
        (6, 31, BUCKETS),  # almost all of the last tile has been seen
        (5, 31, BUCKETS | {"k": 16}),  # as many as the buckets hold
        (4, 31, {"k": 8, "tile_latents": 8, "n_buckets": 8, "kept": 1}),
        (4, 1, {"k": 1, "tile_latents": 1, "n_buckets": 1, "kept": 1}),
        (4, 1, {"k": 1, "tile_latents": 1}),
        (5, 96, {}),
        (4, 30, {"k": 24}),  # as many as a tile has
        (4, 30, {"k": 30, "tile_latents": 30}),
    ],
)
def test_rows_and_latents_of_any_number(n_rows, n_latents, fields, kind):
    choice = _choice(n_latents=n_latents, **fields)
    _check_exact(choice, _pre(kind, (n_rows, n_latents)))


@pytest.mark.parametrize(
    ("k", "n_latents"), [(1, 1), (20, 20), (600, 1024), (1024, 1024), (2200, 4200)]
)
def test_a_k_that_buckets_do_not_pay_for_is_sorted(k, n_latents):
    choice = topk.plan(k, n_latents)
    assert choice.n_buckets == 0
    rng = np.random.default_rng(0)
    x_bd = np.float32(rng.integers(-9, 10, (3, 4)))
    w_ld = np.float32(rng.integers(-9, 10, (n_latents, 4)))
    values_bk, columns_bk, _ = _compiled(choice)(x_bd, w_ld, np.zeros(n_latents))
    want_bk = np.array(oracle.choose(x_bd @ w_ld.T, k))
    np.testing.assert_array_equal(columns_bk, want_bk)
    want_values_bk = np.take_along_axis(x_bd @ w_ld.T, want_bk, 1)
    np.testing.assert_array_equal(values_bk, want_values_bk)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_rows_are_chosen_for_again_where_a_bucket_has_too_many_winners(kept):
    """And in no other, if no two values are equal."""
    choice = _choice(n_buckets=8, kept=kept, n_latents=104)
    pre_bl = _pre("distinct", (200, 104))
    buckets_bk = np.array(oracle.choose(pre_bl, K)) % 8
    winners_bn = (buckets_bk[:, :, None] == np.arange(8)).sum(axis=1)
    n_crowded = (winners_bn.max(axis=1) > kept).sum()
    assert 0 < n_crowded < 200
    assert _check_exact(choice, pre_bl) == n_crowded


def test_rows_are_chosen_for_again_where_values_are_equal():
    """Also where the K-th is equal to the next; further down it does not matter."""
    pre_bl = np.tile(np.arange(L, 0, -1, np.float32), (B, 1))
    pre_bl[3, 1] = pre_bl[3, 0]
    pre_bl[6, K] = pre_bl[6, K - 1]
    pre_bl[9, K + 1] = pre_bl[9, K]
    assert _check_exact(CHOICES["proven"], pre_bl) == 2
    assert _check_exact(CHOICES["proven"], _pre("all equal")) == B
    assert _check_exact(CHOICES["sorted"], _pre("all equal")) == 0


def test_a_row_is_chosen_for_again_where_what_a_bucket_lost_is_equal_to_the_last():
    """Latent 16 is the third of its bucket, and before its equal of another one."""
    pre_bl = np.tile(-np.arange(L, dtype=np.float32), (B, 1))
    pre_bl[4, [0, 8, 1, 2, 16, 31]] = 9, 8, 7, 6, 5, 5
    assert _check_exact(CHOICES["proven"], pre_bl) == 1


@pytest.mark.parametrize("n_again", [0, 1, 2, 3, 77, 130])
def test_few_and_many_rows_are_chosen_for_again(n_again):
    """Of 130 rows, up to 130 / 64 = 2 by themselves; beyond, all of them."""
    choice = _choice(**BUCKETS, n_latents=104, tile_rows=50)
    pre_bl = _pre("distinct", (130, 104))
    pre_bl[:, 40 : 40 + K] += 200  # neighbours: in buckets of their own
    rows = np.random.default_rng(1).permutation(130)[:n_again]
    pre_bl[rows, 3::8] += 500
    assert _check_exact(choice, pre_bl) == n_again


# Buckets alone ------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("n_latents", [96, 104])
def test_buckets_keep_their_best_by_latent_modulo_buckets(kept, n_latents):
    choice = _choice("bucketed", n_buckets=8, kept=kept, n_latents=n_latents)
    pre_bl = _pre("distinct", (B, n_latents))
    by_bucket = pre_bl.reshape(B, -1, 8)
    held_bl = by_bucket >= -np.sort(-by_bucket, axis=1)[:, kept - 1 : kept]
    ranked_bl = np.where(held_bl.reshape(B, -1), pre_bl, -np.inf)
    want_bk = np.array(oracle.choose(ranked_bl, K))
    values_bk, columns_bk, n_resorted = _encode(choice, pre_bl)
    np.testing.assert_array_equal(columns_bk, want_bk)
    np.testing.assert_array_equal(values_bk, np.take_along_axis(pre_bl, want_bk, 1))
    assert n_resorted == 0
    assert (want_bk != np.array(oracle.choose(pre_bl, K))).any()  # or it tells nothing


@pytest.mark.parametrize("n_latents", [24, 31, L, 104])
@pytest.mark.parametrize("kind", KINDS)
def test_a_code_of_buckets_alone_is_true(kind, n_latents):
    """Distinct latents with the values they have, the largest of all among them."""
    choice = dataclasses.replace(CHOICES["bucketed"], n_latents=n_latents)
    pre_bl = _pre(kind, (B, n_latents))
    values_bk, columns_bk, _ = _encode(choice, pre_bl)
    _check_code(values_bk, columns_bk, pre_bl)
    np.testing.assert_array_equal(values_bk[:, 0], pre_bl.max(axis=1))


def test_the_earlier_of_equals_stays_in_a_bucket():
    choice = dataclasses.replace(CHOICES["bucketed"], k=16)  # all that is kept
    _, columns_bk, _ = _encode(choice, _pre("all equal"))
    np.testing.assert_array_equal(columns_bk, np.tile(np.arange(16), (B, 1)))


def _recall(columns_bk, pre_bl) -> float:
    k = columns_bk.shape[1]
    least_b1 = -np.partition(-pre_bl, k - 1, axis=1)[:, k - 1 : k]
    return float((np.take_along_axis(pre_bl, columns_bk, 1) >= least_b1).mean())


@pytest.mark.parametrize(
    ("k", "n_latents", "target"),
    [(32, 1024, 0.8), (32, 2048, 0.95), (16, 2048, 0.99), (60, 2500, 0.95)],
)
def test_measured_recall_is_the_expected_one(k, n_latents, target):
    choice = topk.plan(k, n_latents, method="bucketed", recall_target=target)
    assert choice.n_buckets and target <= choice.recall < 1
    rng = np.random.default_rng(0)
    pre_bl = rng.random((2**22 // n_latents, n_latents), np.float32)
    _, columns_bk, _ = _encode(choice, pre_bl)
    assert _recall(columns_bk, pre_bl) == pytest.approx(choice.recall, abs=2e-3)


@pytest.mark.parametrize("order", ["neighbours win", "the first win"])
def test_latents_in_an_order_of_their_own_are_found_as_well(order):
    """Strided buckets lose no more than expected; contiguous ones would."""
    choice = topk.plan(32, 1024, method="bucketed", recall_target=0.8)
    rng, places_l = np.random.default_rng(0), np.arange(1024)
    pre_bl = rng.random((1024, 1024), np.float32)
    if order == "neighbours win":
        centres_b1 = rng.integers(0, 1024, (1024, 1))
        pre_bl -= np.abs(places_l - centres_b1)
    else:
        pre_bl -= places_l >= 256
    _, columns_bk, _ = _encode(choice, pre_bl)
    assert _recall(columns_bk, pre_bl) > choice.recall - 2e-3
    by_bucket = -np.sort(-pre_bl.reshape(1024, choice.n_buckets, -1), axis=2)
    found_bn = by_bucket[:, :, : choice.kept].reshape(1024, -1)
    least_b1 = -np.sort(-pre_bl, axis=1)[:, 31:32]
    assert (found_bn >= least_b1).sum() / (32 * 1024) < choice.recall - 0.05


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_kernels_keep_the_best_of_each_bucket(platform):
    """Of rows in tiles that are not whole, one of them NaN; the last group is not."""
    own, n_latents = kernels.find(platform, interpret=True), 1100
    choice = _choice("bucketed", k=60, n_buckets=128, kept=2, n_latents=n_latents)
    rng = np.random.default_rng(0)
    x_bd = np.float32(rng.integers(-9, 10, (B, 3)))
    x_bd[4, 1] = np.nan
    w_ld = np.float32(rng.integers(-9, 10, (n_latents, 3)))
    bias_l = np.float32(rng.permutation(n_latents) / n_latents)  # no two are equal
    values_bk, columns_bk, n_resorted = _compiled(choice, own)(x_bd, w_ld, bias_l)
    assert np.isnan(values_bk[4]).all()
    pre_bl = np.delete(x_bd, 4, axis=0) @ w_ld.T + bias_l
    filled_bl = np.pad(pre_bl, ((0, 0), (0, -n_latents % 128)), constant_values=-1e9)
    by_bucket = filled_bl.reshape(B - 1, -1, 128)
    is_held = by_bucket >= -np.sort(-by_bucket, axis=1)[:, 1:2]
    held_bl = is_held.reshape(B - 1, -1)[:, :n_latents]
    want_bk = np.array(oracle.choose(np.where(held_bl, pre_bl, -np.inf), 60))
    found_bk = np.delete(columns_bk, 4, axis=0)
    np.testing.assert_array_equal(found_bk, want_bk)
    want_values_bk = np.take_along_axis(pre_bl, want_bk, 1)
    np.testing.assert_array_equal(np.delete(values_bk, 4, axis=0), want_values_bk)
    assert (0 <= columns_bk).all() and (columns_bk < n_latents).all()
    assert n_resorted == 0


# All methods --------------------------------------------------------------------------


@every_method
def test_rows_that_are_not_finite_show_it_and_leave_the_others_alone(name):
    x_bd = _pre("distinct")
    want_values_bk, want_columns_bk, _ = _encode(CHOICES[name], x_bd)
    bad = {0: np.nan, 5: np.inf, 10: -np.inf}
    for row, value in bad.items():
        x_bd[row, 3 * row] = value
    x_bd[7, :2] = np.inf, -np.inf
    values_bk, columns_bk, _ = _encode(CHOICES[name], x_bd)
    is_bad_b = np.isin(np.arange(B), [*bad, 7])
    assert np.isnan(values_bk[is_bad_b]).all()
    np.testing.assert_array_equal(values_bk[~is_bad_b], want_values_bk[~is_bad_b])
    np.testing.assert_array_equal(columns_bk[~is_bad_b], want_columns_bk[~is_bad_b])
    assert (0 <= columns_bk).all() and (columns_bk < L).all()


@every_exact_method
def test_a_latent_that_is_not_a_number_is_shown(name):
    """It comes first, as the largest."""
    bias_l = np.where(np.arange(L) == 60, np.nan, 0)
    values_bk, columns_bk, _ = _encode(CHOICES[name], _pre("distinct"), bias_l)
    assert np.isnan(values_bk[:, 0]).all() and (columns_bk[:, 0] == 60).all()


@every_method
def test_values_and_gradients_are_those_of_the_dense_product(x64, name):
    rng = np.random.default_rng(0)
    x_bd, w_ld = rng.normal(size=(B, 6)), rng.normal(size=(L, 6))
    bias_l, g_bk = rng.normal(size=L), rng.normal(size=(B, K))
    g_bk[:, 2] = 0

    @functools.partial(jax.jit, compiler_options=QUICK_TO_COMPILE)
    def differentiate(g_bk, *factors):
        def values(*factors):
            code = topk.encode(*factors, CHOICES[name], jnp.float64)
            return code[0], code[1]

        values_bk, pull, columns_bk = jax.vjp(values, *factors, has_aux=True)
        return values_bk, columns_bk, pull(g_bk)

    values_bk, columns_bk, got = differentiate(g_bk, x_bd, w_ld, bias_l)
    pre_bl = x_bd @ w_ld.T + bias_l
    want_bk = np.take_along_axis(pre_bl, np.asarray(columns_bk), 1)
    np.testing.assert_allclose(values_bk, want_bk, rtol=1e-12)
    if name in EXACT:
        np.testing.assert_array_equal(columns_bk, oracle.choose(pre_bl, K))
    g_bl = np.zeros((B, L))
    np.put_along_axis(g_bl, np.asarray(columns_bk), g_bk, axis=1)
    for found, want in zip(got, (g_bl @ w_ld, g_bl.T @ x_bd, g_bl.sum(0))):
        np.testing.assert_allclose(found, want, rtol=1e-10, atol=1e-12)


@every_method
def test_bfloat16_factors_are_multiplied_in_float32(name):
    rng = np.random.default_rng(0)
    x_bd, w_ld = (np.float32(rng.normal(size=(n, 48))) for n in (B, L))
    encode = jax.jit(
        lambda *factors: topk.encode(*factors, CHOICES[name], jnp.bfloat16),
        compiler_options=QUICK_TO_COMPILE,
    )
    values_bk, columns_bk, _ = encode(x_bd, w_ld, np.zeros(L, np.float32))
    x_bd, w_ld = (np.float64(jnp.bfloat16(a)) for a in (x_bd, w_ld))
    want_bk = np.take_along_axis(x_bd @ w_ld.T, np.asarray(columns_bk), 1)
    assert values_bk.dtype == jnp.float32
    np.testing.assert_allclose(values_bk, want_bk, rtol=1e-5)


def _abstract(n_rows: int, d_model: int, n_latents: int):
    shapes = (n_rows, d_model), (n_latents, d_model), (n_latents,)
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def _gradients(choice: Choice):
    return jax.grad(
        lambda *factors: jnp.sum(topk.encode(*factors, choice, jnp.float32)[0]),
        argnums=(0, 1, 2),
    )


@pytest.mark.parametrize("method", ["exact", "bucketed", "approx"])
def test_the_pre_activations_of_a_batch_are_never_held(method):
    n_rows, n_latents = 4096, 2**16
    choice = topk.plan(32, n_latents, method=method)
    assert bool(choice.n_buckets) == (method != "approx")
    lowered = jax.jit(_gradients(choice)).lower(*_abstract(n_rows, 16, n_latents))
    held = lowered.compile(QUICK_TO_COMPILE).memory_analysis().temp_size_in_bytes
    assert held < 4 * n_rows * n_latents / 16


@pytest.mark.parametrize("method", ["exact", "bucketed", "approx"])
def test_weights_of_more_than_2_to_the_31_elements(method):
    """Shapes, types and the traced program alone: the weights have 2**32 elements."""
    n_rows, d_model, n_latents = 8, 2048, 2**21
    choice = topk.plan(64, n_latents, method=method)
    abstract = _abstract(n_rows, d_model, n_latents)
    for function, want in (
        (functools.partial(topk.encode, choice=choice, dtype=jnp.float32), None),
        (_gradients(choice), [array.shape for array in abstract]),
    ):
        traced = jax.jit(function).trace(*abstract)
        traced.lower()
        found = [array.shape for array in jax.tree.leaves(traced.out_info)]
        assert found == (want or [(n_rows, 64), (n_rows, 64), ()])
        # Arrays of weights are as wide as these.
        shapes = re.findall(r"\w+\[([\d,]+)\]", str(traced.jaxpr))
        others = [s for s in shapes if str(d_model) not in s.split(",")]
        most = max(np.prod([int(n) for n in s.split(",")]) for s in others)
        assert n_latents <= most < n_rows * n_latents
