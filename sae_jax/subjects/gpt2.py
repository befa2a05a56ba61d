"""The GPT-2 architecture: config, names, forward pass.

Per block, on the residual stream x (Radford et al. 2019), whose start is the sum of
the embeddings of token and position:

    x ← x + Attention(LayerNorm(x)) W_o + b_o
    x ← x + gelu(LayerNorm(x) W_up + b_up) W_down + b_down

The matrices multiply from the right, as a Hugging Face file holds them; there, those
of queries, keys and values are three blocks of columns of one. The type of the
weights is the type of the matmuls; norms, softmax and logits are float32.

Axes as in `llama.py`.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sae_jax.subjects.fields import Fields
from sae_jax.subjects.layers import ACTIVATIONS, attend, multiply, split_heads
from sae_jax.subjects.sites import Replacement, Site, Visitor
from sae_jax.subjects.weights import Stored, Weights

NAMES: tuple[str, ...] = ("GPT2LMHeadModel",)
PREFIX = "transformer."

_OUTER_NAMES = {
    "embed_vd": "transformer.wte.weight",
    "position_td": "transformer.wpe.weight",
    "final_norm_d": "transformer.ln_f.weight",
    "final_shift_d": "transformer.ln_f.bias",
    "head_vd": "lm_head.weight",
}
_BLOCK_NAMES = {
    "attn_norm_d": "ln_1.weight",
    "attn_shift_d": "ln_1.bias",
    "w_q_dh": "attn.c_attn.weight",
    "w_k_dh": "attn.c_attn.weight",
    "w_v_dh": "attn.c_attn.weight",
    "b_q_h": "attn.c_attn.bias",
    "b_k_h": "attn.c_attn.bias",
    "b_v_h": "attn.c_attn.bias",
    "w_o_hd": "attn.c_proj.weight",
    "b_o_d": "attn.c_proj.bias",
    "mlp_norm_d": "ln_2.weight",
    "mlp_shift_d": "ln_2.bias",
    "w_up_dm": "mlp.c_fc.weight",
    "b_up_m": "mlp.c_fc.bias",
    "w_down_md": "mlp.c_proj.weight",
    "b_down_d": "mlp.c_proj.bias",
}


@dataclass(frozen=True)
class GPT2Config:
    """The sizes and options of a GPT-2 model, as its config.json gives them.

    Scores are divided by the square root of the head width where `scales_scores`, and
    by the number of the layer, from 1, where `scales_by_layer`.
    """

    vocab_size: int
    d_model: int
    d_mlp: int
    n_layers: int
    n_heads: int
    context_length: int
    layer_norm_eps: float
    activation: str
    tied_head: bool
    scales_scores: bool = True
    scales_by_layer: bool = False


def forward(
    weights: Weights,
    config: GPT2Config,
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
    x_btd = x_btd + weights["position_td"][: tokens_bt.shape[1]]
    last = config.n_layers - 1 if stop_after is None else stop_after
    for layer, block in enumerate(weights["blocks"][: last + 1]):
        x_btd = visit("resid_pre", layer, x_btd)
        normed_btd = _normalize(x_btd, block, "attn", config.layer_norm_eps)
        attn_btd = _attend(block, config, normed_btd, layer)
        x_btd = x_btd + visit("attn_out", layer, attn_btd)
        x_btd = visit("resid_mid", layer, x_btd)
        normed_btd = _normalize(x_btd, block, "mlp", config.layer_norm_eps)
        up_btm = multiply(normed_btd, block["w_up_dm"]) + block["b_up_m"]
        act_btm = visit("mlp_act", layer, activate(up_btm))
        mlp_btd = multiply(act_btm, block["w_down_md"]) + block["b_down_d"]
        x_btd = x_btd + visit("mlp_out", layer, mlp_btd)
        x_btd = visit("resid_post", layer, x_btd)
    return x_btd, visitor.captured


def compute_logits(weights: Weights, config: GPT2Config, x_btd: jax.Array) -> jax.Array:
    """Float32 logits [B, T, V] of the residual stream after the last block."""
    normed_btd = _normalize(x_btd, weights, "final", config.layer_norm_eps)
    head_vd = weights["embed_vd"] if config.tied_head else weights["head_vd"]
    return multiply(normed_btd, head_vd.T, jnp.float32)


def get_width(config: GPT2Config, kind: str) -> int:
    """The width of the activations at sites of this kind."""
    return config.d_mlp if kind == "mlp_act" else config.d_model


def list_shapes(config: GPT2Config) -> Weights:
    """The shape of every weight, in the tree that `forward` takes."""
    v, d, m = config.vocab_size, config.d_model, config.d_mlp
    block = {
        "attn_norm_d": (d,),
        "attn_shift_d": (d,),
        **{f"w_{name}_dh": (d, d) for name in "qkv"},
        **{f"b_{name}_h": (d,) for name in "qkv"},
        "w_o_hd": (d, d),
        "b_o_d": (d,),
        "mlp_norm_d": (d,),
        "mlp_shift_d": (d,),
        "w_up_dm": (d, m),
        "b_up_m": (m,),
        "w_down_md": (m, d),
        "b_down_d": (d,),
    }
    head = {} if config.tied_head else {"head_vd": (v, d)}
    return {
        "embed_vd": (v, d),
        "position_td": (config.context_length, d),
        "blocks": [dict(block) for _ in range(config.n_layers)],
        "final_norm_d": (d,),
        "final_shift_d": (d,),
        **head,
    }


def count_units(config: GPT2Config) -> dict[str, int]:
    """How many parts each axis comes apart into that are computed on their own."""
    return {"v": config.vocab_size, "h": config.n_heads, "m": config.d_mlp}


def find_stored(name: str, layer: int | None) -> Stored:
    """Where a Hugging Face file has the weight of this name."""
    if layer is None:
        return Stored(_OUTER_NAMES[name])
    stored_name = f"transformer.h.{layer}.{_BLOCK_NAMES[name]}"
    if "c_attn" in stored_name:
        return Stored(stored_name, part="qkv".index(name[2]), n_parts=3)
    return Stored(stored_name)


def read_config(architecture: str, fields: Fields) -> GPT2Config:
    """The config in a config.json; ValueError for what this forward pass is not."""
    fields.refuse_other(add_cross_attention=False)
    d_model = fields.read_int("n_embd", 768)
    n_heads = fields.read_int("n_head", 12)
    if d_model % n_heads:
        raise ValueError(
            f"{fields.path}: n_embd = {d_model} must be a multiple of n_head = "
            f"{n_heads}"
        )
    return GPT2Config(
        vocab_size=fields.read_int("vocab_size", 50257),
        d_model=d_model,
        d_mlp=fields.read_int("n_inner", 4 * d_model),
        n_layers=fields.read_int("n_layer", 12),
        n_heads=n_heads,
        context_length=fields.read_int("n_positions", 1024),
        layer_norm_eps=fields.read_float("layer_norm_epsilon", 1e-5),
        activation=fields.read_choice("activation_function", ACTIVATIONS, "gelu_new"),
        tied_head=fields.read_bool("tie_word_embeddings", True),
        scales_scores=fields.read_bool("scale_attn_weights", True),
        scales_by_layer=fields.read_bool("scale_attn_by_inverse_layer_idx", False),
    )


def get_default_bos_id(architecture: str) -> int:
    """The BOS token of a config.json that has no such field."""
    return 50256


def _normalize(x_btd: jax.Array, weights: Weights, name: str, eps: float) -> jax.Array:
    x32_btd = x_btd.astype(jnp.float32)
    centred_btd = x32_btd - jnp.mean(x32_btd, axis=-1, keepdims=True)
    variance_bt1 = jnp.mean(jnp.square(centred_btd), axis=-1, keepdims=True)
    normed_btd = centred_btd * jax.lax.rsqrt(variance_bt1 + eps)
    scale_d, shift_d = weights[f"{name}_norm_d"], weights[f"{name}_shift_d"]
    return (normed_btd * scale_d + shift_d).astype(x_btd.dtype)


def _attend(
    block: Weights, config: GPT2Config, x_btd: jax.Array, layer: int
) -> jax.Array:
    d_head = config.d_model // config.n_heads
    scale = d_head**-0.5 if config.scales_scores else 1.0
    if config.scales_by_layer:
        scale /= layer + 1

    def project(name: str) -> jax.Array:
        return multiply(x_btd, block[f"w_{name}_dh"]) + block[f"b_{name}_h"]

    mixed_bth = attend(
        split_heads(project("q") * scale, d_head),
        split_heads(project("k"), d_head),
        split_heads(project("v"), d_head),
    )
    return multiply(mixed_bth, block["w_o_hd"]) + block["b_o_d"]
