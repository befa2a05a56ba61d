"""Hugging Face model folders of the Llama family: read and written.

A folder holds config.json, model.safetensors and tokenizer.json; nothing in it
is ever executed (no pickle).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from tokenizers import Tokenizer

from sae_jax.subjects.llama import LlamaConfig, Weights, list_shapes

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"

# The types of fields. JSON may give 10000.0 as 10000.
_INT: tuple[type, ...] = (int,)
_FLOAT: tuple[type, ...] = (float, int)
_BOOL: tuple[type, ...] = (bool,)
_MEANINGS: dict[tuple[type, ...], str] = {
    _INT: "a whole number above 0",
    _FLOAT: "a number above 0",
    _BOOL: "true or false",
}
_OUTER_NAMES = {
    "embed_vd": "model.embed_tokens",
    "final_norm_d": "model.norm",
    "head_vd": "lm_head",
}
_BLOCK_NAMES = {
    "attn_norm_d": "input_layernorm",
    "w_q_dh": "self_attn.q_proj",
    "w_k_dg": "self_attn.k_proj",
    "w_v_dg": "self_attn.v_proj",
    "w_o_hd": "self_attn.o_proj",
    "mlp_norm_d": "post_attention_layernorm",
    "w_gate_dm": "mlp.gate_proj",
    "w_up_dm": "mlp.up_proj",
    "w_down_md": "mlp.down_proj",
}


def read_config(folder: Path) -> LlamaConfig:
    """The sizes in config.json; ValueError for what this forward pass is not."""
    path = folder / CONFIG_FILE
    fields = read_json(path)
    architectures = fields.get("architectures") or fields.get("model_type")
    if architectures != ["LlamaForCausalLM"]:
        raise ValueError(
            f"{path}: architectures {architectures!r} is not supported; "
            "give a folder whose architectures field is ['LlamaForCausalLM']"
        )
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_parameters is {rope!r}, not an object")
    expected = {
        "hidden_act": (fields.get("hidden_act", "silu"), "silu"),
        "attention_bias": (fields.get("attention_bias", False), False),
        "mlp_bias": (fields.get("mlp_bias", False), False),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
    }
    for name, (found, supported) in expected.items():
        if found != supported:
            raise ValueError(
                f"{path}: {name} is {found!r}, only {supported!r} is supported"
            )
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    return _read_sizes({**fields, "rope_theta": theta}, path)


def read_weights(folder: Path, config: LlamaConfig, dtype: DTypeLike) -> Weights:
    """The weight tree of `llama.forward`, host arrays of `dtype`."""
    path = folder / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({_first_line(error)}): fetch it again"
        ) from error

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise ValueError(f"{path}: no tensor {name!r}, which {CONFIG_FILE} implies")
        tensor = tensors[name].T if name.endswith("proj.weight") else tensors[name]
        if tensor.shape != shape:
            raise ValueError(
                f"{path}: {name} has shape {tensor.shape}, {CONFIG_FILE} gives {shape}"
            )
        return tensor.astype(dtype)

    shapes = list_shapes(config)
    named = {name: read(name, shape) for name, shape in _name_leaves(shapes)}
    leaves = [named[name] for name, _ in _name_leaves(shapes)]
    return jax.tree.unflatten(_get_structure(shapes), leaves)


def read_tokenizer(folder: Path, config: LlamaConfig) -> Tokenizer:
    """The tokenizer, which gives all tokens of a text and those alone."""
    path = folder / TOKENIZER_FILE
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # it raises no narrower one
        raise ValueError(
            f"{path} is damaged ({_first_line(error)}): fetch it again"
        ) from error
    n_tokens = tokenizer.get_vocab_size()
    if n_tokens > config.vocab_size:
        raise ValueError(
            f"{path} has {n_tokens} tokens, {CONFIG_FILE} a vocab_size of "
            f"{config.vocab_size}: give the tokenizer of this model"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A document that spells out a special token must not become that token.
    tokenizer.encode_special_tokens = True
    return tokenizer


def read_bos_id(folder: Path, config: LlamaConfig) -> int:
    """The token that begins a document; ValueError where config.json names none."""
    bos_id = read_json(folder / CONFIG_FILE).get("bos_token_id")
    if type(bos_id) is not int or not 0 <= bos_id < config.vocab_size:
        raise ValueError(
            f"{folder / CONFIG_FILE}: bos_token_id is {bos_id!r}; give the id, below "
            f"vocab_size = {config.vocab_size}, of the token that begins a document"
        )
    return bos_id


def write_folder(
    folder: Path,
    config: LlamaConfig,
    weights: Weights,
    tokenizer_json: str,
    dtype: DTypeLike,
    bos_id: int = 0,
) -> None:
    """Write the three files that `load_subject` and transformers read."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, leaf in _name_leaves(weights):
        array = np.asarray(leaf)
        array = array.T if name.endswith("proj.weight") else array
        tensors[name] = np.ascontiguousarray(array.astype(dtype))
    fields = _write_sizes(config) | {
        "bos_token_id": bos_id,
        "eos_token_id": bos_id,
        "dtype": np.dtype(dtype).name,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
    (folder / TOKENIZER_FILE).write_text(tokenizer_json)
    content = save(tensors, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).write_bytes(content)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file; ValueError names a file that holds none."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no JSON object")
    return fields


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _read_sizes(fields: Mapping[str, Any], path: Path) -> LlamaConfig:
    def read(name: str, kinds: tuple[type, ...], default: Any = None) -> Any:
        value = fields.get(name)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{path}: field {name!r} is missing")
        if type(value) not in kinds or (kinds != _BOOL and not value > 0):
            raise ValueError(f"{path}: {name} is {value!r}, not {_MEANINGS[kinds]}")
        return value

    d_model = read("hidden_size", _INT)
    n_heads = read("num_attention_heads", _INT)
    n_kv_heads = read("num_key_value_heads", _INT, n_heads)
    d_head = read("head_dim", _INT, d_model // n_heads)
    if n_heads % n_kv_heads or d_head % 2:
        raise ValueError(
            f"{path}: num_attention_heads = {n_heads} must be a multiple of "
            f"num_key_value_heads = {n_kv_heads}, and head_dim = {d_head} even"
        )
    return LlamaConfig(
        vocab_size=read("vocab_size", _INT),
        d_model=d_model,
        d_mlp=read("intermediate_size", _INT),
        n_layers=read("num_hidden_layers", _INT),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        context_length=read("max_position_embeddings", _INT),
        rms_norm_eps=read("rms_norm_eps", _FLOAT),
        rope_theta=read("rope_theta", _FLOAT, 10000.0),
        tied_head=read("tie_word_embeddings", _BOOL, False),
    )


def _write_sizes(config: LlamaConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied_head,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def _name_leaves(tree: Weights) -> Iterator[tuple[str, Any]]:
    """The Hugging Face name of each leaf, in the order of the flattened tree."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_shape):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in _OUTER_NAMES:
            yield f"{_OUTER_NAMES[name]}.weight", leaf
        else:
            _, layer, name = name.split(".")
            yield f"model.layers.{layer}.{_BLOCK_NAMES[name]}.weight", leaf


def _get_structure(shapes: Weights) -> Any:
    return jax.tree.structure(shapes, is_leaf=_is_shape)


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple)
