"""JSON lines: a document for each line, `{"text": "..."}`; plain or packed by gzip."""

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae_jax.text.source import (
    Document,
    File,
    Source,
    hash_file,
    naming_damage,
    open_stream,
    read_pieces,
    take_text,
)


def is_lines(path: Path, text_field: str) -> bool:
    """Whether the file is JSON lines, by its name; of a .json file, by its first lines.

    There the first must be a whole object that has the field, or that another follows:
    a .json file that is no lines holds one value, on one line or on many.
    """
    name = path.name.lower().removesuffix(".gz")
    if not name.endswith(".json"):
        return name.endswith((".jsonl", ".ndjson"))
    with open_stream(path) as stream, naming_damage(path):
        lines = list(itertools.islice(filter(bytes.strip, stream), 2))
    try:
        first, *rest = map(_parse, lines)
    except ValueError:
        return False
    return isinstance(first, dict) and (text_field in first or bool(rest))


def open_lines(name: str, path: Path, text_field: str) -> Source:
    """The documents of a file of JSON lines, named by their line."""
    file = hash_file(name, path, read_pieces(path))
    identity = f"{text_field} {file.sha256}"
    return Source(name, identity, functools.partial(_read, file, text_field))


def _read(file: File, text_field: str) -> Iterator[Document]:
    with (
        file.unchanged(),
        open_stream(file.path) as stream,
        naming_damage(file.path),
    ):
        for number, line in enumerate(stream, start=1):
            if line.strip():
                where = f"{file.path}, line {number}"
                text = take_text(_parse_at(line, where), text_field, where)
                yield Document(f"{file.name}:{number}", text)


def _parse_at(line: bytes, where: str) -> Any:
    try:
        return _parse(line)
    except ValueError as error:
        raise ValueError(
            f"{where} is not JSON ({error}): cure the line or leave it out"
        ) from None


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("brackets are nested too deep") from None
