"""Checkpoints in a bucket: what Orbax's CheckpointManager is on a disk.

    checkpoints/<step>/<life>/<item>/<array>/    zarr3, chunks with a crc32c
    checkpoints/<step>/<life>/meta.json          `meta`; the arrays beside it are whole
    checkpoints/.writer                          the life that may write

Orbax refuses s3://, and for gs:// wants gcsfs or TensorFlow beside tensorstore; here
both are tensorstore's. Each process writes the chunks of its own shards, and no object
is ever renamed or changed: `meta.json` is written last, when all processes have written
all of theirs, and a step without it does not count. Reading fetches what this process's
shards need and no more; writing holds one copy of them in host memory, and some chunks.

A life is one start of a run, all its processes together. A bucket has no locks: where
two runs write to one folder, the later one takes it, once it knows that it can go on
from what is there, and the earlier ends with an error instead of its next checkpoint.
What that one has on its way meanwhile is never mixed with what the later one writes,
and its `meta.json` does not count where its arrays have been deleted.
"""

import collections
import dataclasses
import json
import secrets
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from sae_jax import processes
from sae_jax.store import Folder
from sae_jax.store.folder import raise_plainly, raise_unless_data

_META = "meta.json"
_WRITER = ".writer"
_MOST_CHUNK_BYTES = 128 * 2**20  # S3 takes 5 GB at once
_IN_FLIGHT = 8  # chunks that a process encodes and sends at a time


def is_manager_of(folder: Folder) -> bool:
    """Whether the checkpoints there are these: in a bucket, or copied from one."""
    return not folder.is_local or any(folder.path.glob(f"[0-9]*/*/{_META}"))


