"""What a store's files hold, and how each array lies in them."""

import dataclasses
import functools
import json
import math
import re
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from sae_jax.store.folder import Folder, raise_unless_data

VERSION = 2
SPLITS = ("train", "heldout")
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "int8": np.int8}
MANIFEST = "manifest.json"
DOCUMENTS = "documents.json"
MISSING = "it is missing"
CURE = "restore the file, or delete the folder and harvest again"
CURE_OF_ROWS = (
    "delete it, if it is there, and run the same sae-jax harvest again, which makes it "
    "anew"
)
_RECORDS = "shards/"
_CHUNKS_TOGETHER = 16


@dataclasses.dataclass(frozen=True)
class RowShard:
    """A file of rows: rows `first` to `first + rows` of its split."""

    split: str
    first: int
    rows: int


@dataclasses.dataclass(kw_only=True)
class Manifest:
    """The contents of manifest.json. Hashes are sha256.

    `text_shards` and what follows are known once the text is packed, `statistics`
    (rows, mean norm and mean square norm by site) once the store is complete.
    """

    version: int = VERSION
    subject: dict[str, str]  # name, identity, and the dtype it computed in
    tokenizer: str  # hash
    corpus: str  # hash of the names and contents of all its files
    sites: dict[str, int]  # the width of each
    dtype: str = "bfloat16"
    context_length: int
    packing: str = "joined"
    bos: str = "document"
    bos_id: int | None = None
    excluded_ids: list[int] = dataclasses.field(default_factory=list)
    heldout_every: int
    max_rows: int | None
    max_gb: float | None = None
    seed: int
    rows_per_shard: int
    rows_per_chunk: int
    contexts_per_shard: int  # of a file of text
    n_documents: int = 0
    rows: dict[str, int] = dataclasses.field(default_factory=dict)  # by split
    dropped_tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    # Split, contexts and rows of each file of text, in their order.
    text_shards: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    is_packed: bool = False
    complete: bool = False
    statistics: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for site in self.sites:  # they name folders, and a store may come from anyone
            if not re.fullmatch(r"[a-z_]+\.\d+", site):
                raise ValueError(f"no site is called {site!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, not one of {', '.join(DTYPES)}")

    @functools.cached_property  # of many shards: not for each of them anew
    def row_shards(self) -> list[RowShard]:
        """The files of rows, in their order: those of train, then those of heldout."""
        return [
            RowShard(split, first, min(self.rows_per_shard, self.rows[split] - first))
            for split in SPLITS
            for first in range(0, self.rows.get(split, 0), self.rows_per_shard)
        ]

    def first_row(self, split: str) -> int:
        """The number of a split's first row: files are counted as if all were full."""
        n_train = -(-self.rows["train"] // self.rows_per_shard)
        return n_train * self.rows_per_shard if split == "heldout" else 0


@dataclasses.dataclass(frozen=True)
class ArrayLayout:
    """How one array of a store lies in its files.

    An array of rows is [chunks, rows of a chunk, ...], as whole chunks are read fastest
    by their number; an array of contexts is [contexts, T], a chunk being a file. `item`
    is the shape of a row or a context; lengths count these.
    """

    name: str
    dtype: Any
    item: tuple[int, ...]
    shard_length: int
    chunk_length: int
    by_chunk: bool

    def open(
        self, folder: Folder, n_shards: int, is_new: bool = False
    ) -> ts.TensorStore:
        """The array, whose metadata must be exactly this layout."""
        kvstore = folder.kvstore(self.name)
        if folder.is_local and not is_new:  # twice as fast to read
            kvstore["file_io_mode"] = {"mode": "memmap"}
        spec = {
            "driver": "zarr3",
            "kvstore": kvstore,
            "metadata": self._describe(n_shards),
            # Zeros are data here: stored like any other, and never made up.
            "store_data_equal_to_fill_value": True,
            "fill_missing_data_reads": False,
            "recheck_cached_data": "open",
        }
        opened = ts.open(spec, open=True, create=is_new, context=folder.context)
        try:
            return opened.result()
        except (ValueError, OSError) as error:
            raise_unless_data(folder, error)
            file = f"{self.name}/zarr.json"
            raise ValueError(
                f"damaged store: {folder.name_file(file)}: {tell_damage(error)}; "
                f"{tell_cure(file)}"
            ) from error

    def shard_file(self, shard: int) -> str:
        """The name of a shard's file in the store."""
        return f"{self.name}/c/{shard}" + "/0" * (len(self._shape(1)) - 1)

    def shard_bytes(self, length: int) -> int:
        """The size of a shard's file: its filled chunks, each with its crc32c, then
        the index (offset and size of every chunk) with its own."""
        n_filled = -(-length // self.chunk_length)
        n_chunks = self.shard_length // self.chunk_length
        return n_filled * (self.chunk_length * self.item_bytes + 4) + 16 * n_chunks + 4

    @property
    def item_bytes(self) -> int:
        return math.prod(self.item) * np.dtype(self.dtype).itemsize

    def select(self, array: ts.TensorStore, start: int, stop: int) -> ts.TensorStore:
        """The part of the array that holds items `start` to `stop`: whole chunks of
        rows, where these begin with a chunk."""
        if not self.by_chunk:
            return array[start:stop]
        assert start % self.chunk_length == 0
        return array[start // self.chunk_length : -(-stop // self.chunk_length)]

    def fill_chunks(self, values: np.ndarray) -> np.ndarray:
        """The values of items as `select` has them: whole chunks, ending in zeros."""
        if not self.by_chunk:
            return np.ascontiguousarray(values)
        if missing := -len(values) % self.chunk_length:
            zeros = np.zeros((missing, *self.item), values.dtype)
            values = np.concatenate([values, zeros])
        return np.ascontiguousarray(values).reshape(-1, self.chunk_length, *self.item)

    def _shape(self, length: int) -> list[int]:
        if self.by_chunk:
            return [length // self.chunk_length, self.chunk_length, *self.item]
        return [length, *self.item]

    def _describe(self, n_shards: int) -> dict[str, Any]:
        bytes_codec: dict[str, Any] = {"name": "bytes"}
        if np.dtype(self.dtype).itemsize > 1:
            bytes_codec["configuration"] = {"endian": "little"}
        index_codec = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {
            "chunk_shape": self._shape(self.chunk_length),
            "codecs": [bytes_codec, {"name": "crc32c"}],
            "index_codecs": [index_codec, {"name": "crc32c"}],
            "index_location": "end",
        }
        return {
            "shape": self._shape(n_shards * self.shard_length),
            "data_type": np.dtype(self.dtype).name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": self._shape(self.shard_length)},
            },
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }


def list_text_arrays(manifest: Manifest) -> list[ArrayLayout]:
    """The arrays of contexts: tokens and documents."""
    n, t = manifest.contexts_per_shard, manifest.context_length
    return [
        ArrayLayout(name, np.int32, (t,), n, n, by_chunk=False)
        for name in ("tokens", "documents")
    ]


def list_row_arrays(manifest: Manifest) -> list[ArrayLayout]:
    """The arrays of rows: activations by site, with scales for int8, and positions."""
    shard, chunk = manifest.rows_per_shard, manifest.rows_per_chunk
    # Chunks of a few bytes would cost as much as large ones to read.
    n_chunks = shard // chunk
    together = next(n for n in range(_CHUNKS_TOGETHER, 0, -1) if n_chunks % n == 0)
    large = chunk * together
    dtype = DTYPES[manifest.dtype]
    arrays = [
        ArrayLayout(acts_name(site), dtype, (width,), shard, chunk, by_chunk=True)
        for site, width in manifest.sites.items()
    ]
    if manifest.dtype == "int8":
        arrays += [
            ArrayLayout(scales_name(site), np.float32, (), shard, large, by_chunk=True)
            for site in manifest.sites
        ]
    positions = ArrayLayout("positions", np.int32, (2,), shard, large, by_chunk=True)
    return [*arrays, positions]


def finish_read(read: Any, folder: Folder, file: str) -> Any:
    """What was read; ValueError that names the file if it is damaged."""
    try:
        return read.result()
    except (ValueError, OSError) as error:
        raise_unless_data(folder, error)
        raise ValueError(
            f"damaged shard {folder.name_file(file)}: {tell_damage(error)}; "
            f"{tell_cure(file)}"
        ) from error


def tell_damage(error: Exception) -> str:
    """What is wrong with a file that tensorstore could not read."""
    text = str(error).splitlines()[0].partition(" [")[0]
    if "Digest mismatch" in text:
        return "its checksum is wrong"
    return MISSING if text.startswith("NOT_FOUND") else text


def tell_cure(file: str) -> str:
    """What helps against damage of a file, by its name in the store."""
    return CURE_OF_ROWS if is_made_anew(file) else CURE


def is_made_anew(file: str) -> bool:
    """Whether a harvest makes the file anew, if a complete store lacks it."""
    return not file.startswith(("tokens/", "documents", MANIFEST))


def read_whole(folder: Folder, name: str) -> bytes:
    """A file that a complete store has; ValueError that names it if it is missing."""
    data = folder.read(name)
    if data is None:
        raise ValueError(f"{folder.name_file(name)} is missing: {tell_cure(name)}")
    return data


def acts_name(site: str) -> str:
    return f"acts/{site}"


def scales_name(site: str) -> str:
    return f"scales/{site}"


def record_name(shard: int, site: str) -> str:
    """The file of a row shard's sums, written once the shard is safe."""
    return f"{_RECORDS}{shard}/{site}.npz"


def list_recorded(folder: Folder, manifest: Manifest) -> set[int]:
    """The row shards that are safe."""
    names = set(folder.list(_RECORDS))
    return {
        shard
        for shard in range(len(manifest.row_shards))
        if all(record_name(shard, site) in names for site in manifest.sites)
    }


def statistics_name(site: str) -> str:
    return f"statistics/{site}.npz"


def find_manifest(folder: Folder) -> Manifest | None:
    """The manifest of the store there, complete or not; None if there is no store."""
    data = folder.read(MANIFEST)
    if data is None:
        return None
    file, cure = folder.name_file(MANIFEST), "delete the folder and harvest again"
    try:
        values = json.loads(data)
        version = values["version"]
        if version == VERSION:
            return Manifest(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is not a store's manifest ({error}): {cure}"
        ) from error
    if isinstance(version, int) and version > VERSION:
        cure = f"upgrade sae_jax (pip install -U sae_jax), or {cure}"
    raise ValueError(
        f"{file} has version {version!r}, this sae_jax reads version {VERSION}: {cure}"
    )


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of a store, which may still be incomplete."""
    manifest = find_manifest(folder)
    if manifest is None:
        cure = f"write one with sae-jax harvest --out={folder}"
        if folder.list(_RECORDS):
            cure = CURE
        raise FileNotFoundError(
            f"no store at {str(folder)!r}: {MANIFEST} is missing; {cure}"
        )
    return manifest
