"""Files and folders: which files there are, and those that are one text each."""

import codecs
import functools
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

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
    """The file as one document; None if it holds a NUL or is not UTF-8."""
    try:
        file = hash_file(name, path, _decode(path))
    except UnicodeError:
        return None
    read = functools.partial(_read_text, file)
    return Source(name, file.sha256, read, is_one_document=True)


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


def _read_text(file: File) -> Iterator[Document]:
    with file.unchanged(), _open(Path(file.path)) as stream, naming_damage(file.path):
        data = stream.read()
    yield Document(file.name, data.decode("utf-8"))


def _open(path: Path) -> IO[bytes]:
    is_packed = path.name.lower().endswith(".txt.gz")
    return open_stream(path) if is_packed else path.open("rb")
