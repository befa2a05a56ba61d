"""Hugging Face model folders of any architecture, read through transformers.

A folder that asks for its own code, or whose weights are pickled, is refused.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sae_jax.subjects import folder, tokens
from sae_jax.subjects.folder import CONFIG_FILE
from sae_jax.subjects.tokens import TOKENIZER_FILE
from sae_jax.subjects.weights import list_weight_files

# What of config.json says nothing of the function that the model computes.
_IGNORED = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
# Architectures call the longest context by different names.
_CONTEXT_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
)


def read_fields(root: Path) -> Mapping[str, Any]:
    """config.json of a folder that can be loaded without running or unpickling."""
    fields = folder.read_fields(root).values
    if fields.get("auto_map"):
        raise ValueError(
            f"{root / CONFIG_FILE}: field 'auto_map' asks for code of the model's own, "
            f"which is not run; if transformers has type {fields.get('model_type')!r} "
            "itself, take the field out in a copy of the folder"
        )
    list_weight_files(root)
    return fields


def load_model(root: Path, dtype: Any, device: str) -> Any:
    """The model, with every weight from the folder."""
    from transformers import AutoModelForCausalLM

    auto_model: Any = AutoModelForCausalLM  # its types leave the report out
    try:
        model, report = auto_model.from_pretrained(
            root,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        model = model.to(device).eval()
    except Exception as error:  # it raises no narrower one
        raise ValueError(
            f"{root}: transformers cannot load it ({_first_line(error)}): "
            "give a causal language model that it has"
        ) from error
    # transformers draws at random what is not in the file.
    for kind in ("missing_keys", "mismatched_keys"):
        if report[kind]:
            raise ValueError(
                f"{root}: {len(report[kind])} weights that {CONFIG_FILE} implies are "
                f"not in its safetensors, as {min(map(str, report[kind]))}: fetch it "
                "again, or give the folder of a causal language model"
            )
    return model


def find_context_length(root: Path, config: Any) -> int:
    """The longest context, which the model's configuration gives."""
    config = config.get_text_config()
    for name in _CONTEXT_LENGTHS:
        value = getattr(config, name, None)
        if type(value) is int and value > 0:
            return value
    raise ValueError(
        f"{root / CONFIG_FILE} has none of {', '.join(_CONTEXT_LENGTHS)}: add the "
        "number of tokens that the model was trained on as max_position_embeddings"
    )


def read_tokenizer(root: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer, which gives all tokens of a text and those alone."""
    if (root / TOKENIZER_FILE).is_file():
        return tokens.read_tokenizer(root, vocab_size, is_gpt2=False)
    return tokens.make_plain(_convert_tokenizer(root), root, vocab_size)


def identify(root: Path, fields: Mapping[str, Any]) -> str:
    """The identity of the weight files and of what config.json says."""
    digest = hashlib.sha256()
    for path in list_weight_files(root):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    known = {name: value for name, value in fields.items() if name not in _IGNORED}
    digest.update(json.dumps(known, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _convert_tokenizer(root: Path) -> Tokenizer:
    """The tokenizer of a folder that has none but files of an older form."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(
            root, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # it raises no narrower one
        raise ValueError(
            f"{root} has no {TOKENIZER_FILE}, and transformers makes none of its "
            f"other files ({_first_line(error)}): add the model's tokenizer"
        ) from error
    if not found.is_fast:
        raise ValueError(
            f"{root} has a slow tokenizer only, of class {type(found).__name__}: "
            f"add its {TOKENIZER_FILE}"
        )
    tokenizer = found.backend_tokenizer
    # Some classes make a tokenizer of their special tokens alone where files are gone.
    if tokenizer.get_vocab_size() <= len(tokenizer.get_added_tokens_decoder()):
        raise ValueError(f"{root} has no {TOKENIZER_FILE}: add the model's tokenizer")
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
