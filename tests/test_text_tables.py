"""Parquet and what `datasets` saves: rows, and every fault by file and row."""

import os
import sys

import numpy as np
import pytest

from sae_jax.text import Document, corpus, open_corpus, read_documents

TEXTS = [f"text {i} \u00e4 " * (i % 7) for i in range(300)]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_missing_extra_is_said(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"pyarrow.*pip install 'sae_jax\[text\]'$"):
        read_documents([str(tmp_path)])


@pytest.fixture(scope="module")
def arrow():
    return pytest.importorskip("pyarrow")


def write_parquet(arrow, file, columns, **options):
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), file, **options)


def write_arrow(arrow, file, columns, row_group_size=None, is_file=False, **options):
    new = arrow.ipc.new_file if is_file else arrow.ipc.new_stream
    table = arrow.table(columns)
    with new(file, table.schema, options=arrow.ipc.IpcWriteOptions(**options)) as sink:
        sink.write_table(table, row_group_size)


def write_feather(arrow, file, columns, **options):
    write_arrow(arrow, file, columns, is_file=True, **options)


WRITERS = {
    "a.parquet": write_parquet,
    "a.arrow": write_arrow,
    "feather.arrow": write_feather,
}


def list_documents(file):
    """In the order of the file."""
    (source,) = open_corpus([str(file)])._sources
    return [document for block in source.blocks for document in source.read(*block)]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_a_row_is_a_document(tmp_path, arrow, name, kind, compression):
    texts = arrow.array(TEXTS)
    texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(kind)
    columns = {"id": list(range(300)), "text": texts}
    options = {"row_group_size": 70, "compression": compression}
    WRITERS[name](arrow, tmp_path / name, columns, **options)
    expected = [Document(f"{name}:{i + 1}", text) for i, text in enumerate(TEXTS)]
    assert list_documents(tmp_path / name) == expected
    shuffled = list(open_corpus([str(tmp_path / name)]).iterate(0))
    assert shuffled != expected
    assert sorted(shuffled, key=lambda d: int(d.name.split(":")[1])) == expected


def test_dictionaries_that_are_replaced_between_batches(tmp_path, arrow):
    texts = [arrow.array(each).dictionary_encode() for each in ("ab", "ab", "cd")]
    batches = [arrow.record_batch({"text": text}) for text in texts]
    with arrow.ipc.new_stream(tmp_path / "a.arrow", batches[0].schema) as sink:
        for batch in batches:
            sink.write_batch(batch)
    assert "".join(d.text for d in list_documents(tmp_path / "a.arrow")) == "ababcd"


@pytest.mark.parametrize("name", WRITERS)
def test_a_part_of_a_table_is_a_fair_sample(tmp_path, arrow, name):
    texts = [f"{i:05d}" for i in range(20_000)]
    WRITERS[name](arrow, tmp_path / name, {"text": texts}, row_group_size=200)
    documents = list(open_corpus([str(tmp_path)]).iterate(0))
    assert sorted(document.text for document in documents) == texts
    part = [int(document.text) for document in documents[:2000]]
    assert 8000 < np.mean(part) < 12_000 and 5000 < np.std(part) < 6500
    assert min(part) < 2000 and max(part) > 18_000


@pytest.mark.parametrize("name", WRITERS)
def test_a_table_that_changes_while_it_is_read_is_named(
    tmp_path, arrow, monkeypatch, name
):
    monkeypatch.setattr(corpus, "_SHUFFLED_DOCUMENTS", 1)
    WRITERS[name](arrow, tmp_path / name, {"text": TEXTS})
    documents = open_corpus([str(tmp_path)]).iterate(0)
    next(documents)
    os.utime(tmp_path / name, ns=(0, 0))
    with pytest.raises(ValueError, match=f"{name} has changed since"):
        list(documents)


def test_tables_without_rows(tmp_path, arrow):
    for name, write in WRITERS.items():
        write(arrow, tmp_path / name, {"text": arrow.array([], arrow.string())})
    with pytest.raises(ValueError, match="no text: none of 3 sources"):
        read_documents([str(tmp_path)])
    (tmp_path / "b.jsonl").write_text('{"text": "z"}\n')
    assert read_documents([str(tmp_path)]) == [Document("b.jsonl:1", "z")]


