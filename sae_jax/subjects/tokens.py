"""The tokenizer of a model folder and the tokens that have a meaning of their own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sae_jax.subjects.fields import Fields, read_json

TOKENIZER_FILE = "tokenizer.json"

_CONFIG_FILE = "config.json"
_BYTE_LEVEL_FILES = ("vocab.json", "merges.txt")
_PIECES_FILE = "tokenizer.model"
_TO_CONVERT = (
    "write it with `AutoTokenizer.from_pretrained(folder).save_pretrained(folder)` of "
    "transformers"
)


@dataclass(frozen=True)
class SpecialTokens:
    """The token before a document, all that are no text, and one to fill rows with."""

    bos_id: int | None
    special_ids: tuple[int, ...]
    pad_id: int


def read_tokenizer(folder: Path, vocab_size: int, is_gpt2: bool) -> Tokenizer:
    """The tokenizer, which gives all tokens of a text and those alone.

    Raises FileNotFoundError where there is none, ValueError for one that is damaged
    or has tokens that the model has not.
    """
    path, tokenizer = _open_tokenizer(folder, is_gpt2)
    return make_plain(tokenizer, path, vocab_size)


def make_plain(tokenizer: Tokenizer, path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of this file or folder, which then gives all tokens of a text and
    those alone; ValueError for one that has tokens that the model has not."""
    vocabulary = tokenizer.get_vocab()
    token = max(vocabulary, key=vocabulary.__getitem__, default="")
    if vocabulary.get(token, -1) >= vocab_size:
        raise ValueError(
            f"{path} has token {token!r} with id {vocabulary[token]}, the model a "
            f"vocab_size of {vocab_size}: give the tokenizer of this model"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # A document that spells out a special token must not become that token.
    tokenizer.encode_special_tokens = True
    return tokenizer


def read_special_tokens(
    folder: Path, tokenizer: Tokenizer, vocab_size: int, default_bos_id: int | None
) -> SpecialTokens:
    """What the files of the folder say of special tokens.

    The BOS token is the first that is named by config.json, generation_config.json or
    tokenizer_config.json, else the default where config.json has no such field; none
    where tokenizer_config.json says null. A field that config.json has not is that of
    its text_config, if there is one. ValueError for an id that is none.
    """
    path = folder / _CONFIG_FILE
    config = read_json(path)
    for name, value in Fields(path, config).read_object("text_config").items():
        if config.get(name) is None:
            config[name] = value
    generation = _read_if_there(folder / "generation_config.json")
    of_tokenizer = _read_if_there(folder / "tokenizer_config.json")
    bos_id = _get_id(config, "bos_token_id", path, vocab_size)
    if bos_id is None:
        path = folder / "generation_config.json"
        bos_id = _get_id(generation, "bos_token_id", path, vocab_size)
    if of_tokenizer.get("bos_token", "") is None:
        bos_id = None
    elif bos_id is None:
        bos_id = _find_token(tokenizer, of_tokenizer.get("bos_token"))
        is_default = "bos_token_id" not in config and (default_bos_id or 0) < vocab_size
        if bos_id is None and is_default:
            bos_id = default_bos_id
    special = {
        token
        for fields in (config, generation)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        for token in _as_list(fields.get(name))
        if type(token) is int and 0 <= token < vocab_size
    }
    added = tokenizer.get_added_tokens_decoder()
    special |= {token for token, content in added.items() if content.special}
    special |= set() if bos_id is None else {bos_id}
    pad_id = next(
        (
            token
            for name in ("pad_token_id", "eos_token_id")
            for token in _as_list(config.get(name))
            if token in special
        ),
        min(special, default=0),
    )
    return SpecialTokens(bos_id, tuple(sorted(special)), pad_id)


def _open_tokenizer(folder: Path, is_gpt2: bool) -> tuple[Path, Tokenizer]:
    path = folder / TOKENIZER_FILE
    vocab, merges = (folder / name for name in _BYTE_LEVEL_FILES)
    try:
        if path.is_file():
            return path, Tokenizer.from_file(str(path))
        if is_gpt2 and vocab.is_file() and merges.is_file():
            path = vocab
            tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            return path, tokenizer
    except Exception as error:  # it raises no narrower one
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged ({reason}): fetch it again") from error
    for name in (_PIECES_FILE, *_BYTE_LEVEL_FILES):
        if (folder / name).is_file():
            raise FileNotFoundError(
                f"no {TOKENIZER_FILE} in {str(folder)!r}, and {name} does not say "
                f"how text is split: {_TO_CONVERT}"
            )
    raise FileNotFoundError(
        f"no {TOKENIZER_FILE} in {str(folder)!r}: give a Hugging Face model folder "
        "with config.json, model.safetensors and tokenizer.json"
    )


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _get_id(
    fields: Mapping[str, Any], name: str, path: Path, vocab_size: int
) -> int | None:
    token = fields.get(name)
    if token is None or token == -1:  # some folders write -1 for none
        return None
    if type(token) is not int or not 0 <= token < vocab_size:
        raise ValueError(
            f"{path}: {name} is {token!r}; give the id, below vocab_size = "
            f"{vocab_size}, of the token that begins a document"
        )
    return token


def _find_token(tokenizer: Tokenizer, token: Any) -> int | None:
    """The id of a token that is given as text or as an object with its text."""
    text = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(text) if isinstance(text, str) else None


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]
