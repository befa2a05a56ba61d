"""Who may write a store: one process each part, with the settings it was begun with."""

import dataclasses

import numpy as np
import pytest
import stores
from numbered_stores import (
    PER_SHARD,
    ROWS,
    SITES,
    T,
    begin,
    gather_rows,
    make_manifest,
    read_folder,
    write_store,
)

from sae_jax.files import lock_folder
from sae_jax.store import (
    Folder,
    Manifest,
    StoreWriter,
    choose_manifest,
    find_manifest,
    open_store,
)
from sae_jax.store import begin as begins
from sae_jax.store import writer as writers


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(path):
    return write_store(path, ROWS, SITES)


@pytest.mark.parametrize("n_processes", [2, 4, 7])
def test_several_processes_write_the_store_of_one(store, path, tmp_path, n_processes):
    shared = tmp_path / "shared"
    writers = [begin(shared, i, n_processes) for i in range(n_processes)]
    missing = [writer.missing_shards() for writer in writers]
    assert sorted(sum(missing, [])) == list(range(5))
    for writer in writers[::-1]:
        with pytest.raises(ValueError, match="still being written"):
            open_store(shared)
        stores.write_shards(writer, gather_rows())
        is_last = writer is writers[0]
        assert writer.finish() == is_last
    assert read_folder(shared) == read_folder(path)


def test_a_part_is_written_by_one_process_at_a_time(store, path, tmp_path):
    shared = tmp_path / "shared"
    first = begin(shared)
    stores.write_shards(first, gather_rows(), [0])
    with pytest.raises(ValueError, match="in use by another process: wait") as error:
        begin(shared)
    assert str(shared) in str(error.value) and "\n" not in str(error.value)
    begin(shared, 1, 2).close()  # another part
    first.close()
    write_store(shared, ROWS, SITES)
    assert read_folder(shared) == read_folder(path)
    begin(shared).close()  # the last one has let go


def test_a_folder_with_only_a_lock_is_empty(tmp_path):
    lock_folder(tmp_path).close()
    begin(tmp_path).close()


def test_what_another_wrote_before_the_lock_is_seen(path, monkeypatch):
    def lock(*arguments):
        monkeypatch.undo()
        begin(path).close()
        return lock_folder(*arguments)

    monkeypatch.setattr("sae_jax.store.writer.lock_folder", lock)
    with StoreWriter(Folder(path), make_manifest(SITES)) as writer:
        assert writer.manifest.is_packed
    assert find_manifest(Folder(path)).is_packed


def test_a_store_that_another_begins_meanwhile_is_no_strange_folder(path, monkeypatch):
    find = begins.find_manifest

    def find_before(folder):
        monkeypatch.undo()
        assert find(folder) is None
        begin(path).close()
        return None

    monkeypatch.setattr(begins, "find_manifest", find_before)
    assert choose_manifest(Folder(path), make_manifest(SITES)).is_packed


def test_a_closed_writer_writes_no_more(path, monkeypatch):
    """The lock is let go when what was begun has ended."""
    waited = []

    class Write:
        def exception(self):
            with pytest.raises(ValueError, match="in use"):
                lock_folder(path)
            waited.append(self)

    writer = begin(path)
    monkeypatch.setattr(writer, "_start_write", lambda *_: Write())
    stores.write_shards(writer, gather_rows(), [0])
    writer.close()
    assert len(waited) == len(SITES) + 1
    lock_folder(path).close()


def test_a_shard_has_the_rows_that_were_planned(path):
    with begin(path) as writer:
        with pytest.raises(ValueError, match="shard 1 has 63 rows, not 64"):
            writer.write_shard(1, {}, np.zeros((63, 2), np.int32))


def test_a_text_may_have_as_many_contexts_as_positions_count(path, monkeypatch):
    assert writers._MOST_CONTEXTS == 1 + np.iinfo(np.int32).max
    monkeypatch.setattr(writers, "_MOST_CONTEXTS", 4 * PER_SHARD // T)
    with pytest.raises(ValueError, match="more than the 32 contexts.*lower --max_rows"):
        begin(path)
    monkeypatch.setattr(writers, "_MOST_CONTEXTS", 5 * PER_SHARD // T)
    assert begin(path).manifest.is_packed


def test_refuses_a_folder_that_is_not_a_store(tmp_path):
    manifest = make_manifest({"resid_post.0": 4})
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="not a store and not empty.*thesis.tex"):
        StoreWriter(Folder(tmp_path), manifest)
    with pytest.raises(ValueError, match="is a file"):
        StoreWriter(Folder(tmp_path / "thesis.tex"), manifest)
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / "figures").mkdir()
    with pytest.raises(ValueError, match="not a store and not empty.*figures"):
        StoreWriter(Folder(tmp_path), manifest)


def test_another_setting_is_named(store, path):
    for change, message in (
        ({"seed": 1}, "begun with seed = 0, this harvest has 1"),
        ({"dtype": "int8"}, "begun with dtype = 'bfloat16'"),
        ({"packing": "padded"}, "begun with packing = 'joined'"),
    ):
        with pytest.raises(ValueError, match=message):
            StoreWriter(Folder(path), make_manifest(SITES, **change))


# What is found out in a harvest; all the rest are settings.
FOUND = {"version", "n_documents", "rows", "dropped_tokens", "text_shards"}
FOUND |= {"is_packed", "complete", "statistics"}


OTHER_SETTINGS = {
    "subject": {"name": "planted", "identity": "1", "dtype": "float32"},
    "tokenizer": "1",
    "corpus": "1",
    "sites": {"resid_post.0": 4},
    "dtype": "int8",
    "context_length": 4,
    "packing": "padded",
    "bos": "context",
    "bos_id": 3,
    "excluded_ids": [3],
    "heldout_every": 4,
    "max_rows": 99,
    "max_gb": 1.5,
    "seed": 1,
    "rows_per_shard": 128,
    "rows_per_chunk": 32,
    "contexts_per_shard": 4,
}


def test_every_setting_counts(store, path):
    fields = {field.name for field in dataclasses.fields(Manifest)}
    assert fields == OTHER_SETTINGS.keys() | FOUND
    for name, value in OTHER_SETTINGS.items():
        other = dataclasses.replace(make_manifest(SITES), **{name: value})
        told = "another text" if name == "corpus" else f"{name} = "
        with pytest.raises(ValueError, match=f"was begun with {told}"):
            StoreWriter(Folder(path), other)
