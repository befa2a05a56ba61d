"""Documents to read from: text files, folders of them, the standard library."""

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# What of the standard library is not text for a language model: other people's
# packages, tests (larger than the library itself), and two kinds of file that
# carry the paths of the machine that built this Python.
_NOT_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
_BUILD_FILES = "_sysconfigdata"
_BUILD_FOLDERS = "config-"


@dataclass(frozen=True)
class Document:
    """A text and its name: a posix path relative to the root it was found in."""

    name: str
    text: str


def read_documents(paths: Sequence[str]) -> list[Document]:
    """Every UTF-8 text under `paths` (files or folders), sorted by name.

    Folders are walked whole; hidden folders, links that lead out of the folder,
    and files that hold a NUL or do not decode are left out. A file that is named
    itself is held to the same test. Raises FileNotFoundError for a path that is
    not there and ValueError where a path gives no text.
    """
    documents: list[Document] = []
    for text_path in paths:
        root = Path(text_path)
        if root.is_file():
            files = [(_decode_name(root.name), root)]
        elif root.is_dir():
            files = list(_walk(root))
        else:
            raise FileNotFoundError(
                f"no file or folder {text_path!r}: give a text file or a folder of them"
            )
        found = [
            Document(name, text)
            for name, file in files
            if (text := _read_text(file)) is not None
        ]
        if not found:
            raise ValueError(
                f"no text in {text_path!r}: found {len(files)} files, none decodes as "
                "UTF-8 without NUL bytes; give a folder with text files"
            )
        documents += found
    if not documents:
        raise ValueError("no text: the list of paths is empty; give a folder")
    return sorted(documents, key=lambda document: (document.name, document.text))


def read_standard_library() -> list[Document]:
    """The source of the running Python's standard library, sorted by name.

    Without installed packages, tests and build records, so that the text depends
    on the Python version alone and names no machine.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = [
        Document(name, text)
        for name, file in _walk(root)
        if _is_library_source(name) and (text := _read_text(file)) is not None
    ]
    if not documents:
        raise ValueError(
            f"no text in {str(root)!r}: this Python carries its standard library "
            "without source; give a folder with text files"
        )
    return sorted(documents, key=lambda document: document.name)


def hash_name(name: str) -> int:
    """The first 8 bytes of the name's SHA-256, big endian: the same everywhere."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def is_heldout(name: str, every: int) -> bool:
    """Whether the document is held out: one in `every`, by the hash of its name.

    The default subject held out every=20, activation stores hold out every=5.
    Since 5 divides 20, what the subject never saw is held out of every store too.
    """
    return hash_name(name) % every == 0


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    inside = root.resolve()
    for folder, subfolders, files in os.walk(root, followlinks=False):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for file in sorted(files):
            path = Path(folder, file)
            # Also passes over pipes and sockets, which would block a reader.
            if path.is_file() and path.resolve().is_relative_to(inside):
                yield _decode_name(path.relative_to(root).as_posix()), path


def _decode_name(name: str) -> str:
    """The name as text: bytes of it that are not UTF-8 become `\\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _read_text(path: Path) -> str | None:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _is_library_source(name: str) -> bool:
    *folders, file = name.split("/")
    return (
        file.endswith(".py")
        and not file.startswith(_BUILD_FILES)
        and _NOT_LIBRARY.isdisjoint(folders)
        and not any(folder.startswith(_BUILD_FOLDERS) for folder in folders)
    )
