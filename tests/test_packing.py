"""Packing: which text goes into the contexts. test_harvest reads them back."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from sae_jax.packing import identify, pack
from sae_jax.text import Document, is_heldout

T, EVERY, BOS = 8, 5, 0


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(200)}, "w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def make_documents(n):
    """Document i has 20 tokens, all i + 2."""
    return [Document(f"{i}.txt", f"w{i + 2} " * 20) for i in range(n)]


def test_streams_are_documents_each_after_a_bos(tokenizer):
    documents = make_documents(150)
    packed = pack(tokenizer, BOS, documents, T, EVERY, None, seed=0)
    for split in ("train", "heldout"):
        stream, owners = packed.tokens[split].ravel(), packed.documents[split].ravel()
        assert packed.tokens[split].dtype == packed.documents[split].dtype == np.int32
        n = sum(is_heldout(d.name, EVERY) == (split == "heldout") for d in documents)
        assert len(stream) == n * 21 // T * T
        assert packed.dropped_tokens[split] == n * 21 % T
        names = np.array([int(packed.names[i].removesuffix(".txt")) for i in owners])
        is_first = np.arange(len(stream)) % 21 == 0
        np.testing.assert_array_equal(stream, np.where(is_first, BOS, names + 2))
        assert all(is_heldout(f"{i}.txt", EVERY) == (split == "heldout") for i in names)
    assert sorted(packed.names) == sorted(document.name for document in documents)


@pytest.mark.parametrize("max_rows", [16, 100, 400, 1000])
def test_max_rows_are_shared_by_the_splits(tokenizer, max_rows):
    documents = make_documents(150)
    whole = pack(tokenizer, BOS, documents, T, EVERY, None, seed=0)
    part = pack(tokenizer, BOS, documents, T, EVERY, max_rows, seed=0)
    n = {split: len(part.tokens[split]) for split in ("train", "heldout")}
    assert sum(n.values()) == max_rows // T
    assert n["heldout"] == max(1, round(max_rows // T / EVERY))
    for split, contexts in part.tokens.items():
        np.testing.assert_array_equal(contexts, whole.tokens[split][: n[split]])


def test_the_seed_chooses_the_order(tokenizer):
    documents = make_documents(150)
    first = pack(tokenizer, BOS, documents, T, EVERY, 400, seed=0)
    second = pack(tokenizer, BOS, documents, T, EVERY, 400, seed=1)
    again = pack(tokenizer, BOS, documents[::-1], T, EVERY, 400, seed=0)
    assert first.names == again.names != second.names
    assert first.names != sorted(first.names)


def test_identity_is_of_names_and_texts():
    documents = [Document("a", "bc"), Document("d", "e")]
    assert identify(documents) == identify(documents[::-1])
    others = (
        [Document("ab", "c"), Document("d", "e")],
        [Document("a", "bc")],
        [Document("a", "bc"), Document("d", "f")],
    )
    assert len({identify(documents), *map(identify, others)}) == 4


def test_text_that_fills_no_context_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no text: none of 1 documents has a token"):
        pack(tokenizer, BOS, [Document("a", " \n")], T, EVERY, None, seed=0)
    assert is_heldout("9", EVERY)
    with pytest.raises(ValueError, match="train documents have 0 tokens"):
        pack(tokenizer, BOS, [Document("9", "w3 " * 9)], T, EVERY, None, seed=0)
