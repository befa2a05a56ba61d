"""Hugging Face model folders: what `load_subject` reads of them, and one written.

A folder holds config.json, the weights (model.safetensors, or several files and
their index) and tokenizer.json; nothing in it is ever executed (no pickle).
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save

from sae_jax.subjects import llama
from sae_jax.subjects.architectures import ModelConfig
from sae_jax.subjects.fields import Fields, read_json
from sae_jax.subjects.tokens import TOKENIZER_FILE
from sae_jax.subjects.weights import WEIGHTS_FILE, Weights, hash_files, name_leaves

CONFIG_FILE = "config.json"


def read_fields(folder: Path) -> Fields:
    """The fields of config.json; FileNotFoundError where there is none."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no {CONFIG_FILE} in {str(folder)!r}: give a Hugging Face model folder "
            "with config.json, model.safetensors and tokenizer.json"
        )
    return Fields(path, read_json(path))


def identify(files: list[Path], config: ModelConfig, bos_id: int | None) -> str:
    """The first 16 hex digits of a SHA-256 of the weights and what the config says.

    Options count where they are not their default, so that a new one changes the
    identity of no model that does without it.
    """
    options = {
        field.name: field.default
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING
    }
    said = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in options or value != options[name]
    }
    digest = hash_files(files)
    digest.update(repr((said, bos_id)).encode())
    return digest.hexdigest()[:16]


def write_folder(
    folder: Path,
    config: llama.LlamaConfig,
    weights: Weights,
    tokenizer_json: str,
    dtype: DTypeLike,
    bos_id: int = 0,
) -> None:
    """Write the three files that `load_subject` and transformers read.

    For a plain Llama: ValueError for a config with options.
    """
    fields = _write_config(config) | {
        "bos_token_id": bos_id,
        "eos_token_id": bos_id,
        "dtype": np.dtype(dtype).name,
    }
    tensors = {}
    for name, layer, leaf in name_leaves(weights):
        stored = llama.find_stored(name, layer)
        array = np.asarray(leaf)
        array = array.T if stored.is_transposed else array
        tensors[stored.name] = np.ascontiguousarray(array.astype(dtype))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
    (folder / TOKENIZER_FILE).write_text(tokenizer_json)
    content = save(tensors, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).write_bytes(content)


def _write_config(config: llama.LlamaConfig) -> dict[str, Any]:
    fields = {
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
    written = llama.read_config("LlamaForCausalLM", Fields(Path(CONFIG_FILE), fields))
    if written != config:
        raise ValueError(f"only a Llama without options can be written, not {config}")
    return fields
