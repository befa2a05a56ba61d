"""Packing against a slow packer in plain Python. test_harvest reads contexts back."""

import itertools
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from sae_jax.packing import Layout, pack
from sae_jax.store import is_row
from sae_jax.text import Document, is_heldout

T, EVERY, BOS, PAD, VOCABULARY = 8, 5, 0, 199, 200
SPLITS = ("train", "heldout")


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, "w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def make_documents(n, seed=0):
    """Of 0 to 40 words, one in four of them w7."""
    rng = np.random.default_rng(seed)
    documents = []
    for i in range(n):
        words = rng.integers(2, 190, rng.integers(0, 41))
        words[rng.random(len(words)) < 0.25] = 7
        text = " ".join(f"w{word}" for word in words)
        documents.append(Document(f"{i}.txt", text))
    return documents


def make_layout(**changes):
    fields = {"context_length": T, "vocab_size": VOCABULARY, "bos_id": BOS}
    return Layout(**fields | {"pad_id": PAD} | changes)


def run(tokenizer, documents, layout=None, **changes):
    settings = {"heldout_every": EVERY, "max_rows": None, "rows_per_chunk": 1}
    packer = pack(
        iter(documents),
        tokenizer,
        layout or make_layout(),
        **settings | {"sequences_per_block": 4} | changes,
    )
    blocks = list(packer)
    return packer, blocks


def join(blocks, split):
    """Token and document ids of the split as lists of contexts."""
    its = [block for block in blocks if block.split == split]
    for array in (a for block in its for a in (block.tokens, block.documents)):
        assert array.dtype == np.int32 and array.ndim == 2
    return (
        [row.tolist() for block in its for row in block.tokens],
        [row.tolist() for block in its for row in block.documents],
    )


