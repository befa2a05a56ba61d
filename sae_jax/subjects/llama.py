"""The Llama architecture: its forward pass, with every site read or replaced.

Per block, on the residual stream x (Touvron et al. 2023, arXiv:2302.13971):

    x ← x + Attention(RMSNorm(x)) W_o
    x ← x + (silu(RMSNorm(x) W_gate) · (RMSNorm(x) W_up)) W_down

with rotary positions in the rotate-half convention (dimension i turns with
i + E/2) and key-value heads that may each serve a group of query heads. The
matrices multiply from the right, so they are the transposes of the ones that a
Hugging Face file holds. The type of the weights is the type of the matmuls;
norms, softmax and logits are float32.

Axes: B batch, T tokens, D model width, V vocabulary, M MLP width, H query heads,
G key-value heads, Q queries of one of them (H / G heads by T), E head width,
S = T (the position attended to).
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sae_jax.subjects.sites import Site

Weights = dict[str, Any]
Replacement = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama model, as its config.json gives them."""

    vocab_size: int
    d_model: int
    d_mlp: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    tied_head: bool


def forward(
    weights: Weights,
    config: LlamaConfig,
    tokens_bt: jax.Array,
    capture: Set[Site],
    replace: Mapping[Site, Replacement],
    stop_after: int | None = None,
) -> tuple[jax.Array, dict[Site, jax.Array]]:
    """The last residual stream [B, T, D] and the captured sites.

    A site that is replaced and captured is captured after its replacement. With
    `stop_after` only the blocks up to that layer are run (-1: none).
    """
    captured: dict[Site, jax.Array] = {}

    def visit(kind: str, layer: int, acts: jax.Array) -> jax.Array:
        site = Site(kind, layer)
        if site in replace:
            acts = replace[site](acts, tokens_bt).astype(acts.dtype)
        if site in capture:
            captured[site] = acts
        return acts

    x_btd = weights["embed_vd"][tokens_bt]
    rotary = _compute_rotary(config, tokens_bt.shape[1])
    last = config.n_layers - 1 if stop_after is None else stop_after
    for layer, block in enumerate(weights["blocks"][: last + 1]):
        x_btd = visit("resid_pre", layer, x_btd)
        normed_btd = _normalize(x_btd, block["attn_norm_d"], config.rms_norm_eps)
        attn_btd = _attend(block, config, normed_btd, rotary)
        x_btd = x_btd + visit("attn_out", layer, attn_btd)
        x_btd = visit("resid_mid", layer, x_btd)
        normed_btd = _normalize(x_btd, block["mlp_norm_d"], config.rms_norm_eps)
        gate_btm = jax.nn.silu(_multiply(normed_btd, block["w_gate_dm"]))
        up_btm = _multiply(normed_btd, block["w_up_dm"])
        act_btm = visit("mlp_act", layer, gate_btm * up_btm)
        mlp_btd = _multiply(act_btm, block["w_down_md"])
        x_btd = x_btd + visit("mlp_out", layer, mlp_btd)
        x_btd = visit("resid_post", layer, x_btd)
    return x_btd, captured


def compute_logits(
    weights: Weights, config: LlamaConfig, x_btd: jax.Array
) -> jax.Array:
    """Float32 logits [B, T, V] of the residual stream after the last block."""
    normed_btd = _normalize(x_btd, weights["final_norm_d"], config.rms_norm_eps)
    head_vd = weights["embed_vd"] if config.tied_head else weights["head_vd"]
    return _multiply(normed_btd, head_vd.T, jnp.float32)


def get_width(config: LlamaConfig, kind: str) -> int:
    """The width of the activations at sites of this kind."""
    return config.d_mlp if kind == "mlp_act" else config.d_model


