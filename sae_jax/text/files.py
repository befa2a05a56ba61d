"""Files and folders: which files there are, and those that are plain text.

A file of text is one document. One that is longer than a MiB is a document for each MiB
or a little more, cut behind a paragraph, or else a line, a space or a character: so a
corpus in one file can be held out in part, and is never in memory as a whole.
"""

import codecs
import functools
import os
from array import array
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from sae_jax.text.source import (
    PIECE,
    Document,
    File,
    Source,
    hash_file,
    naming_damage,
    open_stream,
)
from sae_jax.text.tables import list_saved_tables

_PART_BYTES = 2**20
_MARKS = (b"\n\n", b"\n", b" ")


def walk(root: Path, without: Collection[str] = ()) -> Iterator[tuple[str, Path]]:
    """(name, path) of every file in a folder.

    Not in hidden folders or those called as one of `without`, and none that a link
    leads out of the folder to. Of a folder that `datasets` saved, its tables alone.
    """
    inside = root.resolve()
    for folder, subfolders, files in os.walk(root, followlinks=False):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".") and name not in without
        )
        for file in sorted(list_saved_tables(Path(folder), files)):
            path = Path(folder, file)
            # Also passes over pipes and sockets, which would block a reader.
            if path.is_file() and path.resolve().is_relative_to(inside):
                yield decode_name(path.relative_to(root).as_posix()), path


def decode_name(name: str) -> str:
    """The name as text: bytes of it that are not UTF-8 become `\\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def open_text(name: str, path: Path) -> Source | None:
    """The file's documents; None if it holds a NUL or is not UTF-8."""
    bounds = array("q", (0,))  # of the documents, in bytes
    try:
        file = hash_file(name, path, _find_bounds(_decode(path), bounds))
    except UnicodeError:
        return None
    n_documents = len(bounds) - 1
    # What is packed can be read from its beginning alone.
    n_at_once = n_documents if _is_packed(path) else 1
    first_n = np.arange(0, n_documents, n_at_once)
    return Source(
        name,
        file.sha256 if n_documents == 1 else f"{_PART_BYTES} {file.sha256}",
        functools.partial(_read, file, bounds),
        np.stack([first_n, first_n + n_at_once], 1),
        is_document_a_block=n_at_once == 1,
    )


def _find_bounds(pieces: Iterable[bytes], bounds: "array[int]") -> Iterator[bytes]:
    """The pieces; once a document is long enough, it ends within the next."""
    place = 0
    for piece in pieces:
        cut = _find_cut(piece) if place >= bounds[-1] + _PART_BYTES else None
        if cut is not None:
            bounds.append(place + cut)
        place += len(piece)
        yield piece
    bounds.append(place)


def _find_cut(piece: bytes) -> int | None:
    """Where a document may end, so that the next has something of the piece."""
    for mark in _MARKS:
        place = piece.find(mark, 0, -1)
        if place >= 0:
            return place + len(mark)
    is_start = (byte & 0b1100_0000 != 0b1000_0000 for byte in piece)  # of a character
    return next((place for place, it in enumerate(is_start) if it), None)


def _decode(path: Path) -> Iterator[bytes]:
    """The file's bytes, unpacked; UnicodeError where they are no text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open(path) as stream, naming_damage(path):
        while piece := stream.read(PIECE):
            if b"\0" in piece:
                raise UnicodeError
            decoder.decode(piece)
            yield piece
        decoder.decode(b"", final=True)


def _read(
    file: File, bounds: "array[int]", first: int, stop: int
) -> Iterator[Document]:
    with file.unchanged(), _open(Path(file.path)) as stream, naming_damage(file.path):
        stream.seek(bounds[first])
        for number in range(first, stop):
            data = stream.read(bounds[number + 1] - bounds[number])
            name = file.name if len(bounds) == 2 else f"{file.name}:{number + 1}"
            yield Document(name, data.decode("utf-8"))


def _open(path: Path) -> IO[bytes]:
    return open_stream(path) if _is_packed(path) else path.open("rb")


def _is_packed(path: Path) -> bool:
    return path.name.lower().endswith(".txt.gz")