def pack_slowly(documents, layout, quota, chunk):
    """Contexts [(token, document), ...] by split, names, rows, and dropped tokens."""
    width = T - (layout.bos == "context")
    names, rest = [], {split: [] for split in SPLITS}
    contexts, n_dropped = {split: [] for split in SPLITS}, dict.fromkeys(SPLITS, 0)

    def count(split):
        return sum(is_kept(pair) for context in contexts[split] for pair in context)

    def is_kept(pair):
        return pair[1] >= 0 and pair[0] not in layout.excluded_ids

    for document in documents:
        split = "heldout" if is_heldout(document.name, EVERY) else "train"
        ids = [int(word[1:]) for word in document.text.split()]
        if not ids or count(split) >= quota[split]:
            continue
        ids = [BOS] * (layout.bos == "document") + ids
        text = rest[split] + [(token, len(names)) for token in ids]
        n_dropped[split] += len(ids)
        names.append(document.name)
        while len(text) >= width or (layout.packing == "padded" and text):
            cut, text = text[:width], text[width:]
            lead = [(BOS, cut[0][1])] * (layout.bos == "context")
            contexts[split].append(lead + cut + [(PAD, -1)] * (width - len(cut)))
        rest[split] = text
    rows = {}
    for split in SPLITS:
        rows[split] = int(min(count(split) // chunk * chunk, quota[split]))
        given, n = [], 0
        for context in contexts[split]:
            if n < rows[split]:
                given.append(context)
            n += sum(map(is_kept, context))
        contexts[split] = given
        n_dropped[split] -= sum(
            owner >= 0 for context in given for _, owner in context
        ) - len(given) * (layout.bos == "context")
    return contexts, names, rows, n_dropped


LAYOUTS = list(
    itertools.product(
        ("joined", "padded"), ("document", "context", "none"), ((), (BOS, 7, 1000))
    )
)


@pytest.mark.parametrize("packing, bos, excluded_ids", LAYOUTS)
@pytest.mark.parametrize("max_rows", [None, 96, 700])
@pytest.mark.parametrize("chunk, size", [(1, 1), (16, 4), (12, 3), (48, 1000)])
def test_every_layout_is_as_the_slow_packer_has_it(
    tokenizer, packing, bos, excluded_ids, max_rows, chunk, size
):
    documents = make_documents(150)
    layout = make_layout(packing=packing, bos=bos, excluded_ids=excluded_ids)
    packer, blocks = run(
        tokenizer,
        documents,
        layout,
        max_rows=max_rows,
        rows_per_chunk=chunk,
        sequences_per_block=size,
    )
    n_chunks = 10**9 if max_rows is None else max_rows // chunk
    n_heldout = max(1, round(n_chunks / EVERY))
    quota = {"train": (n_chunks - n_heldout) * chunk, "heldout": n_heldout * chunk}
    contexts, names, rows, dropped = pack_slowly(documents, layout, quota, chunk)
    assert packer.names == names
    assert packer.rows == rows and packer.dropped_tokens == dropped
    if max_rows is not None:
        assert rows == quota  # there is text enough
    for split in SPLITS:
        tokens, owners = join(blocks, split)
        assert tokens == [[token for token, _ in each] for each in contexts[split]]
        assert owners == [[owner for _, owner in each] for each in contexts[split]]
        sizes = [len(block.tokens) for block in blocks if block.split == split]
        assert set(sizes[:-1]) <= {size} and 0 < sizes[-1] <= size
        kept = is_row(np.array(tokens), np.array(owners), layout.excluded_ids).sum(1)
        # The last context is wanted, and with it there are rows enough.
        assert kept[:-1].sum() < rows[split] <= kept.sum()


@pytest.mark.parametrize("packing, bos, excluded_ids", LAYOUTS)
@pytest.mark.parametrize("chunk, max_rows", [(1, None), (16, None), (16, 160)])
def test_bytes_are_limited_to_the_last_chunk(
    tokenizer, packing, bos, excluded_ids, chunk, max_rows
):
    """In every split as many chunks of rows as there is room for, with contexts."""
    max_bytes, row_bytes, context_bytes = 12_000, 23, 8 * T
    layout = make_layout(packing=packing, bos=bos, excluded_ids=excluded_ids)
    settings = {"rows_per_chunk": chunk, "max_rows": max_rows}
    settings |= {"max_bytes": max_bytes, "row_bytes": row_bytes}
    documents = make_documents(150)
    _, every = run(tokenizer, documents, layout)
    runs = [
        run(tokenizer, documents, layout, **settings, sequences_per_block=size)
        for size in (1, 4, 1000)
    ]
    assert all(packer.names == runs[0][0].names for packer, _ in runs)
    most = max_bytes // (row_bytes + 8)
    n_chunks = (most if max_rows is None else min(most, max_rows)) // chunk
    n_heldout = max(1, round(n_chunks / EVERY))
    chunks = {"train": n_chunks - n_heldout, "heldout": n_heldout}
    for split in SPLITS:
        tokens, owners = join(every, split)
        kept = is_row(np.array(tokens), np.array(owners), excluded_ids).sum(1)
        starts = np.cumsum(kept) - kept

        def count_bytes(n_rows, starts=starts):
            return (starts < n_rows).sum() * context_bytes + n_rows * row_bytes

        budget, quota = max_bytes * chunks[split] / n_chunks, chunks[split] * chunk
        fits = [n for n in range(0, quota + 1, chunk) if count_bytes(n) <= budget]
        for packer, blocks in runs:
            assert packer.rows[split] == max(fits) > 0
            n_contexts = int((starts < max(fits)).sum())
            assert join(blocks, split)[0] == tokens[:n_contexts]


@pytest.mark.parametrize("documents, characters", [(1, 2**20), (7, 100), (256, 1)])
def test_what_is_tokenised_together_changes_nothing(
    tokenizer, monkeypatch, documents, characters
):
    expected, expected_blocks = run(tokenizer, make_documents(60), max_rows=500)
    monkeypatch.setattr("sae_jax.packing.packer._BATCH_DOCUMENTS", documents)
    monkeypatch.setattr("sae_jax.packing.packer._BATCH_CHARACTERS", characters)
    packer, blocks = run(tokenizer, make_documents(60), max_rows=500)
    assert packer.names == expected.names
    for split in SPLITS:
        assert join(blocks, split) == join(expected_blocks, split)


def test_whole_documents_are_of_one_split(tokenizer):
    packer, blocks = run(tokenizer, make_documents(150))
    for split in SPLITS:
        owners = {owner for row in join(blocks, split)[1] for owner in row}
        names = [packer.names[owner] for owner in owners]
        assert all(is_heldout(n, EVERY) == (split == "heldout") for n in names)
    empty = {d.name for d in make_documents(150) if not d.text}
    assert empty and empty.isdisjoint(packer.names)


def test_documents_of_one_name_stay_apart(tokenizer):
    texts = ("w3 " * T, "w4 " * T)
    documents = [Document(name, text) for name in ("9", "b") for text in texts]
    packer, blocks = run(tokenizer, documents, make_layout(bos="none"))
    assert Counter(packer.names) == {"9": 2, "b": 2}
    for split in SPLITS:
        tokens, owners = join(blocks, split)
        assert tokens == [[3] * T, [4] * T] and owners[0] != owners[1]


def test_blocks_come_as_they_fill_and_reading_stops_in_time(tokenizer):
    n_read = 0

    def read():
        nonlocal n_read
        for n_read in itertools.count(1):
            yield Document(f"{n_read}.txt", "w3 " * 2000)

    packer = pack(
        read(),
        tokenizer,
        make_layout(),
        heldout_every=EVERY,
        max_rows=2**24,
        rows_per_chunk=16,
        sequences_per_block=4,
    )
    next(iter(packer))
    assert n_read < 300
    n_read = 0
    run(tokenizer, read(), max_rows=160_000, rows_per_chunk=16)
    assert n_read < 600


def test_memory_is_that_of_a_block(tokenizer):
    """20 MB of text pass in less than 5 MB, without what the tokenizer takes."""
    text = " ".join(f"w{10 + i % 80}" for i in range(500))
    documents = (Document(f"{i}.txt", str(i) + text) for i in range(10_000))
    packer = pack(
        documents,
        tokenizer,
        make_layout(context_length=128),
        heldout_every=EVERY,
        max_rows=None,
        rows_per_chunk=1024,
        sequences_per_block=128,
    )
    tracemalloc.start()
    try:
        assert sum(block.tokens.size for block in packer) > 4_900_000
        assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    finally:
        tracemalloc.stop()


def test_rows_are_text_that_is_not_excluded():
    tokens = np.array([[0, 3, 7, PAD], [PAD, 7, 0, 0]], np.int32)
    documents = np.array([[4, 4, 4, -1], [5, 5, 6, -1]], np.int32)
    expected = [[True, True, True, False], [True, True, True, False]]
    np.testing.assert_array_equal(is_row(tokens, documents, ()), expected)
    expected = [[False, True, True, False], [False, True, False, False]]
    np.testing.assert_array_equal(is_row(tokens, documents, (0, PAD)), expected)


LAYOUT_FAULTS = {
    "packing": ({"packing": "cut"}, "packing = 'cut': give one of joined, padded"),
    "bos": ({"bos": "all"}, "bos = 'all': give one of document, context, none"),
    "no bos": ({"bos_id": None}, "bos = 'document', .* give bos = 'none'"),
    "high bos": ({"bos_id": 200}, "bos_id = 200, .* tokens are 0 to 199"),
    "high pad": ({"pad_id": 200}, "pad_id = 200, .* does not fit"),
    "short": ({"context_length": 0}, "context_length = 0: must be at least 1"),
    "bos alone": ({"context_length": 1, "bos": "context"}, "must be at least 2"),
}


@pytest.mark.parametrize("changes, message", LAYOUT_FAULTS.values(), ids=LAYOUT_FAULTS)
def test_layouts_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        make_layout(**changes)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer):
    documents = [Document("a", "w5 " * 50 + "w150 w2 " * 50)]
    layout = make_layout(vocab_size=150, pad_id=0)
    with pytest.raises(ValueError, match="gave token 150, .* 0 to 149: .*tokenizer.js"):
        run(tokenizer, documents, layout)
    make_layout(bos="none", bos_id=None)


def test_text_that_fills_no_chunk_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no text: no document has a token"):
        run(tokenizer, [Document("a", " \n")])
    assert is_heldout("9", EVERY)
    with pytest.raises(ValueError, match="no document of the text is train: "):
        run(tokenizer, [Document("9", "w3 " * 9)])
    with pytest.raises(ValueError, match="train documents give 0 rows"):
        run(tokenizer, [Document("9", "w3 " * 9), Document("b", "w3")])
    documents = [Document("9", "w3 " * 99), Document("b", "w3 " * 30)]
    with pytest.raises(ValueError, match="train .* 24 rows .*rows_per_chunk = 32"):
        run(tokenizer, documents, rows_per_chunk=32)
    with pytest.raises(ValueError, match="max_rows = 63 .* make it at least 64"):
        run(tokenizer, documents, rows_per_chunk=32, max_rows=63)
    documents = [Document(f"{i}", "w3") for i in range(99)]
    with pytest.raises(ValueError, match="room for 900 bytes of train, .* 16 rows"):
        run(
            tokenizer,
            documents,
            make_layout(packing="padded", bos="none"),
            rows_per_chunk=16,
            max_bytes=1200,
            row_bytes=8,
        )
