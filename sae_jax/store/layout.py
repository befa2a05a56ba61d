"""What a store's files hold, and how each array lies in them."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from sae_jax.files import refuse_remote

VERSION = 1
SPLITS = ("train", "heldout")
MANIFEST = "manifest.json"
DOCUMENTS = "documents.json"


@dataclasses.dataclass(kw_only=True)
class Manifest:
    """The contents of manifest.json. Hashes are sha256."""

    version: int = VERSION
    subject: dict[str, str]  # name, identity, and the dtype it computed in
    tokenizer: str  # hash
    corpus: str  # hash of the names and texts of all documents
    sites: dict[str, int]  # the width of each
    dtype: str = "bfloat16"
    context_length: int
    heldout_every: int
    max_rows: int | None
    seed: int
    rows_per_shard: int
    rows_per_chunk: int
    n_documents: int
    rows: dict[str, int]  # by split
    dropped_tokens: dict[str, int]  # by split; tokenised, but short of a context
    shards: list[dict[str, Any]]  # split and rows of each, in the order of the files
    shards_written: int = 0
    complete: bool = False
    statistics: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    sums: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for site in self.sites:  # they name folders, and a store may come from anyone
            if not re.fullmatch(r"[a-z_]+\.\d+", site):
                raise ValueError(f"no site is called {site!r}")


@dataclasses.dataclass(frozen=True)
class ArrayLayout:
    """How one array of a store lies in its files; lengths are along its first axis."""

    name: str
    dtype: Any
    width: int
    shard_length: int
    chunk_length: int

    def open(self, folder: Path, n_shards: int, create: bool = False) -> ts.TensorStore:
        """The array, whose metadata must be exactly this layout."""
        bytes_codec = {"name": "bytes", "configuration": {"endian": "little"}}
        codecs = [bytes_codec, {"name": "crc32c"}]
        sharding = {
            "chunk_shape": [self.chunk_length, self.width],
            "codecs": codecs,
            "index_codecs": codecs,
            "index_location": "end",
        }
        shard_shape = [self.shard_length, self.width]
        path = str(folder.absolute() / self.name)
        kvstore: dict[str, Any] = {"driver": "file", "path": path}
        if not create:  # twice as fast to read
            kvstore["file_io_mode"] = {"mode": "memmap"}
        spec = {
            "driver": "zarr3",
            "kvstore": kvstore,
            "metadata": {
                "shape": [n_shards * self.shard_length, self.width],
                "data_type": np.dtype(self.dtype).name,
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": shard_shape},
                },
                "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            },
            # Zeros are data here: stored like any other, and never made up.
            "store_data_equal_to_fill_value": True,
            "fill_missing_data_reads": False,
        }
        return ts.open(spec, open=True, create=create).result()

    def shard_file(self, folder: Path, shard: int) -> Path:
        return folder / self.name / "c" / str(shard) / "0"

    def shard_bytes(self, length: int) -> int:
        """The size of a shard's file: its filled chunks, each with its crc32c, then
        the index (offset and size of every chunk) with its own."""
        n_filled = -(-length // self.chunk_length)
        n_chunks = self.shard_length // self.chunk_length
        row_bytes = self.width * np.dtype(self.dtype).itemsize
        return n_filled * (self.chunk_length * row_bytes + 4) + 16 * n_chunks + 4


def list_arrays(manifest: Manifest) -> list[ArrayLayout]:
    """The arrays of a store: those of rows first, then those of sequences."""
    rows, chunk = manifest.rows_per_shard, manifest.rows_per_chunk
    t = manifest.context_length
    acts = [
        ArrayLayout(acts_name(site), ml_dtypes.bfloat16, width, rows, chunk)
        for site, width in manifest.sites.items()
    ]
    return acts + [
        ArrayLayout("positions", np.int32, 2, rows, rows),
        ArrayLayout("tokens", np.int32, t, rows // t, rows // t),
        ArrayLayout("documents", np.int32, t, rows // t, rows // t),
    ]


def acts_name(site: str) -> str:
    return f"acts/{site}"


def statistics_file(folder: Path, site: str) -> Path:
    return folder / "statistics" / f"{site}.npy"


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a store, which may still be incomplete."""
    refuse_remote(path)
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(
            f"no store at {str(path)!r}: {MANIFEST} is missing; write one with "
            f"sae-jax harvest --out={path}"
        )
    try:
        values = json.loads(file.read_text())
        version = values["version"]
        if version == VERSION:
            return Manifest(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is not a store's manifest ({error}): delete the folder and "
            "harvest again"
        ) from error
    raise ValueError(
        f"{file} has version {version!r}, this sae_jax reads version {VERSION}: "
        "harvest the store again"
    )
