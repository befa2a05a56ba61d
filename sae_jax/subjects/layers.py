"""What the architectures share: products, attention, activation functions.

Axes as in `llama.py`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Whose scores attention holds at a time: of 2,048 positions all would be gigabytes.
MAX_QUERIES = 256


def multiply(
    x_btd: jax.Array, w_dm: jax.Array, dtype: DTypeLike | None = None
) -> jax.Array:
    """x W over flat rows: XLA's gradient of a product of [B, T, D] copies transposed
    activations, with which an MLP took 1.7 times as long on a CPU."""
    b, t, d = x_btd.shape
    rows = jnp.matmul(x_btd.reshape(b * t, d), w_dm, preferred_element_type=dtype)
    return rows.reshape(b, t, -1)


def split_heads(x_bth: jax.Array, d_head: int) -> jax.Array:
    """[B, T, heads · E] as [B, heads, T, E]."""
    b, t, _ = x_bth.shape
    return x_bth.reshape(b, t, -1, d_head).transpose(0, 2, 1, 3)


def attend(
    query_bhte: jax.Array,
    key_bgse: jax.Array,
    value_bgse: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Causal attention, its heads side by side: [B, T, heads · E].

    Queries hold the scale already. Positions see the last `window` of those up to
    themselves, or all. Scores and softmax are float32, and of no more than
    `MAX_QUERIES` positions at a time.
    """
    b, h, t, e = query_bhte.shape
    n_blocks = -(-t // MAX_QUERIES)
    if n_blocks == 1:
        mixed_bhte = _mix(query_bhte, jnp.arange(t), key_bgse, value_bgse, window)
        return _join_heads(mixed_bhte)
    size = -(-t // n_blocks)
    # What fills up the last block stands at the last position, for one before all of
    # its keys would have no finite score, and gradients that are no numbers.
    at_nq = jnp.minimum(jnp.arange(n_blocks * size), t - 1).reshape(n_blocks, size)
    filled = ((0, 0), (0, 0), (0, n_blocks * size - t), (0, 0))
    query_bhnqe = jnp.pad(query_bhte, filled).reshape(b, h, n_blocks, size, e)

    # A gradient computes the scores of a block anew, or it would hold them all.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def mix_block(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        query_bhqe, at_q = block
        return _mix(query_bhqe, at_q, key_bgse, value_bgse, window)

    blocks = jnp.moveaxis(query_bhnqe, 2, 0), at_nq
    mixed_bhnqe = jnp.moveaxis(jax.lax.map(mix_block, blocks), 0, 2)
    return _join_heads(mixed_bhnqe.reshape(b, h, -1, e)[:, :, :t])


def _mix(
    query_bhqe: jax.Array,
    at_q: jax.Array,
    key_bgse: jax.Array,
    value_bgse: jax.Array,
    window: int | None,
) -> jax.Array:
    """The values [B, H, Q, E] that the queries of these positions attend to."""
    b, h, q, e = query_bhqe.shape
    g, s = key_bgse.shape[1:3]
    # The query heads of one key-value head are one longer run of queries.
    scores_bgqs = jnp.einsum(
        "bgqe,bgse->bgqs",
        query_bhqe.reshape(b, g, -1, e),
        key_bgse,
        preferred_element_type=jnp.float32,
    )
    scores_bhqs = scores_bgqs.reshape(b, h, q, s)
    before_qs = at_q[:, None] - jnp.arange(s)
    is_seen_qs = before_qs >= 0
    if window is not None:
        is_seen_qs &= before_qs < window
    pattern_bhqs = jax.nn.softmax(jnp.where(is_seen_qs, scores_bhqs, -jnp.inf), axis=-1)
    pattern_bgqs = pattern_bhqs.astype(query_bhqe.dtype).reshape(b, g, -1, s)
    mixed_bgqe = jnp.einsum("bgqs,bgse->bgqe", pattern_bgqs, value_bgse)
    return mixed_bgqe.reshape(b, h, q, e)


def _join_heads(x_bhte: jax.Array) -> jax.Array:
    """[B, heads, T, E] as [B, T, heads · E]."""
    b, _, t, _ = x_bhte.shape
    return x_bhte.transpose(0, 2, 1, 3).reshape(b, t, -1)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


# By the names that config.json has for them.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_new": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "quick_gelu": _quick_gelu,
    "relu": jax.nn.relu,
}
