"""A corpus: its order, its identity, its memory."""

import gzip
import json
import pathlib
import shutil
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from sae_jax.text import Document, corpus, corpus_of, open_corpus, read_documents


def write_lines(file, texts):
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "one" / "folder"
    (folder / "sub").mkdir(parents=True)
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"plain {i}")
    write_lines(folder / "a.jsonl", [f"a {i}" for i in range(60)])
    write_lines(folder / "sub" / "b.ndjson", [f"b {i}" for i in range(60)])
    return folder


def list_names(corpus, seed):
    return [document.name for document in corpus.iterate(seed)]


def test_the_order_is_of_seed_and_content_alone(folder, tmp_path):
    opened = open_corpus([str(folder)])
    names = list_names(opened, 0)
    assert names == list_names(opened, 0) != list_names(opened, 1)
    assert sorted(names) == sorted(list_names(opened, 1))
    assert len(set(names)) == 140
    moved = tmp_path / "another" / "place"
    shutil.copytree(folder, moved)
    again = open_corpus([str(moved)])
    assert list_names(again, 0) == names and again.identity == opened.identity
    parts = [str(folder / "sub" / "b.ndjson"), *map(str, folder.glob("*.*"))]
    by_file = open_corpus(parts)
    assert list_names(by_file, 3) == list_names(open_corpus(parts[::-1]), 3)


@pytest.mark.parametrize(
    "limit", [("_SHUFFLED_DOCUMENTS", 7), ("_SHUFFLED_CHARACTERS", 40)]
)
def test_a_small_buffer_loses_nothing_and_mixes(folder, monkeypatch, limit):
    monkeypatch.setattr(corpus, *limit)
    names = list_names(open_corpus([str(folder)]), 0)
    assert len(set(names)) == len(names) == 140
    lines = [int(name.split(":")[1]) for name in names if name.startswith("a.jsonl")]
    assert lines != sorted(lines)
    # Nothing comes before it has been read.
    assert all(line <= place + 11 for place, line in enumerate(lines))


def test_a_part_is_a_fair_sample(tmp_path):
    """The first tenth of a file that fits the buffer is from all of it."""
    write_lines(tmp_path / "a.jsonl", [str(i) for i in range(2000)])
    opened = open_corpus([str(tmp_path)])
    firsts = [next(opened.iterate(seed)).text for seed in range(60)]
    assert 700 < np.mean([int(text) for text in firsts]) < 1300
    part = [int(document.text) for document in opened.iterate(0)][:200]
    assert 900 < np.mean(part) < 1100 and 500 < np.std(part) < 650


def test_a_part_of_a_file_larger_than_the_buffer_is_a_fair_sample(tmp_path):
    texts = [f"{i:05d}" + 200 * "x" for i in range(20_000)]
    write_lines(tmp_path / "a.jsonl", texts)
    documents = list(open_corpus([str(tmp_path)]).iterate(0))
    assert {d.name: d.text for d in documents} == {
        f"a.jsonl:{i + 1}": text for i, text in enumerate(texts)
    }
    assert len(documents) == len(texts)
    part = [int(document.text[:5]) for document in documents[:2000]]
    assert 8000 < np.mean(part) < 12_000 and 5000 < np.std(part) < 6500
    assert min(part) < 2000 and max(part) > 18_000


def test_single_texts_and_lines_come_in_proportion(tmp_path):
    for i in range(200):
        (tmp_path / f"{i}.txt").write_text("one")
    for i in range(50):
        write_lines(tmp_path / f"{i}.jsonl", ["many"] * 20)
    texts = [document.text for document in open_corpus([str(tmp_path)]).iterate(0)]
    assert len(texts) == 1200
    assert 0.1 < np.mean([text == "many" for text in texts[:100]])


