"""Parquet and what `datasets` saves: rows, and every fault by file and row."""

import sys

import pytest

from sae_jax.text import Document, open_corpus, read_documents

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


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_a_row_is_a_document(tmp_path, arrow, kind):
    texts = arrow.array(TEXTS)
    texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(kind)
    columns = {"id": list(range(300)), "text": texts}
    write_parquet(arrow, tmp_path / "a.parquet", columns, row_group_size=70)
    assert list(open_corpus([str(tmp_path / "a.parquet")])._sources[0].read()) == [
        Document(f"a.parquet:{i + 1}", text) for i, text in enumerate(TEXTS)
    ]


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
