"""Products with a code of few non-zeros per row, and their gradients.

    decode       x̂_bd = sum_k values_bk * w_ld[indices_bk]         dense x sparse
    multiply_at  pre_bk = x_bd . w_ld[indices_bk] + bias           at sparse indices
    outer_sum    g_ld = sum over (b, k) with indices_bk = l of values_bk * x_bd

Each is the gradient of another: of decode, multiply_at gives the values' and outer_sum
the weights'; of multiply_at, decode gives the rows' and outer_sum the weights'. So a
step costs O(B K D) beside the encoder's matmul (Gao et al. 2024, appendix D). Nothing
of size [B, L] or [B K, D] is ever held.

A slot whose value is 0 is unused: it adds nothing and gets no gradient. Columns behind
the last that any row uses cost nothing, which is what makes a latent shard's share of a
code cheap: it holds few of the K winners of each row, and its candidates descend.

Rows of D are rounded to `dtype`; values are not. Sums are kept in float32 (float64
where the rows are).

With a platform's own `kernels` (`sae_jax.kernels`) slots are summed in a fixed order:
the same bits on every run, on a GPU too, where `.at[].add` adds in any order. Kernels
read w as it is, not rounded to `dtype`. What one of them refuses is plain JAX's.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from sae_jax.kernels import Kernels

_COLUMNS = 4  # of a code, taken in one pass over rows of D
_CHUNK_SIZE = 2**21  # elements of the gathered rows that are added to weights at once


def to_dense(values_bk: jax.Array, indices_bk: jax.Array, n_latents: int) -> jax.Array:
    """The code as [..., L]: each value at its index, zero elsewhere."""
    *batch, k = values_bk.shape
    values = values_bk.reshape(-1, k)
    rows_b1 = jnp.arange(values.shape[0])[:, None]
    dense = (
        jnp.zeros((values.shape[0], n_latents), values.dtype)
        .at[rows_b1, indices_bk.reshape(-1, k)]
        .add(values)
    )
    return dense.reshape(*batch, n_latents)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def decode(
    values_bk: jax.Array,
    indices_bk: jax.Array,
    w_ld: jax.Array,
    dtype: DTypeLike,
    kernels: Kernels | None = None,
) -> jax.Array:
    """Rows [B, D]: the weighted sum of the chosen rows of w.

    Inside `jax.shard_map` all must vary over the same mesh axes.
    """
    return _decode(values_bk, indices_bk, w_ld, dtype, kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def multiply_at(
    pre_bk: jax.Array,
    indices_bk: jax.Array,
    x_bd: jax.Array,
    w_ld: jax.Array,
    bias_l: jax.Array,
    dtype: DTypeLike,
    kernels: Kernels | None = None,
) -> jax.Array:
    """pre_bk, known to be x_bd . w_ld[indices_bk] + bias_l[indices_bk]: its gradient.

    The products come out of a dense matmul, before it is known which are wanted; this
    function hands them on, and has the sparse gradient.
    """
    return pre_bk


def outer_sum(
    values_bk: jax.Array,
    indices_bk: jax.Array,
    x_bd: jax.Array,
    n_latents: int,
    dtype: DTypeLike,
    kernels: Kernels | None = None,
) -> jax.Array:
    """Sums [L, D] of value times row over the slots of each latent.

    Slots are sorted by latent and added in that order: the same bits on every run where
    the device adds in order, and a latent's sum stays in cache while it grows.
    """
    k = values_bk.shape[1]
    values_n = values_bk.reshape(-1)
    keys_n, order_n = _sort_slots(values_bk, indices_bk, n_latents)
    x_bd = x_bd.astype(dtype)
    if kernels:
        starts_l = jnp.searchsorted(keys_n, lax.iota(jnp.int32, n_latents + 1))
        own_ld = kernels.segment_outer(
            values_n[order_n], order_n // k, starts_l.astype(jnp.int32), x_bd
        )
        if own_ld is not None:
            return own_ld
    chunk = max(1, min(keys_n.size, _CHUNK_SIZE // x_bd.shape[1]))
    missing = -keys_n.size % chunk
    keys_n = jnp.pad(keys_n, (0, missing), constant_values=n_latents)
    order_n = jnp.pad(order_n, (0, missing))

    def add(i: jax.Array, sum_ld: jax.Array) -> jax.Array:
        latents = lax.dynamic_slice(keys_n, (i * chunk,), (chunk,))
        slots = lax.dynamic_slice(order_n, (i * chunk,), (chunk,))
        rows = _scale(values_n[slots], x_bd[slots // k], sum_ld.dtype)
        return sum_ld.at[latents].add(rows, indices_are_sorted=True, mode="drop")

    n_chunks = -(-jnp.sum(values_n != 0, dtype=jnp.int32) // chunk)
    zeros_ld = _zeros(values_n, n_latents, x_bd.shape[1])
    # Zeros that XLA cannot take for those of another sum: it would make one array of
    # them, and then a copy for each.
    zeros_ld += jnp.minimum(n_chunks, 0).astype(zeros_ld.dtype)
    return lax.fori_loop(0, n_chunks, add, zeros_ld)


def _sort_slots(
    values_bk: jax.Array, indices_bk: jax.Array, n_latents: int
) -> tuple[jax.Array, jax.Array]:
    """The latents of all slots [N] in rising order, and which slot of B K each is.

    Unused slots go to the end, behind the last latent.
    """
    is_used_n = values_bk.reshape(-1) != 0
    latents_n = jnp.where(is_used_n, indices_bk.reshape(-1), n_latents)
    return lax.sort_key_val(latents_n, lax.iota(jnp.int32, latents_n.size))


def _decode(
    values_bk: jax.Array,
    indices_bk: jax.Array,
    w_ld: jax.Array,
    dtype: DTypeLike,
    kernels: Kernels | None,
) -> jax.Array:
    if kernels:
        own_bd = kernels.decode(values_bk, indices_bk, w_ld)
        if own_bd is not None:
            return own_bd
    w_ld = w_ld.astype(dtype)
    values_pcb, indices_pcb = _passes(values_bk), _passes(indices_bk)

    def add(i: jax.Array, sum_bd: jax.Array) -> jax.Array:
        for values_b, indices_b in zip(values_pcb[i], indices_pcb[i]):
            sum_bd += _scale(values_b, w_ld[indices_b], sum_bd.dtype)
        return sum_bd

    zeros_bd = _zeros(values_bk, values_bk.shape[0], w_ld.shape[1])
    return lax.fori_loop(0, _n_passes(values_bk), add, zeros_bd)


def _multiply_at(
    values_bk: jax.Array,
    indices_bk: jax.Array,
    x_bd: jax.Array,
    w_ld: jax.Array,
    dtype: DTypeLike,
    kernels: Kernels | None,
) -> jax.Array:
    """x_bd . w_ld[indices_bk] where the value is not 0, else 0: [B, K]."""
    x_bd = x_bd.astype(dtype)
    if kernels:
        own_bk = kernels.sampled_product(x_bd, w_ld, indices_bk)
        if own_bk is not None:
            return jnp.where(values_bk != 0, own_bk, 0)
    w_ld = w_ld.astype(dtype)
    indices_pcb = _passes(indices_bk)

    def fill(i: jax.Array, h_pcb: jax.Array) -> jax.Array:
        products = [
            jnp.sum(x_bd.astype(h_pcb.dtype) * w_ld[indices_b].astype(h_pcb.dtype), 1)
            for indices_b in indices_pcb[i]
        ]
        return h_pcb.at[i].set(jnp.stack(products))

    h_pcb = _zeros(values_bk, *indices_pcb.shape)
    h_pcb = lax.fori_loop(0, _n_passes(values_bk), fill, h_pcb)
    h_bk = h_pcb.reshape(-1, values_bk.shape[0]).T[:, : values_bk.shape[1]]
    return jnp.where(values_bk != 0, h_bk, 0)


def _decode_forward(
    values_bk: jax.Array,
    indices_bk: jax.Array,
    w_ld: jax.Array,
    dtype: DTypeLike,
    kernels: Kernels | None,
) -> tuple[jax.Array, Any]:
    recon_bd = decode(values_bk, indices_bk, w_ld, dtype, kernels)
    return recon_bd, (values_bk, indices_bk, w_ld)


def _decode_backward(
    dtype: DTypeLike, kernels: Kernels | None, saved: Any, g_bd: jax.Array
) -> tuple:
    values_bk, indices_bk, w_ld = saved
    g_values_bk = _multiply_at(values_bk, indices_bk, g_bd, w_ld, dtype, kernels)
    g_w_ld = outer_sum(values_bk, indices_bk, g_bd, w_ld.shape[0], dtype, kernels)
    return g_values_bk.astype(values_bk.dtype), None, g_w_ld.astype(w_ld.dtype)


def _multiply_at_forward(
    pre_bk: jax.Array,
    indices_bk: jax.Array,
    x_bd: jax.Array,
    w_ld: jax.Array,
    bias_l: jax.Array,
    dtype: DTypeLike,
    kernels: Kernels | None,
) -> tuple[jax.Array, Any]:
    return pre_bk, (indices_bk, x_bd, w_ld, bias_l)


def _multiply_at_backward(
    dtype: DTypeLike, kernels: Kernels | None, saved: Any, g_bk: jax.Array
) -> tuple:
    indices_bk, x_bd, w_ld, bias_l = saved
    g_x_bd = _decode(g_bk, indices_bk, w_ld, dtype, kernels)
    g_w_ld = outer_sum(g_bk, indices_bk, x_bd, w_ld.shape[0], dtype, kernels)
    if kernels:
        g_bias_l = _sum_in_order(g_bk, indices_bk, bias_l.shape[0])
    else:
        g_bias_l = _zeros(g_bk, bias_l.shape[0]).at[indices_bk].add(g_bk)
    gradients = (g_x_bd, x_bd), (g_w_ld, w_ld), (g_bias_l, bias_l)
    return None, None, *(g.astype(like.dtype) for g, like in gradients)


def _sum_in_order(
    values_bk: jax.Array, indices_bk: jax.Array, n_latents: int
) -> jax.Array:
    """Sums [L] of the values of each latent's slots.

    The slots are sorted as `outer_sum` sorts them, which XLA does once. Then each holds
    the sum of its latent's last 1, 2, 4, ... slots up to its own.
    """
    latents_n, slots_n = _sort_slots(values_bk, indices_bk, n_latents)
    places_n = lax.iota(jnp.int32, slots_n.size)

    def double(i: jax.Array, sums_n: jax.Array) -> jax.Array:
        reach = jnp.left_shift(1, i)
        is_own_n = (jnp.roll(latents_n, reach) == latents_n) & (places_n >= reach)
        return sums_n + jnp.where(is_own_n, jnp.roll(sums_n, reach), 0)

    n_doublings = (slots_n.size - 1).bit_length()
    sums_n = lax.fori_loop(0, n_doublings, double, values_bk.reshape(-1)[slots_n])
    all_l = lax.iota(jnp.int32, n_latents)
    last_l = jnp.searchsorted(latents_n, all_l, side="right") - 1
    return jnp.where(latents_n[last_l] == all_l, sums_n[last_l], 0)


def _passes(array_bk: jax.Array) -> jax.Array:
    """The columns as [passes, columns of a pass, B]; the last is filled up with 0."""
    missing = -array_bk.shape[1] % _COLUMNS
    filled_bk = jnp.pad(array_bk, ((0, 0), (0, missing)))
    return filled_bk.T.reshape(-1, _COLUMNS, array_bk.shape[0])


def _n_passes(values_bk: jax.Array) -> jax.Array:
    """Passes up to the last column that some row uses."""
    ends_k = jnp.arange(1, values_bk.shape[1] + 1, dtype=jnp.int32)
    n_used = jnp.max(jnp.where((values_bk != 0).any(0), ends_k, 0), initial=0)
    return -(-n_used // _COLUMNS)


def _scale(values_n: jax.Array, rows_nd: jax.Array, dtype: DTypeLike) -> jax.Array:
    return values_n[:, None].astype(dtype) * rows_nd.astype(dtype)


def _zeros(like: jax.Array, *shape: int) -> jax.Array:
    """To add to, in float32 or more; varies inside `jax.shard_map` as `like` does."""
    dtype = jnp.promote_types(like.dtype, jnp.float32)
    return jnp.full_like(like, 0, dtype=dtype, shape=shape)


decode.defvjp(_decode_forward, _decode_backward)
multiply_at.defvjp(_multiply_at_forward, _multiply_at_backward)
