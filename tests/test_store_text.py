"""The text of a store: its contexts, and which of their positions are rows."""

import json

import ml_dtypes
import numpy as np
import pytest
import stores
from numbered_stores import (
    NAMES,
    PER_CHUNK,
    PER_SHARD,
    ROWS,
    SITES,
    T,
    make_manifest,
    row_ids,
    write_store,
)

from sae_jax.store import (
    Contexts,
    Folder,
    StoreWriter,
    Text,
    find_manifest,
    open_store,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(path):
    return write_store(path, ROWS, SITES)


def test_contexts_are_read_in_any_order(store):
    for split in ROWS:
        sequences = np.random.default_rng(0).permutation(store.sequences(split))[:5]
        acts, is_row = store.read_contexts("mlp_act.1", sequences)
        assert acts.shape == (5, T, 6) and is_row.all()
        tokens = store.read_tokens(sequences)
        np.testing.assert_array_equal(row_ids(acts), tokens % 1000)
    assert store.read_tokens([]).shape == (0, T)
    for read in (store.read_tokens, store.find_rows):
        for missing in (-1, len(store.sequences("train")) + 99):
            with pytest.raises(ValueError, match=f"no context {missing}"):
                read([missing])
    for index, shard in enumerate(store.manifest.text_shards):
        if shard["contexts"] < PER_SHARD // T:  # the next is in the file, as zeros
            with pytest.raises(ValueError, match="no context"):
                store.read_tokens([index * PER_SHARD // T + shard["contexts"]])


@pytest.mark.parametrize("excluded_ids", [[], [3]])
def test_padding_and_excluded_tokens_are_no_rows(path, excluded_ids):
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, size=(20, T)).astype(np.int32)
    documents = np.where(rng.random((20, T)) < 0.2, -1, 0).astype(np.int32)
    is_kept = (documents >= 0) & ~np.isin(tokens, excluded_ids)
    acts = rng.standard_normal((20, T, 4)).astype(ml_dtypes.bfloat16)
    manifest = make_manifest(
        {"resid_post.0": 4}, excluded_ids=excluded_ids, contexts_per_shard=7
    )
    with StoreWriter(Folder(path), manifest) as writer:
        blocks = [
            Contexts("train", tokens[i : i + 7], documents[i : i + 7])
            for i in range(0, 20, 7)
        ]
        writer.write_text(stores.Blocks(blocks, ["a"], PER_CHUNK, excluded_ids))
        stores.write_shards(writer, {"train": {"resid_post.0": acts[is_kept]}})
        writer.finish()
    store = open_store(path)
    n_rows = is_kept.sum() // PER_CHUNK * PER_CHUNK
    assert store.rows("train") == n_rows < is_kept.sum()
    rows = store.read_ranges("resid_post.0", store.shards("train"))
    assert rows.tobytes() == acts[is_kept][:n_rows].tobytes()
    np.testing.assert_array_equal(
        store.read_positions(store.shards("train")), np.argwhere(is_kept)[:n_rows]
    )
    is_stored = is_kept & (np.cumsum(is_kept).reshape(20, T) <= n_rows)
    order = rng.permutation(20)
    found, is_row = store.read_contexts("resid_post.0", order)
    np.testing.assert_array_equal(is_row, is_stored[order])
    expected = np.where(is_stored[..., None], acts, 0).astype(ml_dtypes.bfloat16)
    assert found.tobytes() == expected[order].tobytes()


def test_rows_are_found_without_reading_every_text(store, path):
    text = Text(Folder(path), find_manifest(Folder(path)))
    selection = text.select("heldout", 60, 10)
    rows = np.arange(60, 70) + 1000
    np.testing.assert_array_equal(selection.tokens[selection.is_wanted], rows)
    assert len(selection.sequences) == 2
    edge = text.select("heldout", PER_SHARD - 1, 2)  # the last of a file, and the next
    assert edge.tokens[edge.is_wanted].tolist() == [PER_SHARD + 999, PER_SHARD + 1000]


class Looked(list):
    """A list that counts how often it is gone through."""

    n_iterated = 0

    def __iter__(self):
        self.n_iterated += 1
        return super().__iter__()


def test_reading_costs_no_more_in_a_larger_store(store, path, monkeypatch):
    """Each file of text that is asked for is read once, and no other looked at."""
    manifest = find_manifest(Folder(path))
    shards = [i for i, s in enumerate(manifest.text_shards) if s["split"] == "train"]
    manifest.text_shards = Looked(manifest.text_shards)
    text, read = Text(Folder(path), manifest), []
    manifest.text_shards.n_iterated = 0
    monkeypatch.setattr(
        text,
        "read",
        lambda name, sequences: read.append((name, sequences[0] * T // PER_SHARD))
        or Text.read(text, name, sequences),
    )
    text.select("train", 0, PER_SHARD)
    text.select("train", 1, PER_SHARD)
    assert read == [
        (name, shard) for shard in shards[:2] for name in ("tokens", "documents")
    ]
    rows, is_row = text.find_rows(text.sequences("train")[::-1])
    assert is_row.all() and len(read) == 2 * len(shards)
    np.testing.assert_array_equal(rows.ravel()[:T], np.arange(-T, 0) + ROWS["train"])
    assert manifest.text_shards.n_iterated == 0


def test_names_that_are_missing_or_of_another_number_are_refused(store, path):
    (path / "documents.json").write_text(json.dumps(NAMES[:2]))
    with pytest.raises(ValueError, match="documents.json has 2 names, the store 3"):
        open_store(path).document_name(0)
    (path / "documents.json").unlink()
    with pytest.raises(ValueError, match="documents.json is missing: restore the file"):
        open_store(path).document_name(0)
