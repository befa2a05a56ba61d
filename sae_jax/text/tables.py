"""Tables: Parquet, and Arrow as a stream (as `datasets` saves it) or a file (Feather).
A row is a document.

Only the column of the text is read; of Parquet, a row group or two are in memory, and
of Arrow a record batch. These are the blocks of a table. Both want pyarrow.
"""

import contextlib
import functools
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sae_jax.text.source import (
    Document,
    File,
    Source,
    check_text,
    hash_file,
    import_extra,
    read_pieces,
    show_names,
)

TABLES = (".parquet", ".arrow")
# What `save_to_disk` leaves beside the tables: which they are, and what is in them.
_STATE = "state.json"
_INFO = "dataset_info.json"
_SPLITS = "dataset_dict.json"
_WORD = b"ARROW1"
_MAGIC = _WORD + b"\0\0"
_ROWS_AT_ONCE = 64
_STRINGS = re.compile("(dictionary<values=)?(large_)?string")


def list_saved_tables(folder: Path, files: list[str]) -> list[str]:
    """Of the files of a folder that `datasets` saved, its tables; of others, all."""
    if not {_STATE, _INFO} <= set(files):
        return [file for file in files if file != _SPLITS]
    try:
        state = json.loads((folder / _STATE).read_text("utf-8"))
        tables = [file["filename"] for file in state["_data_files"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{folder / _STATE} does not list a dataset's files: save it again with "
            "save_to_disk"
        ) from None
    if missing := set(tables) - set(files):
        raise ValueError(
            f"{folder / _STATE} lists files that are not beside it: save the dataset "
            f"again with save_to_disk: {show_names(sorted(missing))}"
        )
    return tables


def open_table(name: str, path: Path, text_field: str) -> Source:
    """The documents of a Parquet or an Arrow file, named by their row."""
    is_parquet = path.name.lower().endswith(".parquet")
    find_blocks = _find_row_groups if is_parquet else _find_batches
    read_block = _read_row_group if is_parquet else _read_batches
    with _naming_damage(path):
        schema, blocks = find_blocks(path)
    _check_column(path, schema, text_field)
    file = hash_file(name, path, read_pieces(path))
    identity = f"{text_field} {file.sha256}"
    read = functools.partial(_read, file, text_field, read_block)
    return Source(name, identity, read, blocks)


def _check_column(path: Path, schema: Any, text_field: str) -> None:
    if text_field not in schema.names:
        raise ValueError(
            f"{path} has no column {text_field!r}: name one of its columns with "
            f"--text_field: {show_names(schema.names)}"
        )
    kind = schema.field(text_field).type
    if not _STRINGS.match(str(kind)):
        raise ValueError(
            f"{path}: column {text_field!r} holds {kind}, not strings: name another "
            f"with --text_field: {show_names(schema.names)}"
        )


def _read(
    file: File,
    text_field: str,
    read_block: Callable[..., Iterator[Any]],
    n_before: int,
    *block: int,
) -> Iterator[Document]:
    number = n_before
    with file.unchanged(), _naming_damage(file.path):
        for column in read_block(file.path, text_field, *block):
            for text in column.to_pylist():
                number += 1
                check_text(text, text_field, f"{file.path}, row {number}")
                yield Document(f"{file.name}:{number}", text)


def _find_row_groups(path: Path) -> tuple[Any, list[tuple[int, int]]]:
    """The schema of a Parquet file; the rows before each row group, and its number."""
    with _open_parquet(path) as table:
        groups = range(table.num_row_groups)
        n_rows = [table.metadata.row_group(group).num_rows for group in groups]
        before = itertools.accumulate(n_rows, initial=0)
        return table.schema_arrow, list(zip(before, groups))


def _read_row_group(path: str, text_field: str, group: int) -> Iterator[Any]:
    with _open_parquet(path) as table:
        for batch in table.iter_batches(
            _ROWS_AT_ONCE, row_groups=[group], columns=[text_field]
        ):
            yield batch.column(text_field)


def _open_parquet(path: str | Path) -> Any:
    parquet = import_extra("pyarrow.parquet")
    return parquet.ParquetFile(path, page_checksum_verification=True)


def _find_batches(path: Path) -> tuple[Any, list[tuple[int, int, int]]]:
    """The schema of an Arrow file; the rows before each record batch, where it lies,
    and that it is one. With dictionaries, which lie between, the batches are one block.
    """
    with _open_arrow(path) as (source, batches):
        blocks, n_rows, place = [], 0, source.tell()
        first = place
        for batch in batches:
            blocks.append((n_rows, place, 1))
            n_rows, place = n_rows + batch.num_rows, source.tell()
        if "dictionary<" in str(batches.schema.types):
            blocks = [(0, first, sys.maxsize)]
        return batches.schema, blocks


def _read_batches(
    path: str, text_field: str, place: int, n_batches: int
) -> Iterator[Any]:
    with _open_arrow(path) as (source, batches):
        source.seek(place)
        for batch in itertools.islice(batches, n_batches):
            column = batch.column(text_field)
            for start in range(0, len(column), _ROWS_AT_ONCE):
                yield column.slice(start, _ROWS_AT_ONCE)


@contextlib.contextmanager
def _open_arrow(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """The file, and its record batches from where in the file it stands."""
    arrow = import_extra("pyarrow")
    with arrow.memory_map(str(path)) as source:
        # A file is a magic word, a stream, and a footer that ends in the word again.
        is_file = source.read(len(_MAGIC)) == _MAGIC
        if is_file and source.read_at(len(_WORD), source.size() - len(_WORD)) != _WORD:
            raise arrow.ArrowInvalid("its end is missing")
        source.seek(len(_MAGIC) if is_file else 0)
        yield source, arrow.ipc.open_stream(source)


@contextlib.contextmanager
def _naming_damage(path: str | Path) -> Iterator[None]:
    errors = import_extra("pyarrow").ArrowException, OSError, UnicodeDecodeError
    try:
        yield
    except errors as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is not a whole table ({said}): fetch or write it again"
        ) from None
