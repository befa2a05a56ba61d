"""Tables: Parquet, and the Arrow files that `datasets` saves. A row is a document.

Only the column of the text is read; of Parquet, a row group or two are in memory, and
of Arrow the rows at hand. Both want pyarrow.
"""

import contextlib
import functools
import json
import re
from collections.abc import Iterator
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
    _check_column(path, text_field)
    file = hash_file(name, path, read_pieces(path))
    identity = f"{text_field} {file.sha256}"
    return Source(name, identity, functools.partial(_read, file, text_field))


def _check_column(path: Path, text_field: str) -> None:
    with _naming_damage(path), _open(path) as table:
        schema = table.schema_arrow if _is_parquet(path) else table.schema
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


def _read(file: File, text_field: str) -> Iterator[Document]:
    number = 0
    with (
        file.unchanged(),
        _naming_damage(file.path),
        _open(Path(file.path)) as table,
    ):
        for batch in _read_batches(table, text_field):
            for text in batch.column(text_field).to_pylist():
                number += 1
                check_text(text, text_field, f"{file.path}, row {number}")
                yield Document(f"{file.name}:{number}", text)


def _read_batches(table: Any, text_field: str) -> Iterator[Any]:
    if hasattr(table, "iter_batches"):
        yield from table.iter_batches(_ROWS_AT_ONCE, columns=[text_field])
        return
    for batch in table:
        for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
            yield batch.slice(start, _ROWS_AT_ONCE)


def _open(path: Path) -> Any:
    if _is_parquet(path):
        parquet = import_extra("pyarrow.parquet")
        return parquet.ParquetFile(path, page_checksum_verification=True)
    arrow = import_extra("pyarrow")
    return arrow.ipc.open_stream(arrow.memory_map(str(path)))


def _is_parquet(path: Path) -> bool:
    return path.name.lower().endswith(".parquet")


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
