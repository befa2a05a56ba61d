"""Hugging Face model folders of any architecture, read through transformers.

A folder that asks for its own code, or whose weights are pickled, is refused.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sae_jax.subjects.fields import read_json

_CONFIG_FILE = "config.json"
_TOKENIZER_FILE = "tokenizer.json"
_WEIGHTS_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
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


@dataclass(frozen=True)
class SpecialIds:
    """`special` has the ids of all special tokens; `pad` may stand behind a text."""

    bos: int | None
    pad: int
    special: tuple[int, ...]


def read_fields(root: Path) -> dict[str, Any]:
    """config.json of a folder that can be loaded without running or unpickling."""
    path = root / _CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no {_CONFIG_FILE} in {str(root)!r}: give a Hugging Face model folder"
        )
    fields = read_json(path)
    if fields.get("auto_map"):
        raise ValueError(
            f"{path}: field 'auto_map' asks for code of the model's own, which is not "
            f"run; if transformers has type {fields.get('model_type')!r} itself, "
            "take the field out in a copy of the folder"
        )
    _list_weights(root)
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
                f"{root}: {len(report[kind])} weights that {_CONFIG_FILE} implies are "
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
        f"{root / _CONFIG_FILE} has none of {', '.join(_CONTEXT_LENGTHS)}: add the "
        "number of tokens that the model was trained on as max_position_embeddings"
    )


def read_tokenizer(root: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer, which gives all tokens of a text and those alone."""
    path = root / _TOKENIZER_FILE
    if path.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # it raises no narrower one
            raise ValueError(
                f"{path} is damaged ({_first_line(error)}): fetch it again"
            ) from error
    else:
        tokenizer = _convert_tokenizer(root)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"{root}: the tokenizer has a token {largest}, the model {vocab_size} "
            "embeddings: give the tokenizer of this model"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A document that spells out a special token must not become that token.
    tokenizer.encode_special_tokens = True
    return tokenizer


def read_ids(
    root: Path, fields: Mapping[str, Any], tokenizer: Tokenizer, vocab_size: int
) -> SpecialIds:
    """The special tokens, as config.json and the tokenizer give them."""
    found: dict[str, int] = {}
    for name in ("bos", "eos", "pad"):
        value = _get_text_field(fields, f"{name}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if value is None or value == -1:
            continue
        if type(value) is not int or not 0 <= value < vocab_size:
            raise ValueError(
                f"{root / _CONFIG_FILE}: {name}_token_id is {value!r}; give an id "
                f"below the {vocab_size} embeddings, or none"
            )
        found[name] = value
    added = tokenizer.get_added_tokens_decoder()
    special = {token for token, added_token in added.items() if added_token.special}
    pad = found.get("pad", found.get("eos", found.get("bos", 0)))
    return SpecialIds(found.get("bos"), pad, tuple(sorted(special | {*found.values()})))


def identify(root: Path, fields: Mapping[str, Any]) -> str:
    """The identity of the weight files and of what config.json says."""
    digest = hashlib.sha256()
    for path in _list_weights(root):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    known = {name: value for name, value in fields.items() if name not in _IGNORED}
    digest.update(json.dumps(known, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _list_weights(root: Path) -> list[Path]:
    """The safetensors files, the one or those that the index names."""
    if (root / _WEIGHTS_FILE).is_file():
        return [root / _WEIGHTS_FILE]
    index = root / _INDEX_FILE
    if not index.is_file():
        raise FileNotFoundError(
            f"no {_WEIGHTS_FILE} and no {_INDEX_FILE} in {str(root)!r}, and pickled "
            "weights are never loaded: give a folder with safetensors, or convert it"
        )
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index} has no field 'weight_map': fetch it again")
    paths = [root / name for name in sorted(set(names.values()))]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no {path}, which {_INDEX_FILE} names: fetch it")
    return paths


def _convert_tokenizer(root: Path) -> Tokenizer:
    """The tokenizer of a folder that has none but files of an older form."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(
            root, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # it raises no narrower one
        raise ValueError(
            f"{root} has no {_TOKENIZER_FILE}, and transformers makes none of its "
            f"other files ({_first_line(error)}): add the model's tokenizer"
        ) from error
    if not found.is_fast:
        raise ValueError(
            f"{root} has a slow tokenizer only, of class {type(found).__name__}: "
            f"add its {_TOKENIZER_FILE}"
        )
    tokenizer = found.backend_tokenizer
    # Some classes make a tokenizer of their special tokens alone where files are gone.
    if tokenizer.get_vocab_size() <= len(tokenizer.get_added_tokens_decoder()):
        raise ValueError(f"{root} has no {_TOKENIZER_FILE}: add the model's tokenizer")
    return tokenizer


def _get_text_field(fields: Mapping[str, Any], name: str) -> Any:
    """A field of a model of text, or of the text part of another."""
    part = fields.get("text_config")
    value = fields.get(name)
    return part.get(name) if value is None and isinstance(part, dict) else value


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
