"""JSON lines: a document for each line, `{"text": "..."}`; plain or packed by gzip.

A plain file has blocks of whole lines, which are found while it is hashed; a packed one
can be read from its beginning alone.
"""

import functools
import itertools
import json
import sys
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sae_jax.text.source import (
    Document,
    File,
    Source,
    hash_file,
    is_packed,
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
    starts = array("q", (0, 0))  # of each block, and the lines before it
    pieces = read_pieces(path)
    if not is_packed(path):
        pieces = _find_blocks(pieces, starts)
    file = hash_file(name, path, pieces)
    start_n, before_n = np.reshape(starts, (-1, 2)).T
    blocks = np.stack([start_n, before_n, np.diff(before_n, append=sys.maxsize)], 1)
    identity = f"{text_field} {file.sha256}"
    return Source(name, identity, functools.partial(_read, file, text_field), blocks)


def _find_blocks(pieces: Iterable[bytes], starts: "array[int]") -> Iterator[bytes]:
    """The pieces; behind the first end of a line in each but the first, a block
    begins."""
    place = n_lines = 0
    for piece in pieces:
        n_first = piece.find(b"\n") + 1
        if place and n_first:
            starts.extend((place + n_first, n_lines + 1))
        place += len(piece)
        n_lines += piece.count(b"\n")
        yield piece


def _read(
    file: File, text_field: str, start: int, n_before: int, n_lines: int
) -> Iterator[Document]:
    with (
        file.unchanged(),
        open_stream(file.path) as stream,
        naming_damage(file.path),
    ):
        stream.seek(start)
        lines = itertools.islice(stream, n_lines)
        for number, line in enumerate(lines, n_before + 1):
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
