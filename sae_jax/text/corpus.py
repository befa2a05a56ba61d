"""A corpus: the documents of many sources, in an order that a seed chooses.

The order depends on the seed and on what is in the sources, not on where they lie or
how they are listed: the blocks of all sources are taken in a permuted order, and the
documents of those that hold many go through a buffer from which each is drawn at
random. So a part of the corpus is a fair sample of it, as far as sources have blocks:
one of gzip or of the Hub is a single block, read from its beginning. Of the text no
more than that buffer is in memory.
"""

import functools
import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from sae_jax.text.files import decode_name, open_text, walk
from sae_jax.text.hub import PREFIX, open_hub
from sae_jax.text.lines import is_lines, open_lines
from sae_jax.text.source import TEXT_FIELD, Document, Source, show_names
from sae_jax.text.tables import TABLES, open_table

# What the buffer holds at most. A character takes one to four bytes.
_SHUFFLED_DOCUMENTS = 10_000
_SHUFFLED_CHARACTERS = 2**26


class Corpus:
    """Documents to iterate over, as often as wanted. At least one source is needed.

    The sources are opened, which takes reading them, when `identity` or documents are
    first asked for. `identity` is a sha256 of their names and contents. A source takes
    about a kilobyte of memory, and some bytes for each of its blocks.
    """

    def __init__(self, open_sources: Callable[[], Iterable[Source]]):
        self._open_sources = open_sources

    @functools.cached_property
    def identity(self) -> str:
        digest = hashlib.sha256()
        for source in self._sources:
            for part in (source.name, source.identity):
                data = part.encode()
                digest.update(len(data).to_bytes(8, "big") + data)
        return digest.hexdigest()

    def iterate(self, seed: int) -> Iterator[Document]:
        """Every document once, in the order of the seed.

        Raises ValueError, on the way, for text that cannot be read, or at the end
        if there was no document.
        """
        n_documents = 0
        for n_documents, document in enumerate(self._shuffle(seed), start=1):
            yield document
        if not n_documents:
            names = show_names(source.name for source in self._sources)
            raise ValueError(
                f"no text: none of {len(self._sources)} sources holds a document: give "
                f"files with text in them: {names}"
            )

    @functools.cached_property
    def _sources(self) -> list[Source]:
        return sorted(
            self._open_sources(), key=lambda source: (source.name, source.identity)
        )

    def _shuffle(self, seed: int) -> Iterator[Document]:
        blocks = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
        drawn = random.Random(seed)
        stops = np.cumsum([len(source.blocks) for source in self._sources])
        held: list[Document] = []
        n_characters = 0
        for place in blocks.permutation(sum(stops[-1:])):
            index = np.searchsorted(stops, place, side="right")
            source = self._sources[index]
            block = source.blocks[place - stops[index]]  # counted from the last
            for document in source.read(*block):
                held.append(document)
                n_characters += len(document.text)
                # A block of one document is mixed with others by the permutation.
                is_mixed = source.is_document_a_block
                most = len(held) - 1 if is_mixed else _SHUFFLED_DOCUMENTS
                while len(held) > most or n_characters > _SHUFFLED_CHARACTERS:
                    document = _draw(held, drawn)
                    n_characters -= len(document.text)
                    yield document
        while held:
            yield _draw(held, drawn)


def open_corpus(paths: Sequence[str], text_field: str = TEXT_FIELD) -> Corpus:
    """The text under `paths`: files, folders, and datasets of the Hub as `hf:NAME`.

    Folders are walked whole; hidden folders, links that lead out of the folder,
    and files that hold a NUL or do not decode are left out. A file that is named
    itself is held to the same test. Records give their field `text_field`. Raises
    FileNotFoundError for a path that is not there and ValueError where two paths give
    the same file; and, when the corpus is first used, which reads every file once for
    its hash, ValueError where a path gives no text or a file is damaged.
    """
    if not paths:
        raise ValueError("no text: the list of paths is empty; give a folder")
    files = [_list_files(path) for path in paths]
    _check_apart(paths, files)
    return Corpus(
        lambda: (
            source
            for path, its in zip(paths, files, strict=True)
            for source in _open_path(path, its, text_field)
        )
    )


def corpus_of(documents: Iterable[Document]) -> Corpus:
    """The corpus of documents that are in memory."""
    sources = [
        Source(
            document.name,
            hashlib.sha256(document.text.encode()).hexdigest(),
            functools.partial(iter, (document,)),
            is_document_a_block=True,
        )
        for document in documents
    ]
    return Corpus(lambda: sources)


def read_documents(
    paths: Sequence[str], text_field: str = TEXT_FIELD
) -> list[Document]:
    """All documents of `open_corpus`, sorted by name, in memory."""
    return list_documents(open_corpus(paths, text_field))


def list_documents(corpus: Corpus) -> list[Document]:
    """All documents of the corpus, sorted by name, in memory."""
    return sorted(
        corpus.iterate(seed=0), key=lambda document: (document.name, document.text)
    )


def _list_files(text_path: str) -> list[tuple[str, Path]]:
    """Name and path of each file; of a dataset of the Hub, its address."""
    root = Path(text_path)
    if text_path.startswith(PREFIX):
        return [(text_path, root)]
    if root.is_file():
        return [(decode_name(root.name), root)]
    if root.is_dir():
        return list(walk(root))
    raise FileNotFoundError(
        f"no file or folder {text_path!r}: give a text file or a folder of them"
    )


def _check_apart(
    paths: Sequence[str], files: Sequence[Sequence[tuple[str, Path]]]
) -> None:
    """ValueError if two of the paths give the same file."""
    given: dict[str, int] = {}
    for index, its in enumerate(files):
        for _, file in its:
            first = given.setdefault(os.path.realpath(file), index)
            if first != index:
                raise ValueError(
                    f"{str(file)!r} is given twice, by {paths[first]!r} and by "
                    f"{paths[index]!r}: name it once, as its documents would count "
                    "double"
                )


def _open_path(
    text_path: str, files: Sequence[tuple[str, Path]], text_field: str
) -> list[Source]:
    if text_path.startswith(PREFIX):
        return [open_hub(text_path, text_field)]
    found = [_open_file(name, path, text_field) for name, path in files]
    sources = [source for source in found if source]
    if not sources:
        raise ValueError(
            f"no text in {text_path!r}: found {len(files)} files, none decodes as "
            "UTF-8 without NUL bytes; give a folder with text files"
        )
    return sources


def _open_file(name: str, path: Path, text_field: str) -> Source | None:
    if path.name.lower().endswith(TABLES):
        return open_table(name, path, text_field)
    if is_lines(path, text_field):
        return open_lines(name, path, text_field)
    return open_text(name, path)


def _draw(held: list[Document], drawn: random.Random) -> Document:
    index = int(drawn.random() * len(held))
    held[index], held[-1] = held[-1], held[index]
    return held.pop()