def test_a_file_is_read_once_for_its_hash(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    write_lines(tmp_path / "b.jsonl", ["two"])
    opened = []
    open_path = pathlib.Path.open

    def count(path, *arguments, **settings):
        opened.append(path.name)
        return open_path(path, *arguments, **settings)

    monkeypatch.setattr(pathlib.Path, "open", count)
    found = open_corpus([str(tmp_path)])
    assert not opened
    assert found.identity and sorted(opened) == ["a.txt", "b.jsonl"]


def test_a_file_that_two_paths_give_is_refused(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    file = str(folder / "a.jsonl")
    for paths in (
        [str(folder), str(folder)],
        [str(folder), file],
        [file, str(folder / "1.txt"), str(tmp_path / "link" / "a.jsonl")],
        [str(folder / "sub"), str(folder)],
        ["hf:a/b", "hf:a/b"],
    ):
        with pytest.raises(ValueError, match="given twice, by .*: name it") as error:
            open_corpus(paths)
        assert repr(paths[0]) in str(error.value) and "\n" not in str(error.value)
    open_corpus([file, str(folder / "sub")])


def test_names_that_meet_are_two_documents(tmp_path):
    for root in "ab":
        (tmp_path / root).mkdir()
        (tmp_path / root / "same.txt").write_text(root)
        write_lines(tmp_path / root / "same.jsonl", [root])
    roots = [str(tmp_path / root) for root in "ab"]
    opened = open_corpus(roots)
    found = Counter((document.name, document.text) for document in opened.iterate(0))
    names = ("same.txt", "same.jsonl:1")
    assert found == dict.fromkeys(((n, r) for n in names for r in "ab"), 1)
    other = open_corpus(roots[::-1])
    assert other.identity == opened.identity
    assert list(other.iterate(5)) == list(opened.iterate(5))


def test_identity_is_of_names_contents_and_the_field(folder):
    seen = {open_corpus([str(folder)]).identity}

    def is_new():
        before = len(seen)
        seen.add(open_corpus([str(folder)]).identity)
        return len(seen) > before

    assert not is_new()
    (folder / "0.txt").write_text("other")
    assert is_new()
    (folder / "0.txt").rename(folder / "00.txt")
    assert is_new()
    write_lines(folder / "a.jsonl", ["short"])
    assert is_new()
    (folder / "a.jsonl.gz").write_bytes(
        gzip.compress((folder / "a.jsonl").read_bytes())
    )
    assert is_new()
    (folder / "a.jsonl").write_text('{"text": "a", "body": "b"}\n')
    by_field = [
        open_corpus([str(folder / "a.jsonl")], field).identity
        for field in ("text", "body")
    ]
    assert by_field[0] != by_field[1]
    plain = [
        open_corpus([str(folder / "1.txt")], field).identity
        for field in ("text", "body")
    ]
    assert plain[0] == plain[1]


def test_documents_in_memory(folder):
    documents = [Document("a", "bc"), Document("d", "e"), Document("a", "bc")]
    kept = corpus_of(documents)
    assert kept.identity == corpus_of(documents[::-1]).identity
    assert sorted(kept.iterate(0), key=lambda d: d.name) == [
        Document("a", "bc"),
        Document("a", "bc"),
        Document("d", "e"),
    ]
    others = (
        [Document("ab", "c"), Document("d", "e")],
        [Document("a", "bc")],
        [Document("a", "bc"), Document("d", "f")],
    )
    assert len({kept.identity, *(corpus_of(other).identity for other in others)}) == 4
    files = [str(folder / f"{i}.txt") for i in range(20)]
    read = corpus_of(read_documents(files))
    assert read.identity == open_corpus(files).identity
    assert list(read.iterate(4)) == list(open_corpus(files).iterate(4))


def test_memory_is_that_of_the_buffer(tmp_path, monkeypatch):
    """40 MB of text pass in less than 2 MB."""
    monkeypatch.setattr(corpus, "_SHUFFLED_DOCUMENTS", 1000)
    monkeypatch.setattr(corpus, "_SHUFFLED_CHARACTERS", 2**20)
    for part in range(4):
        write_lines(tmp_path / f"{part}.jsonl", ["words and " * 500] * 2000)
    tracemalloc.start()
    try:
        opened = open_corpus([str(tmp_path)])
        assert sum(len(document.text) for document in opened.iterate(0)) == 40_000_000
        assert tracemalloc.get_traced_memory()[1] < 2 * 2**20
    finally:
        tracemalloc.stop()
