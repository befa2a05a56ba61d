"""Plain text in one long file: where it is cut, how it is read."""

import gzip
import re
import tracemalloc

import pytest

from sae_jax.text import Document, is_heldout, open_corpus, read_documents

MIB = 2**20


def read_in_order(path):
    """By the number in the name; the names sort by their digits."""
    documents = read_documents([str(path)])
    return sorted(documents, key=lambda document: int(document.name.split(":")[1]))


def write(path, text):
    data = text.encode()
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz"])
@pytest.mark.parametrize("end", ["\n\n", "\n", " ", ""])
def test_a_long_file_is_cut_behind_the_best_end_there_is(tmp_path, name, end):
    words = "\u00e4b" + (" " if end.strip(" ") else "")  # a space, if there are lines
    unit = words * 100 + ("\n" if end == "\n\n" else "") + words * 100 + end
    text = unit * (4 * MIB // len(unit.encode()))
    write(tmp_path / name, text)
    documents = read_in_order(tmp_path / name)
    assert "".join(document.text for document in documents) == text
    names = [document.name for document in documents]
    assert names == [f"{name}:{number}" for number in (1, 2, 3, 4)]
    for document in documents[:-1]:
        assert document.text.endswith(end)
        assert MIB <= len(document.text.encode()) <= MIB + 2 * 2**16


def test_a_file_of_a_mib_is_whole(tmp_path):
    one, two = ["a.txt"], ["a.txt:1", "a.txt:2"]
    for n_bytes, names in ((0, one), (MIB, one), (MIB + 1, two)):
        (tmp_path / "a.txt").write_bytes(b"x" * n_bytes)
        documents = read_documents([str(tmp_path)])
        assert [document.name for document in documents] == names
        assert "".join(document.text for document in documents) == "x" * n_bytes


def test_no_document_is_empty(tmp_path):
    (tmp_path / "a.txt").write_text("x" * (MIB + 2**16 - 1) + "\n")
    first, second = read_in_order(tmp_path)
    assert len(first.text) == MIB and len(second.text) == 2**16


def test_documents_of_a_packed_file_are_mixed(tmp_path):
    write(tmp_path / "a.txt.gz", "words\n" * 2 * MIB)
    corpus = open_corpus([str(tmp_path)])
    orders = [[document.name for document in corpus.iterate(seed)] for seed in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    assert len(orders[0]) == 12


def test_no_character_is_cut(tmp_path):
    for n_before in range(4):
        text = "x" * n_before + "\U0001f9ee" * (MIB // 2)
        (tmp_path / "a.txt").write_text(text)
        documents = read_in_order(tmp_path)
        assert len(documents) == 2
        assert "".join(document.text for document in documents) == text


def test_a_corpus_in_one_file_has_both_splits_in_any_order(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(2_500_000)))
    opened = open_corpus([str(tmp_path / "a.txt")])
    tracemalloc.start()
    names = [document.name for document in opened.iterate(0)]
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 8 * MIB  # of 32
    numbers = [int(re.fullmatch(r"a\.txt:(\d+)", name)[1]) for name in names]
    assert sorted(numbers) == list(range(1, len(names) + 1)) != numbers
    assert {is_heldout(name, every=5) for name in names} == {True, False}
    assert names != [document.name for document in opened.iterate(1)]


def test_a_corpus_says_how_it_was_cut(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("words\n" * MIB)
    before = open_corpus([str(tmp_path)]).identity
    monkeypatch.setattr("sae_jax.text.files._PART_BYTES", 2 * MIB)
    assert open_corpus([str(tmp_path)]).identity != before


def test_a_short_file_is_its_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert read_documents([str(tmp_path)]) == [Document("a.txt", "one\n\ntwo")]
