"""Bits per byte of a subject on the held-out modules, beside xz and gzip.

    python experiments/subject/measure.py [--folder=model/]

Cost: about a minute on 2 cores. The held-out modules, concatenated in the order of
their names, are one text. Windows of a BOS token and T - 1 tokens, half a context
apart, score every token once, with at least half a context before it where there
is that much:

    bits per byte = -sum over all tokens of log2 p(token | context) / bytes
"""

import gzip
import json
import lzma
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import jax
import numpy as np
from absl import app, flags

from sae_jax.subjects import Subject, load_subject, next_token_loss
from sae_jax.text import Document, is_heldout, read_standard_library

_WINDOWS_AT_ONCE = 8

_FOLDER = flags.DEFINE_string("folder", "default", "The model folder to measure.")
_EVERY = flags.DEFINE_integer("every", 20, "One module in so many is held out.")


@dataclass(frozen=True)
class Figures:
    """Bits per byte of one text, by the subject and by two compressors."""

    python: str
    heldout_modules: int
    heldout_bytes: int
    heldout_tokens: int
    bits_per_byte: float
    xz_bits_per_byte: float
    gzip_bits_per_byte: float


def main(argv: Sequence[str]) -> None:
    documents = read_standard_library()
    heldout = [d for d in documents if is_heldout(d.name, _EVERY.value)]
    figures = measure(load_subject(_FOLDER.value), heldout)
    print(json.dumps(asdict(figures), indent=2))


def measure(subject: Subject, heldout: Sequence[Document]) -> Figures:
    """The figures of the documents, concatenated in the order given."""
    text = "".join(document.text for document in heldout)
    content = text.encode()
    tokens = subject.encode(text)
    xz = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    return Figures(
        python=platform.python_version(),
        heldout_modules=len(heldout),
        heldout_bytes=len(content),
        heldout_tokens=len(tokens),
        bits_per_byte=round(_count_bits(subject, tokens) / len(content), 4),
        xz_bits_per_byte=round(8 * len(xz) / len(content), 4),
        gzip_bits_per_byte=round(8 * len(gzip.compress(content, 9)) / len(content), 4),
    )


def _count_bits(subject: Subject, tokens: np.ndarray) -> float:
    """The bits that the subject needs for all tokens, each scored once."""
    assert subject.bos_id is not None
    rows, is_scored = _cut_windows(tokens, subject.context_length, subject.bos_id)

    @jax.jit
    def compute_loss(subject: Subject, tokens_bt: jax.Array) -> jax.Array:
        logits_btv, _ = subject.forward(tokens_bt)
        assert logits_btv is not None
        return next_token_loss(logits_btv, tokens_bt)

    nats = 0.0
    for first in range(0, len(rows), _WINDOWS_AT_ONCE):
        group = slice(first, first + _WINDOWS_AT_ONCE)
        loss = np.asarray(compute_loss(subject, rows[group]), np.float64)
        nats += loss[is_scored[group]].sum()
    return nats / np.log(2)


def _cut_windows(
    tokens: np.ndarray, context_length: int, bos_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows [N, T], and which of their T - 1 predictions count."""
    width, stride = context_length - 1, context_length // 2
    n_windows = 1 + max(0, -(-(len(tokens) - width) // stride))
    n_rows = -(-n_windows // _WINDOWS_AT_ONCE) * _WINDOWS_AT_ONCE
    rows = np.full((n_rows, context_length), bos_id, np.int32)
    is_scored = np.zeros((n_rows, width), bool)
    for row in range(n_windows):
        window = tokens[row * stride : row * stride + width]
        rows[row, 1 : 1 + len(window)] = window
        is_scored[row, (width - stride if row else 0) : len(window)] = True
    assert is_scored.sum() == len(tokens)
    return rows, is_scored


if __name__ == "__main__":
    app.run(main)
