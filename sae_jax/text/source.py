"""What a corpus is made of: documents, the sources that give them, files on a disk."""

import contextlib
import gzip
import hashlib
import importlib
import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

TEXT_FIELD = "text"
_SHOWN_FIELDS = 12
_BUFFER = 2**20  # bytes
PIECE = 2**16  # bytes of a file that are hashed at once


@dataclass(frozen=True)
class Document:
    """A text and its name, which chooses its split."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Source:
    """What gives documents: the same, in the same order, at every reading.

    `identity` tells its content and how that is read, but not where it lies. The
    documents of `blocks[i]` are `read(*blocks[i])`; they can be read in any order.
    `is_document_a_block` tells that each block is one document.
    """

    name: str
    identity: str
    read: Callable[..., Iterator[Document]]
    blocks: Sequence[Sequence[int]] | NDArray[np.int64] = ((),)
    is_document_a_block: bool = False


@dataclass(frozen=True, slots=True)
class File:
    """A file as it was when its corpus was opened."""

    name: str  # its path below what was given
    path: str
    sha256: str
    size: int
    changed_ns: int

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """ValueError if the file, before or after, is not the one that was hashed."""
        self._check()
        yield
        self._check()

    def _check(self) -> None:
        status = Path(self.path).stat()
        if (status.st_size, status.st_mtime_ns) != (self.size, self.changed_ns):
            raise ValueError(
                f"{self.path} has changed since its corpus was opened: leave the text "
                "alone and start again"
            )


def hash_file(name: str, path: Path, pieces: Iterable[bytes]) -> File:
    """The file; its hash is that of the pieces, which are read now."""
    status = path.stat()
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return File(
        name, str(path), digest.hexdigest(), status.st_size, status.st_mtime_ns
    )


def read_pieces(path: Path) -> Iterator[bytes]:
    """The file's bytes, as they lie on the disk."""
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            yield piece


def is_packed(path: str | Path) -> bool:
    """Whether it is packed by gzip, by its name."""
    return str(path).lower().endswith(".gz")


def open_stream(path: str | Path) -> IO[bytes]:
    """The file's bytes, unpacked where it is packed."""
    if is_packed(path):
        return io.BufferedReader(gzip.open(path), _BUFFER)  # alone it is slow by line
    return open(path, "rb")


@contextlib.contextmanager
def naming_damage(path: str | Path) -> Iterator[None]:
    """ValueError, naming the file, where it is no whole gzip file."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} is a damaged gzip file ({error}): fetch or write it again"
        ) from None


def take_text(record: Any, text_field: str, where: str) -> str:
    """The text of a record; ValueError, saying `where`, if it has none."""
    if not isinstance(record, dict):
        raise ValueError(
            f"{where} holds a {type(record).__name__}, not a JSON object: give one "
            "object a line"
        )
    if text_field not in record:
        raise ValueError(
            f"{where} has no field {text_field!r}: leave it out, or name one of its "
            f"fields with --text_field: {show_names(record)}"
        )
    return check_text(record[text_field], text_field, where)


def check_text(text: Any, text_field: str, where: str) -> str:
    """The text itself, if it is one that can be tokenised."""
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: field {text_field!r} is a {type(text).__name__}, not a string: "
            "cure the record or leave it out"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: field {text_field!r} holds half a character (a lone surrogate) "
            f"at {error.start}: cure the record or leave it out"
        ) from None
    return text


def show_names(names: Any) -> str:
    """The first names of many, as a reader of an error wants them."""
    shown = [repr(name) for name in names]
    more = ["..."] if len(shown) > _SHOWN_FIELDS else []
    return ", ".join(shown[:_SHOWN_FIELDS] + more) or "it has none"


def import_extra(module: str) -> Any:
    """The module, which only the extra `text` brings."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"to read this text, {error.name} must be installed: run "
            "pip install 'sae_jax[text]'"
        ) from None


def hash_name(name: str) -> int:
    """The first 8 bytes of the name's SHA-256, big endian: the same everywhere."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def is_heldout(name: str, every: int) -> bool:
    """Whether the document is held out: one in `every`, by the hash of its name.

    The default subject held out every=20, activation stores hold out every=5.
    Since 5 divides 20, what the subject never saw is held out of every store too.
    """
    return hash_name(name) % every == 0
