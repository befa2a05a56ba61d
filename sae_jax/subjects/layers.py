"""What the architectures share: products, attention, activation functions.

Axes as in `llama.py`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


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
    themselves, or all. Scores and softmax are float32.
    """
    b, _, t, e = query_bhte.shape
    g = key_bgse.shape[1]
    # The query heads of one key-value head are one longer run of queries.
    scores_bgqs = jnp.einsum(
        "bgqe,bgse->bgqs",
        query_bhte.reshape(b, g, -1, e),
        key_bgse,
        preferred_element_type=jnp.float32,
    )
    scores_bhts = scores_bgqs.reshape(b, -1, t, t)
    is_seen_ts = jnp.tril(jnp.ones((t, t), bool))
    if window is not None:
        is_seen_ts = jnp.triu(is_seen_ts, 1 - window)
    pattern_bhts = jax.nn.softmax(jnp.where(is_seen_ts, scores_bhts, -jnp.inf), axis=-1)
    pattern_bgqs = pattern_bhts.astype(query_bhte.dtype).reshape(b, g, -1, t)
    mixed_bgqe = jnp.einsum("bgqs,bgse->bgqe", pattern_bgqs, value_bgse)
    mixed_bthe = mixed_bgqe.reshape(b, -1, t, e).transpose(0, 2, 1, 3)
    return mixed_bthe.reshape(b, t, -1)


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