def list_shapes(config: LlamaConfig) -> Weights:
    """The shape of every weight, in the tree that `forward` takes."""
    d, m = config.d_model, config.d_mlp
    d_query, d_key = (n * config.d_head for n in (config.n_heads, config.n_kv_heads))
    block = {
        "attn_norm_d": (d,),
        "w_q_dh": (d, d_query),
        "w_k_dg": (d, d_key),
        "w_v_dg": (d, d_key),
        "w_o_hd": (d_query, d),
        "mlp_norm_d": (d,),
        "w_gate_dm": (d, m),
        "w_up_dm": (d, m),
        "w_down_md": (m, d),
    }
    head = {} if config.tied_head else {"head_vd": (config.vocab_size, d)}
    return {
        "embed_vd": (config.vocab_size, d),
        "blocks": [dict(block) for _ in range(config.n_layers)],
        "final_norm_d": (d,),
        **head,
    }


def _normalize(x_btd: jax.Array, scale_d: jax.Array, eps: float) -> jax.Array:
    x32_btd = x_btd.astype(jnp.float32)
    power_bt1 = jnp.mean(jnp.square(x32_btd), axis=-1, keepdims=True)
    normed_btd = x32_btd * jax.lax.rsqrt(power_bt1 + eps)
    return normed_btd.astype(x_btd.dtype) * scale_d


def _attend(
    block: Weights,
    config: LlamaConfig,
    x_btd: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
) -> jax.Array:
    b, t, _ = x_btd.shape
    g, e = config.n_kv_heads, config.d_head

    def project(w_dh: jax.Array) -> jax.Array:
        return _multiply(x_btd, w_dh).reshape(b, t, -1, e).transpose(0, 2, 1, 3)

    query_bhte = _rotate(project(block["w_q_dh"]) * e**-0.5, rotary)
    key_bgse = _rotate(project(block["w_k_dg"]), rotary)
    value_bgse = project(block["w_v_dg"])
    # The query heads of one key-value head are one longer run of queries.
    scores_bgqs = jnp.einsum(
        "bgqe,bgse->bgqs",
        query_bhte.reshape(b, g, -1, e),
        key_bgse,
        preferred_element_type=jnp.float32,
    )
    scores_bhts = scores_bgqs.reshape(b, -1, t, t)
    is_past_ts = jnp.tril(jnp.ones((t, t), bool))
    pattern_bhts = jax.nn.softmax(jnp.where(is_past_ts, scores_bhts, -jnp.inf), axis=-1)
    pattern_bgqs = pattern_bhts.astype(x_btd.dtype).reshape(b, g, -1, t)
    mixed_bgqe = jnp.einsum("bgqs,bgse->bgqe", pattern_bgqs, value_bgse)
    mixed_bthe = mixed_bgqe.reshape(b, -1, t, e).transpose(0, 2, 1, 3)
    return _multiply(mixed_bthe.reshape(b, t, -1), block["w_o_hd"])


def _multiply(
    x_btd: jax.Array, w_dm: jax.Array, dtype: DTypeLike | None = None
) -> jax.Array:
    """x W over flat rows: XLA's gradient of a product of [B, T, D] copies transposed
    activations, with which an MLP took 1.7 times as long on a CPU."""
    b, t, d = x_btd.shape
    rows = jnp.matmul(x_btd.reshape(b * t, d), w_dm, preferred_element_type=dtype)
    return rows.reshape(b, t, -1)


def _compute_rotary(config: LlamaConfig, t: int) -> tuple[jax.Array, jax.Array]:
    half = config.d_head // 2
    frequency_e = config.rope_theta ** (-jnp.arange(half) / half)
    angle_te = jnp.arange(t)[:, None] * frequency_e
    return jnp.cos(angle_te), jnp.sin(angle_te)


def _rotate(x_bhte: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn each position's pairs (i, i + E/2) by the angles of that position."""
    cos_te, sin_te = rotary
    left, right = jnp.split(x_bhte.astype(jnp.float32), 2, axis=-1)
    turned = (left * cos_te - right * sin_te, right * cos_te + left * sin_te)
    return jnp.concatenate(turned, axis=-1).astype(x_bhte.dtype)
