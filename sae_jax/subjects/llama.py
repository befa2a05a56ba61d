"""The Llama architecture, which Mistral and Qwen2 share: config, names, forward pass.

Per block, on the residual stream x (Touvron et al. 2023, arXiv:2302.13971):

    x ← x + Attention(RMSNorm(x)) W_o
    x ← x + (silu(RMSNorm(x) W_gate) · (RMSNorm(x) W_up)) W_down

with rotary positions and key-value heads that may each serve a group of query heads.
By config, products have biases, another function stands for silu, and layers attend
to a window of positions. The matrices multiply from the right, so they are the
transposes of the ones that a Hugging Face file holds. The type of the weights is the
type of the matmuls; norms, softmax and logits are float32.

Axes: B batch, T tokens, D model width, V vocabulary, M MLP width, H query heads,
G key-value heads, Q queries of one of them (H / G heads by T), E head width,
S = T (the position attended to).
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sae_jax.subjects.fields import Fields
from sae_jax.subjects.layers import ACTIVATIONS, attend, multiply, split_heads
from sae_jax.subjects.rotary import (
    Rotary,
    Scaling,
    compute_rotary,
    read_rotary,
    rotate,
)
from sae_jax.subjects.sites import Replacement, Site, Visitor
from sae_jax.subjects.weights import Stored, Weights

# The defaults of transformers: key-value heads, context, BOS token.
_DEFAULTS: dict[str, tuple[int | None, int, int | None]] = {
    "LlamaForCausalLM": (None, 2048, 1),
    "MistralForCausalLM": (8, 131072, 1),
    "Qwen2ForCausalLM": (32, 32768, None),
}
NAMES: tuple[str, ...] = tuple(_DEFAULTS)
PREFIX = "model."

_OUTER_NAMES = {
    "embed_vd": "model.embed_tokens.weight",
    "final_norm_d": "model.norm.weight",
    "head_vd": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm_d": "input_layernorm.weight",
    "w_q_dh": "self_attn.q_proj.weight",
    "w_k_dg": "self_attn.k_proj.weight",
    "w_v_dg": "self_attn.v_proj.weight",
    "w_o_hd": "self_attn.o_proj.weight",
    "b_q_h": "self_attn.q_proj.bias",
    "b_k_g": "self_attn.k_proj.bias",
    "b_v_g": "self_attn.v_proj.bias",
    "b_o_d": "self_attn.o_proj.bias",
    "mlp_norm_d": "post_attention_layernorm.weight",
    "w_gate_dm": "mlp.gate_proj.weight",
    "w_up_dm": "mlp.up_proj.weight",
    "w_down_md": "mlp.down_proj.weight",
    "b_gate_m": "mlp.gate_proj.bias",
    "b_up_m": "mlp.up_proj.bias",
    "b_down_d": "mlp.down_proj.bias",
}


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama model, as its config.json gives them, and its options.

    Layers of `windowed_layers` attend to the last `window` positions alone.
    """

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
    rope_scaling: Scaling | None = None
    activation: str = "silu"
    qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None
    windowed_layers: tuple[int, ...] = ()


def forward(
    weights: Weights,
    config: LlamaConfig,
    tokens_bt: jax.Array,
    capture: Set[Site],
    replace: Mapping[Site, Replacement],
    stop_after: int | None = None,
) -> tuple[jax.Array, dict[Site, jax.Array]]:
    """The last residual stream [B, T, D] and the captured sites.

    With `stop_after` only the blocks up to that layer are run (-1: none).
    """
    visitor = Visitor(tokens_bt, capture, replace)
    visit, activate = visitor.visit, ACTIVATIONS[config.activation]
    x_btd = weights["embed_vd"][tokens_bt]
    rotary = compute_rotary(
        config.d_head, config.rope_theta, config.rope_scaling, tokens_bt.shape[1]
    )
    last = config.n_layers - 1 if stop_after is None else stop_after
    for layer, block in enumerate(weights["blocks"][: last + 1]):
        x_btd = visit("resid_pre", layer, x_btd)
        normed_btd = _normalize(x_btd, block["attn_norm_d"], config.rms_norm_eps)
        window = config.window if layer in config.windowed_layers else None
        attn_btd = _attend(block, config, normed_btd, rotary, window)
        x_btd = x_btd + visit("attn_out", layer, attn_btd)
        x_btd = visit("resid_mid", layer, x_btd)
        normed_btd = _normalize(x_btd, block["mlp_norm_d"], config.rms_norm_eps)
        gate_btm = activate(_project(normed_btd, block, "gate", "dm"))
        up_btm = _project(normed_btd, block, "up", "dm")
        act_btm = visit("mlp_act", layer, gate_btm * up_btm)
        mlp_btd = _project(act_btm, block, "down", "md")
        x_btd = x_btd + visit("mlp_out", layer, mlp_btd)
        x_btd = visit("resid_post", layer, x_btd)
    return x_btd, visitor.captured


def compute_logits(
    weights: Weights, config: LlamaConfig, x_btd: jax.Array
) -> jax.Array:
    """Float32 logits [B, T, V] of the residual stream after the last block."""
    normed_btd = _normalize(x_btd, weights["final_norm_d"], config.rms_norm_eps)
    head_vd = weights["embed_vd"] if config.tied_head else weights["head_vd"]
    return multiply(normed_btd, head_vd.T, jnp.float32)


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
    if config.qkv_bias:
        block |= {"b_q_h": (d_query,), "b_k_g": (d_key,), "b_v_g": (d_key,)}
    if config.attn_out_bias:
        block |= {"b_o_d": (d,)}
    if config.mlp_bias:
        block |= {"b_gate_m": (m,), "b_up_m": (m,), "b_down_d": (d,)}
    head = {} if config.tied_head else {"head_vd": (config.vocab_size, d)}
    return {
        "embed_vd": (config.vocab_size, d),
        "blocks": [dict(block) for _ in range(config.n_layers)],
        "final_norm_d": (d,),
        **head,
    }