@pytest.mark.parametrize("name", ["a.arrow", "feather.arrow"])
@pytest.mark.parametrize("n_left", [0, 3, 100, -400, -4])
def test_a_torn_arrow_file_is_named(tmp_path, arrow, name, n_left):
    file = tmp_path / name
    WRITERS[name](arrow, file, {"text": TEXTS}, row_group_size=70)
    if n_left == -4 and name == "a.arrow":
        n_left = -12  # the mark of the end has 8 bytes, and may be left out
    file.write_bytes(file.read_bytes()[:n_left])
    with pytest.raises(ValueError, match=f"{name} is not a whole table") as error:
        read_documents([str(file)])
    assert "\n" not in str(error.value)


def test_a_folder_may_hold_any_mixture(tmp_path, arrow):
    write_parquet(arrow, tmp_path / "a.parquet", {"body": ["x", "y"]})
    (tmp_path / "b.jsonl").write_text('{"body": "z"}\n')
    (tmp_path / "c.txt").write_text("plain")
    names = [document.name for document in read_documents([str(tmp_path)], "body")]
    assert names == ["a.parquet:1", "a.parquet:2", "b.jsonl:1", "c.txt"]
    other = open_corpus([str(tmp_path)], "body").identity
    write_parquet(arrow, tmp_path / "a.parquet", {"body": ["x", "Y"]})
    assert open_corpus([str(tmp_path)], "body").identity != other


def test_columns_and_values_that_are_no_text_are_named(tmp_path, arrow):
    file = tmp_path / "a.parquet"
    columns = {"n": [1, 2], "words": [["a"], ["b"]], "text": ["a", None]}
    write_parquet(arrow, file, columns)
    for field, message in {
        "body": "no column 'body': .*--text_field: 'n', 'words', 'text'",
        "n": "column 'n' holds int64, not strings",
        "words": "column 'words' holds list",
        "text": "row 2: field 'text' is a NoneType, not a string",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            read_documents([str(file)], field)
        assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "bad text"])
def test_a_damaged_parquet_is_named(tmp_path, arrow, damage):
    file = tmp_path / "a.parquet"
    if damage == "bad text":
        binary = arrow.array([b"caf\xe9"])
        columns = {"text": arrow.Array.from_buffers(
            arrow.string(), 1, binary.buffers()
        )}
        write_parquet(arrow, file, columns)
    else:
        write_parquet(arrow, file, {"text": TEXTS}, write_page_checksum=True)
        data = bytearray(file.read_bytes())
        data[len(data) // 4] ^= 1
        cut = {"cut": len(data) // 2, "empty": 0}.get(damage)
        file.write_bytes(data[:cut] if cut is not None else data)
    with pytest.raises(ValueError, match="a.parquet is not a whole table") as error:
        read_documents([str(tmp_path)])
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def datasets():
    return pytest.importorskip("datasets")


def test_a_saved_dataset_is_its_rows(tmp_path, datasets):
    made = datasets.Dataset.from_dict({"id": range(300), "text": TEXTS})
    made.save_to_disk(tmp_path / "saved", num_shards=3)
    (tmp_path / "saved" / "cache-123.arrow").write_bytes(b"left by a map")
    read = read_documents([str(tmp_path / "saved")])
    assert sorted(document.text for document in read) == sorted(TEXTS)
    assert read[0].name == "data-00000-of-00003.arrow:1"
    chosen = made.select([5, 3])
    chosen.save_to_disk(tmp_path / "chosen")
    texts = [document.text for document in read_documents([str(tmp_path / "chosen")])]
    assert texts == [TEXTS[5], TEXTS[3]]
    assert len(read_documents([str(tmp_path)])) == 302


def test_a_saved_dataset_of_splits(tmp_path, datasets):
    parts = {
        name: datasets.Dataset.from_dict({"text": [name, name]})
        for name in ("train", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    read = read_documents([str(tmp_path / "saved")])
    assert [document.text for document in read] == ["test"] * 2 + ["train"] * 2
    assert read[0].name == "test/data-00000-of-00001.arrow:1"
    whole = read_documents([str(tmp_path)])
    assert [f"saved/{document.name}" for document in read] == [d.name for d in whole]


def test_faults_of_a_saved_dataset_are_named(tmp_path, datasets):
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder)
    with pytest.raises(ValueError, match="no column 'body': .*'text'"):
        read_documents([str(folder)], "body")
    table = folder / "data-00000-of-00001.arrow"
    table.write_bytes(table.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=f"{table.name} is not a whole table"):
        read_documents([str(folder)])
    table.unlink()
    with pytest.raises(ValueError, match=f"state.json lists .*{table.name}"):
        open_corpus([str(folder)])
    (folder / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="state.json does not list"):
        open_corpus([str(folder)])