class BucketManager:
    """The checkpoints in one folder; has what `Checkpoints` asks of Orbax's manager."""

    def __init__(self, folder: Folder, kept: int = 1):
        self._folder, self._kept = folder, kept
        self._context = folder.context
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._life = ""  # none yet, and nothing may be saved
        self._steps = _find_whole(_list_lives(folder.list()))

    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return max(self._steps, default=None)

    def all_steps(self) -> list[int]:
        """The steps of all whole checkpoints."""
        return sorted(self._steps)

    def take(self) -> None:
        """Begins a life, now the writer; deletes what others left unfinished."""
        self._life = f"{processes.from_first(secrets.randbits(31)):08x}"
        if processes.is_first():
            self._folder.write(_WRITER, self._life)
            lives = _list_lives(self._folder.list())
            whole = _find_whole(lives)
            for step, life in lives:
                if whole.get(step) != life:
                    self._delete(step, life)

    def check_writer(self) -> None:
        """ValueError unless this life is the writer still."""
        if self._folder.read(_WRITER) != self._life.encode():
            raise ValueError(
                f"{self._folder}: another run has begun to write here, so this one "
                "ends: let one of them run, or give this one another workdir"
            )

    def save(self, step: int, args: Any) -> None:
        """Copies the arrays to host memory, and starts writing them."""
        self.wait_until_finished()
        self.check_writer()
        items = {name: args[name].item for name in args.keys()}
        meta = items.pop("meta")
        copies = {
            f"{item}/{name}": _copy(array)
            for item, tree in items.items()
            for name, array in tree.items()
        }
        self._thread = threading.Thread(
            target=self._write_all, args=(step, copies, meta), daemon=True
        )
        self._thread.start()

    def restore(self, step: int, args: Any) -> dict[str, Any]:
        """The items asked for, each array placed as its target says."""
        at = f"{step}/{self._steps.get(step)}"
        marker = self._folder.read(f"{at}/{_META}")
        if marker is None:
            raise FileNotFoundError(
                f"{self._folder.name_file(str(step))}: no whole checkpoint"
            )
        return {
            item: json.loads(marker)
            if item == "meta"
            else {
                name: self._read(f"{at}/{item}/{name}", target)
                for name, target in args[item].item.items()
            }
            for item in args.keys()
        }

    def wait_until_finished(self) -> None:
        """Returns when what was saved is whole; raises what went wrong, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        self.wait_until_finished()

    def _write_all(
        self, step: int, copies: dict[str, "_Copy"], meta: dict[str, Any]
    ) -> None:
        try:
            for name, copy in copies.items():
                self._write(f"{step}/{self._life}/{name}", copy)
            processes.meet(f"checkpoint {step} of {self._life}")
            if processes.is_first():
                self._mark(step, meta)
            self._steps = self._steps | {step: self._life}
            self._delete_old()
        except Exception as error:
            self._error = error

    def _write(self, name: str, copy: "_Copy") -> None:
        spec = _describe(self._folder, name) | {"metadata": copy.metadata}
        # One process writes what describes the array; its chunks are everybody's.
        how = "create" if processes.is_first() else "assume_metadata"
        in_flight: collections.deque[Any] = collections.deque()
        try:
            array = ts.open(spec | {"open": True, how: True}, context=self._context)
            whole = array.result()
            for where, values in copy.pieces():
                part = whole[where]
                in_flight.append(
                    part.write(values, can_reference_source_data_indefinitely=True)
                )
                if len(in_flight) == _IN_FLIGHT:
                    in_flight.popleft().result()
            for write in in_flight:
                write.result()
        except (ValueError, OSError) as error:
            raise_plainly(self._folder, error)

    def _mark(self, step: int, meta: dict[str, Any]) -> None:
        """Makes the step count; when this returns others may be deleted."""
        self.check_writer()
        name = f"{step}/{self._life}/{_META}"
        self._folder.write(name, json.dumps(meta, indent=2))
        # Who took the folder meanwhile has deleted the arrays, and reads an older step.
        self.check_writer()

    def _delete_old(self) -> None:
        for step in self.all_steps()[: -self._kept]:
            if processes.is_first():
                self._delete(step, self._steps[step])
            self._steps = {s: life for s, life in self._steps.items() if s != step}

    def _delete(self, step: int, life: str) -> None:
        # First what says that it is whole.
        self._folder.delete(f"{step}/{life}/{_META}")
        self._folder.delete_all(f"{step}/{life}/")

    def _read(self, name: str, target: jax.ShapeDtypeStruct) -> jax.Array:
        parts: dict[Any, np.ndarray] = {}

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            # Devices that hold the same part fetch it once.
            key = tuple((part.start, part.stop) for part in index or ())
            if key not in parts:
                parts[key] = np.asarray(array[index or ()].read().result())
            return parts[key]

        try:
            spec = _describe(self._folder, name)
            array = ts.open(spec, context=self._context, open=True).result()
            if array.shape != target.shape or array.dtype.numpy_dtype != target.dtype:
                raise ValueError(
                    f"{array.dtype.name} {array.shape}, not {target.dtype} "
                    f"{target.shape}"
                )
            return jax.make_array_from_callback(target.shape, target.sharding, read)
        except (ValueError, OSError) as error:
            raise_unless_data(self._folder, error)
            text = str(error).splitlines()[0].partition(" [")[0]
            raise ValueError(
                f"{self._folder.name_file(name)} is missing or damaged ({text}): "
                "delete this step to go on from an earlier one"
            ) from error


@dataclasses.dataclass(frozen=True)
class _Copy:
    """What this process has of an array, in host memory."""

    metadata: dict[str, Any]
    chunk_shape: tuple[int, ...]
    parts: list[tuple[tuple[int, ...], np.ndarray]]  # where they begin, and values

    def pieces(self) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """Chunk by chunk: where it lies, and its values."""
        for start, values in self.parts:
            if not start:
                yield (), values
                continue
            length = self.chunk_shape[0]
            for row in range(0, len(values), length):
                begin = (start[0] + row, *start[1:])
                ends = zip(begin, self.chunk_shape, strict=True)
                where = tuple(slice(first, first + n) for first, n in ends)
                yield where, values[row : row + length]


def _copy(array: jax.Array) -> _Copy:
    chunk_shape = _cut(array.sharding.shard_shape(array.shape), array.dtype.itemsize)
    bytes_codec: dict[str, Any] = {"name": "bytes"}
    if array.dtype.itemsize > 1:
        bytes_codec["configuration"] = {"endian": "little"}
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk_shape}}
    metadata = {
        "shape": array.shape,
        "data_type": array.dtype.name,
        "chunk_grid": grid,
        "codecs": [bytes_codec, {"name": "crc32c"}],
    }
    parts = [
        # A copy also on a CPU, where the next step is given the very memory.
        (tuple(part.start or 0 for part in shard.index), np.array(shard.data))
        for shard in array.addressable_shards
        if shard.replica_id == 0
    ]
    return _Copy(metadata, chunk_shape, parts)


def _cut(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """A shard's shape, or less rows that divide it: no chunk is of two processes."""
    if not shape:
        return shape
    row_bytes = max(1, int(np.prod(shape[1:])) * itemsize)
    most = max(1, _MOST_CHUNK_BYTES // row_bytes)
    n_chunks = -(-shape[0] // most)
    while shape[0] % n_chunks:
        n_chunks += 1
    return (shape[0] // n_chunks, *shape[1:])


def _describe(folder: Folder, name: str) -> dict[str, Any]:
    """tensorstore's spec; a chunk that is missing is an error, never zeros."""
    return {
        "driver": "zarr3",
        "kvstore": folder.kvstore(name),
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }


def _list_lives(names: list[str]) -> dict[tuple[int, str], set[str]]:
    """What there is of each step and life: items, and perhaps `meta.json`."""
    found = collections.defaultdict(set)
    for name in names:
        step, life, item, *_ = (*name.split("/", 3), "", "")
        if step.isdigit() and item:
            found[int(step), life].add(item)
    return found


def _find_whole(lives: dict[tuple[int, str], set[str]]) -> dict[int, str]:
    """The steps that are whole, each with the life whose arrays are."""
    return {
        step: life
        for (step, life), items in lives.items()
        if _META in items and len(items) > 1
    }
