"""The text that is always there: the running Python's standard library."""

import sysconfig
from pathlib import Path

from sae_jax.text.corpus import Corpus, list_documents
from sae_jax.text.files import open_text, walk
from sae_jax.text.source import Document, Source

# What of the standard library is not text for a language model: other people's
# packages, tests (larger than the library itself), and two kinds of file that
# carry the paths of the machine that built this Python.
_NOT_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
_BUILD_FILES = "_sysconfigdata"
_BUILD_FOLDERS = "config-"


def standard_library() -> Corpus:
    """The source of the running Python's standard library.

    Without installed packages, tests and build records, so that the text depends
    on the Python version alone and names no machine.
    """
    return Corpus(_open_library)


def read_standard_library() -> list[Document]:
    """Its documents, sorted by name."""
    return list_documents(standard_library())


def _open_library() -> list[Source]:
    root = Path(sysconfig.get_path("stdlib"))
    sources = [
        source
        for name, path in walk(root, without=_NOT_LIBRARY)
        if _is_library_source(name) and (source := open_text(name, path))
    ]
    if not sources:
        raise ValueError(
            f"no text in {str(root)!r}: this Python carries its standard library "
            "without source; give a folder with text files"
        )
    return sources


def _is_library_source(name: str) -> bool:
    *folders, file = name.split("/")
    return (
        file.endswith(".py")
        and not file.startswith(_BUILD_FILES)
        and not any(folder.startswith(_BUILD_FOLDERS) for folder in folders)
    )
