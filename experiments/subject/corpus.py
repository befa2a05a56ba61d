"""What the default subject is trained on: a tokenizer, token streams, batches."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from sae_jax.text import Document, is_heldout, read_standard_library

# Begins every document and every training row.
BOS = "<|endoftext|>"
BOS_ID = 0

HELDOUT_EVERY = 20

# What a token may at most span. Line breaks keep the indentation that follows, so
# that one token is the start of a line of source at some depth.
_PIECES = (
    r"(?:\r?\n)+[ \t]*"
    r"| ?[\p{L}\p{M}_]+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}_]+"
    r"|\s+(?!\S)|\s"
)


def split_standard_library() -> tuple[list[Document], list[Document]]:
    """The modules to train on and those held out."""
    documents = read_standard_library()
    return (
        [d for d in documents if not is_heldout(d.name, HELDOUT_EVERY)],
        [d for d in documents if is_heldout(d.name, HELDOUT_EVERY)],
    )


def read_json_lines(path: Path) -> list[str]:
    """The `text` field of every line of a .jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE: every text comes back from its tokens unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def make_stream(tokenizer: Tokenizer, texts: Sequence[str], seed: int) -> np.ndarray:
    """The tokens of all texts, in random order, a BOS token before each."""
    order = np.random.default_rng(seed).permutation(len(texts))
    shuffled = [texts[index] for index in order]
    parts = []
    for encoding in tokenizer.encode_batch(shuffled, add_special_tokens=False):
        parts += [[BOS_ID], encoding.ids]
    return np.concatenate(parts).astype(np.int32)


def take_rows(
    stream: np.ndarray, first: int, count: int, context_length: int, seed: int
) -> np.ndarray:
    """Rows `first` to `first + count` of an endless walk over the stream.

    A row [T] is a BOS token and a window of T - 1 tokens. Each epoch cuts the
    stream at a new phase and visits every window once, in a new order.
    """
    width = context_length - 1
    n_windows = len(stream) // width - 1
    rows = np.full((count, context_length), BOS_ID, np.int32)
    for row, index in enumerate(range(first, first + count)):
        epoch, position = divmod(index, n_windows)
        rng = np.random.default_rng((seed, epoch))
        phase = rng.integers(width)
        start = phase + width * rng.permutation(n_windows)[position]
        rows[row, 1:] = stream[start : start + width]
    return rows
