"""JSON lines and packed text: what is read, and every fault by file and line."""

import gzip
import json
import os

import pytest

from sae_jax.text import Document, corpus, open_corpus, read_documents, source

TEXTS = ["one", "zwei \u00e4\r\n\tdrei", "", "vier \U0001f600 \u2028 end"]


def make_lines(texts, field="text"):
    return "".join(
        json.dumps({field: text, "n": i}, ensure_ascii=i % 2 == 0) + "\n"
        for i, text in enumerate(texts)
    ).encode()


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "JSONL"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_line_is_a_document(tmp_path, suffix, is_packed):
    data = make_lines(TEXTS)
    file = tmp_path / f"a.{suffix}{'.gz' if is_packed else ''}"
    file.write_bytes(gzip.compress(data) if is_packed else data)
    expected = [Document(f"{file.name}:{i + 1}", text) for i, text in enumerate(TEXTS)]
    assert read_documents([str(file)]) == expected
    assert read_documents([str(tmp_path)]) == expected


def test_another_field_blank_lines_and_line_ends(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"body": "x"}\r\n\r\n  \n{"body": "y\\u0000"}')
    assert read_documents([str(file)], "body") == [
        Document("a.jsonl:1", "x"),
        Document("a.jsonl:4", "y\0"),
    ]


@pytest.mark.parametrize("piece", [1, 2, 7, 50, 500, 2**16])
@pytest.mark.parametrize("end", ["", "\n", "\r\n\n"])
def test_blocks_share_the_lines(tmp_path, monkeypatch, piece, end):
    """Every line is of one block, under its number, however long it is."""
    texts = ["x" * (37 * i % 200) for i in range(60)]
    lines = [json.dumps({"text": text}) for text in texts]
    lines[5], lines[30:33] = "", [""] * 3
    file = tmp_path / "a.jsonl"
    file.write_bytes(("\n".join(lines) + end).encode())
    whole = open_corpus([str(file)])
    expected = {
        f"a.jsonl:{i + 1}": text for i, text in enumerate(texts) if lines[i]
    }
    monkeypatch.setattr(source, "PIECE", piece)
    cut = open_corpus([str(file)])
    assert cut.identity == whole.identity
    for each in whole, cut:
        documents = list(each.iterate(0))
        assert {d.name: d.text for d in documents} == expected
        assert len(documents) == len(expected)
    (of_cut,) = cut._sources
    least = min(60, file.stat().st_size // max(piece, 300))
    assert least <= len(of_cut.blocks) <= 62
    assert (piece == 2**16) == (len(of_cut.blocks) == 1)


@pytest.mark.parametrize(
    "data, is_lines",
    [
        ('{"text": "a"}', True),
        ('{"text": "a"}\n{"text": "b"}\n', True),
        ('{\n  "text": "a"\n}\n', False),
        ('{"name": "package"}\n', False),
        ("[1, 2]\n", False),
        ('"text"\n"text"\n', False),
        ("", False),
    ],
)
def test_a_json_file_is_lines_if_it_looks_so(tmp_path, data, is_lines):
    (tmp_path / "a.json").write_text(data)
    names = [document.name for document in read_documents([str(tmp_path)])]
    assert (names[0] == "a.json:1") if is_lines else (names == ["a.json"])


def test_lines_of_json_without_the_field_are_no_plain_text(tmp_path):
    (tmp_path / "a.json").write_text('{"body": "a"}\n{"body": "b"}\n')
    with pytest.raises(ValueError, match="line 1 has no field 'text'.*'body'"):
        read_documents([str(tmp_path)])


FAULTS = {
    "no json": ('{"text": ', r"line 2 is not JSON \(Expecting value.*cure the line"),
    "no utf-8": (b'{"text": "caf\xe9"}', "line 2 is not JSON .*utf-8"),
    "deep": ("[" * 200_000, "line 2 is not JSON .brackets are nested too deep"),
    "no object": ("[1]", "line 2 holds a list, not a JSON object"),
    "no field": (
        '{"body": "a", "url": ""}',
        "line 2 has no field 'text': .*--text_field: 'body', 'url'",
    ),
    "no fields": ("{}", "line 2 has no field 'text': .*it has none"),
    "many fields": (json.dumps({f"f{i}": 0 for i in range(40)}), "'f11', ...$"),
    "null": ('{"text": null}', "line 2: field 'text' is a NoneType, not a string"),
    "number": ('{"text": 3}', "line 2: field 'text' is a int, not a string"),
    "surrogate": ('{"text": "ab\\ud800"}', "line 2: .*half a character .* at 2"),
}


@pytest.mark.parametrize("line, message", FAULTS.values(), ids=FAULTS)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "good"}\n')
    with file.open("ab") as stream:
        stream.write(line if isinstance(line, bytes) else line.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_documents([str(file)])
    assert str(error.value).startswith(f"{file}, line 2")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.txt.gz"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "no gzip"])
def test_a_damaged_gzip_is_named(tmp_path, name, damage):
    texts = ["words " * 50 + str(i) for i in range(9)]
    data = bytearray(gzip.compress(make_lines(texts)))
    if damage == "cut":
        del data[-9:]
    elif damage == "flipped":
        data[-6] ^= 1
    else:
        data = b"plain"
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="is a damaged gzip file") as error:
        read_documents([str(tmp_path)])
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_packed_text_is_one_document(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("zwei \u00e4".encode()))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"a\0b"))
    (tmp_path / "c.gz").write_bytes(gzip.compress(b"not asked for"))
    assert read_documents([str(tmp_path)]) == [Document("a.txt.gz", "zwei \u00e4")]


def test_no_line_at_all_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    corpus = open_corpus([str(tmp_path)])
    with pytest.raises(ValueError, match="none of 1 sources holds .*'a.jsonl'"):
        list(corpus.iterate(0))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_file_that_changed_is_named(tmp_path, name):
    (tmp_path / name).write_text('{"text": "a"}\n')
    opened = open_corpus([str(tmp_path)])
    assert opened.identity
    (tmp_path / name).write_text('{"text": "ab"}\n')
    with pytest.raises(ValueError, match=f"{name} has changed since"):
        list(opened.iterate(0))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(corpus, "_SHUFFLED_DOCUMENTS", 1)
    file = tmp_path / f"a.jsonl{suffix}"
    data = make_lines(TEXTS)
    file.write_bytes(gzip.compress(data) if suffix else data)
    documents = open_corpus([str(file)]).iterate(0)
    next(documents)
    os.utime(file, ns=(0, 0))
    with pytest.raises(ValueError, match=f"{file.name} has changed since"):
        list(documents)
