"""Reading of a store that may be incomplete or damaged: all that can be read, is.

What cannot be read comes as None, and `faults` says of each file what is wrong with it.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from sae_jax.store.folder import Folder, raise_unless_data
from sae_jax.store.layout import (
    MISSING,
    ArrayLayout,
    Manifest,
    acts_name,
    list_recorded,
    list_row_arrays,
    list_text_arrays,
    scales_name,
    tell_damage,
)
from sae_jax.store.quantise import Stored
from sae_jax.store.whole import find_bad_files, list_files

_BYTES_AHEAD = 2**27  # read while what came before is worked on


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a file: `start` to `stop` of shard `shard` of the array `name`."""

    name: str
    shard: int
    start: int
    stop: int


class CheckedFiles:
    """The arrays of a store, as far as it is written.

    `written` are the row shards that are safe, ascending, and `faults` what is wrong,
    by the file's name in the store. `bytes_read` counts what could not be read, too. A
    service that does not answer, or lets nobody in, is an OSError.
    """

    def __init__(self, folder: Folder, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self.row_shards = manifest.row_shards
        self.written = sorted(list_recorded(folder, manifest))
        if manifest.complete:  # a record that is missing is a fault, see `verify`
            self.written = list(range(len(self.row_shards)))
        self.faults: dict[str, str] = {}
        self.bytes_read = 0
        texts, rows = list_text_arrays(manifest), list_row_arrays(manifest)
        self._layouts = {array.name: array for array in texts + rows}
        self._n_shards = dict.fromkeys((a.name for a in rows), len(self.row_shards))
        self._n_shards |= {a.name: len(manifest.text_shards) for a in texts}
        self._arrays: dict[str, Any] = {}

    def note(self, file: str, fault: str) -> None:
        """What is wrong with a file; the first that is found is kept."""
        self.faults.setdefault(file, fault)

    def note_error(self, error: ValueError) -> None:
        """What an error tells that begins with the name of a file of the store."""
        text = str(error).removeprefix("cannot read ")
        is_read = text == str(error)
        file, _, rest = text.removeprefix(self.folder.name_file("")).partition(" ")
        self.note(file.rstrip(":"), rest if is_read else f"cannot be read: {rest}")

    def list_files(self) -> list[tuple[ArrayLayout, int, int]]:
        """(array, shard, filled length) of every file that should be there."""
        written, texts = set(self.written), ("tokens", "documents")
        return [
            (array, shard, length)
            for array, shard, length in list_files(self.manifest)
            if array.name in texts or shard in written
        ]

    def note_bad_files(self) -> None:
        """Files that are missing, or on a disk of another size than they should be."""
        for file, fault in find_bad_files(self.folder, self.list_files()):
            self.note(file, fault)

    def count_bytes(self, piece: Piece) -> int:
        array = self._layouts[piece.name]
        return (piece.stop - piece.start) * array.item_bytes

    def name_file(self, piece: Piece) -> str:
        return self._layouts[piece.name].shard_file(piece.shard)

    def read(self, pieces: Iterable[Piece]) -> Iterator[np.ndarray | None]:
        """The values of each piece in turn, some of them read ahead."""
        pending: collections.deque[tuple[Piece, Any]] = collections.deque()
        n_ahead = 0
        for piece in pieces:
            pending.append((piece, self._start(piece)))
            n_ahead += self.count_bytes(piece)
            while n_ahead > _BYTES_AHEAD:
                first, read = pending.popleft()
                n_ahead -= self.count_bytes(first)
                yield self._finish(first, read)
        for piece, read in pending:
            yield self._finish(piece, read)

    def split_rows(self, site: str, shard: int, start: int, stop: int) -> list[Piece]:
        """What has these rows: their activations and, for int8, their scales."""
        names = [acts_name(site)]
        if self.manifest.dtype == "int8":
            names.append(scales_name(site))
        return [Piece(name, shard, start, stop) for name in names]

    def take_rows(self, values: Iterator[np.ndarray | None]) -> np.ndarray | None:
        """The rows of `split_rows`, bfloat16, from what was read of its pieces."""
        rows = next(values)
        if self.manifest.dtype == "bfloat16":
            return rows
        scales = next(values)
        if rows is None or scales is None:
            return None
        with np.errstate(invalid="ignore", over="ignore"):  # of a scale of infinity
            return Stored(rows, scales).decode()

    def _start(self, piece: Piece) -> Any:
        """The read of a piece, begun; None if its array or its file is at fault."""
        array = self._layouts[piece.name]
        metadata = f"{piece.name}/zarr.json"
        if {metadata, self.name_file(piece)} & self.faults.keys():
            return None
        if piece.name not in self._arrays:
            try:
                n_shards = self._n_shards[piece.name]
                self._arrays[piece.name] = array.open(self.folder, n_shards)
            except ValueError as error:
                self.note(metadata, _tell(error))
                return None
        first = piece.shard * array.shard_length
        begin = piece.start
        if array.by_chunk:  # of several chunks of rows, where a row takes few bytes
            begin -= begin % array.chunk_length
        values = self._arrays[piece.name]
        return array.select(values, first + begin, first + piece.stop).read()

    def _finish(self, piece: Piece, read: Any) -> np.ndarray | None:
        self.bytes_read += self.count_bytes(piece)
        if read is None:
            return None
        try:
            return self._cut(piece, read.result())
        except (ValueError, OSError) as error:
            raise_unless_data(self.folder, error)
            self.note(self.name_file(piece), _tell(error))
            return None

    def _cut(self, piece: Piece, values: np.ndarray) -> np.ndarray:
        array = self._layouts[piece.name]
        if not array.by_chunk:
            return values
        skip = piece.start % array.chunk_length
        values = values.reshape(-1, *array.item)
        return values[skip : skip + piece.stop - piece.start]


def _tell(error: Exception) -> str:
    damage = tell_damage(error)
    return "is missing" if damage == MISSING else f"is damaged: {damage}"
