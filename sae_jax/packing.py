"""Packing: documents to contexts of T token ids.

Documents are taken in a shuffled order, so that a part of them is a fair sample. Each
is led by the beginning-of-sequence token; the documents of a split, `train` or
`heldout`, are joined and cut into contexts. What does not fill one is dropped.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from sae_jax.store import SPLITS
from sae_jax.text import Document, is_heldout

_DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True)
class Packed:
    """Contexts by split: token ids and document ids, both [sequences, T] int32."""

    tokens: dict[str, np.ndarray]
    documents: dict[str, np.ndarray]
    names: list[str]  # of the documents, by id
    dropped_tokens: dict[str, int]


def pack(
    tokenizer: Tokenizer,
    bos_id: int,
    documents: Sequence[Document],
    context_length: int,
    heldout_every: int,
    max_rows: int | None,
    seed: int,
) -> Packed:
    """The documents' contexts, at most `max_rows` tokens of them in all.

    Of these, one in `heldout_every` is for `heldout`. Raises ValueError if a split
    has no context.
    """
    quota = _share(max_rows, context_length, heldout_every)
    lengths = dict.fromkeys(SPLITS, 0)
    tokens: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    owners: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    names: list[str] = []
    for name, ids in _tokenise(tokenizer, documents, seed):
        split = "heldout" if is_heldout(name, heldout_every) else "train"
        if ids and lengths[split] < quota[split]:
            tokens[split].append(np.array([bos_id, *ids], np.int32))
            owners[split].append(np.full(len(ids) + 1, len(names), np.int32))
            lengths[split] += len(ids) + 1
            names.append(name)
        if all(lengths[split] >= quota[split] for split in SPLITS):
            break
    _check_lengths(lengths, len(documents), context_length)
    kept = {
        split: int(min(quota[split], lengths[split])) // context_length
        for split in SPLITS
    }
    return Packed(
        {split: _cut(tokens[split], kept[split], context_length) for split in SPLITS},
        {split: _cut(owners[split], kept[split], context_length) for split in SPLITS},
        names,
        {split: lengths[split] - kept[split] * context_length for split in SPLITS},
    )


def identify(documents: Iterable[Document]) -> str:
    """A sha256 of the names and texts, whatever their order."""
    digest = hashlib.sha256()
    for document in _sort(documents):
        for text in (document.name, document.text):
            data = text.encode()
            digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def _share(max_rows: int | None, t: int, heldout_every: int) -> dict[str, float]:
    """How many tokens of each split are wanted at most, in whole contexts."""
    if max_rows is None:
        return dict.fromkeys(SPLITS, math.inf)
    heldout = max(1, round(max_rows // t / heldout_every))
    return {"train": (max_rows // t - heldout) * t, "heldout": heldout * t}


def _tokenise(
    tokenizer: Tokenizer, documents: Sequence[Document], seed: int
) -> Iterator[tuple[str, list[int]]]:
    """The name and the token ids of each document, in the shuffled order."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
    ordered = _sort(documents)
    order = rng.permutation(len(ordered))
    for first in range(0, len(order), _DOCUMENTS_AT_ONCE):
        batch = [ordered[i] for i in order[first : first + _DOCUMENTS_AT_ONCE]]
        encodings = tokenizer.encode_batch_fast(
            [document.text for document in batch], add_special_tokens=False
        )
        for document, encoding in zip(batch, encodings, strict=True):
            yield document.name, encoding.ids


def _sort(documents: Iterable[Document]) -> list[Document]:
    return sorted(documents, key=lambda document: (document.name, document.text))


def _check_lengths(lengths: Mapping[str, int], n_documents: int, t: int) -> None:
    if not any(lengths.values()):
        raise ValueError(
            f"no text: none of {n_documents} documents has a token; give files with "
            "text in them"
        )
    for split, length in lengths.items():
        if length < t:
            raise ValueError(
                f"the {split} documents have {length} tokens, and one context takes "
                f"context_length = {t}: give more text, or lower it"
            )


def _cut(parts: list[np.ndarray], n_contexts: int, t: int) -> np.ndarray:
    return np.concatenate(parts)[: n_contexts * t].reshape(n_contexts, t)