def count_units(config: LlamaConfig) -> dict[str, int]:
    """How many parts each axis comes apart into that are computed on their own."""
    return {
        "v": config.vocab_size,
        "h": config.n_heads,
        "g": config.n_kv_heads,
        "m": config.d_mlp,
    }


def find_stored(name: str, layer: int | None) -> Stored:
    """Where a Hugging Face file has the weight of this name."""
    is_transposed = name.startswith("w_")
    if layer is None:
        return Stored(_OUTER_NAMES[name], is_transposed)
    return Stored(f"model.layers.{layer}.{_BLOCK_NAMES[name]}", is_transposed)


def read_config(architecture: str, fields: Fields) -> LlamaConfig:
    """The config in a config.json; ValueError for what this forward pass is not."""
    kv_heads, context, _ = _DEFAULTS[architecture]
    d_model = fields.read_int("hidden_size")
    n_heads = fields.read_int("num_attention_heads")
    if "num_key_value_heads" in fields.values or kv_heads is None:
        kv_heads = n_heads
    n_kv_heads = fields.read_int("num_key_value_heads", kv_heads)
    d_head = fields.read_int("head_dim", d_model // n_heads)
    if n_heads % n_kv_heads or d_head % 2:
        raise ValueError(
            f"{fields.path}: num_attention_heads = {n_heads} must be a multiple of "
            f"num_key_value_heads = {n_kv_heads}, and head_dim = {d_head} even"
        )
    context_length = fields.read_int("max_position_embeddings", context)
    rope_theta, rope_scaling = read_rotary(fields, context_length)
    is_llama = architecture == "LlamaForCausalLM"
    attn_bias = is_llama and fields.read_bool("attention_bias", False)
    window, windowed_layers = _read_window(architecture, fields)
    return LlamaConfig(
        vocab_size=fields.read_int("vocab_size"),
        d_model=d_model,
        d_mlp=fields.read_int("intermediate_size"),
        n_layers=fields.read_int("num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        context_length=context_length,
        rms_norm_eps=fields.read_float("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        tied_head=fields.read_bool("tie_word_embeddings", False),
        rope_scaling=rope_scaling,
        activation=fields.read_choice("hidden_act", ACTIVATIONS, "silu"),
        qkv_bias=attn_bias or architecture == "Qwen2ForCausalLM",
        attn_out_bias=attn_bias,
        mlp_bias=is_llama and fields.read_bool("mlp_bias", False),
        window=window,
        windowed_layers=windowed_layers,
    )


def get_default_bos_id(architecture: str) -> int | None:
    """The BOS token of a config.json that has no such field."""
    return _DEFAULTS[architecture][2]


def _normalize(x_btd: jax.Array, scale_d: jax.Array, eps: float) -> jax.Array:
    x32_btd = x_btd.astype(jnp.float32)
    power_bt1 = jnp.mean(jnp.square(x32_btd), axis=-1, keepdims=True)
    normed_btd = x32_btd * jax.lax.rsqrt(power_bt1 + eps)
    return normed_btd.astype(x_btd.dtype) * scale_d


def _attend(
    block: Weights,
    config: LlamaConfig,
    x_btd: jax.Array,
    rotary: Rotary,
    window: int | None,
) -> jax.Array:
    e = config.d_head
    query_bth = _project(x_btd, block, "q", "dh") * e**-0.5
    query_bhte = rotate(split_heads(query_bth, e), rotary)
    key_bgse = rotate(split_heads(_project(x_btd, block, "k", "dg"), e), rotary)
    value_bgse = split_heads(_project(x_btd, block, "v", "dg"), e)
    mixed_bth = attend(query_bhte, key_bgse, value_bgse, window)
    return _project(mixed_bth, block, "o", "hd")


def _project(x: jax.Array, block: Weights, name: str, axes: str) -> jax.Array:
    """The product with the matrix of this name, plus its bias where it has one."""
    product = multiply(x, block[f"w_{name}_{axes}"])
    bias = block.get(f"b_{name}_{axes[1]}")
    return product if bias is None else product + bias


def _read_window(
    architecture: str, fields: Fields
) -> tuple[int | None, tuple[int, ...]]:
    """The window, and the layers that have it."""
    n_layers = fields.read_int("num_hidden_layers")
    if architecture == "LlamaForCausalLM":
        return None, ()
    has_field = "sliding_window" in fields.values
    if has_field and fields.values["sliding_window"] is None:
        return None, ()
    window = fields.read_int("sliding_window", 4096)
    if architecture == "MistralForCausalLM":
        return window, tuple(range(n_layers))
    if not fields.read_bool("use_sliding_window", False):
        return None, ()
    kinds = fields.values.get("layer_types")
    if kinds is None:
        first = fields.read_int("max_window_layers", 28, above=-1)
        return window, tuple(range(first, n_layers))
    if not isinstance(kinds, list) or len(kinds) != n_layers:
        raise ValueError(
            f"{fields.path}: layer_types is {kinds!r}, not a list of {n_layers}"
        )
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"{fields.path}: layer_types holds {kind!r}, only 'full_attention' and "
                "'sliding_attention' are supported"
            )
    sliding = (i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    return window, tuple(sliding)
