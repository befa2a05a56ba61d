"""Activation stores: rows of activations on disk, as `sae_jax.harvest` leaves them.

A store is a folder:

    manifest.json          what is in it, and which shards have been written
    documents.json         the names of the documents; a document's id is its index
    statistics/SITE.npy    the mean of the train rows, float64 [D]
    acts/SITE              zarr3, bfloat16 [rows, D]
    positions              zarr3, int32 [rows, 2]: (sequence, position) of each row
    tokens, documents      zarr3, int32 [sequences, T]: token id, and document id

Row r belongs to sequence r // T, at position r % T. A shard, one file of an array,
holds `rows_per_shard` rows, which are whole sequences of one split, `train` or
`heldout`; only the last shard of a split may be partly filled. Shards are made of
chunks, which carry a crc32c that every read checks: a damaged shard is an error that
names its file. A shard that is not there is an error too, never rows of zeros.

`open_store` reads one, `StoreWriter` writes one.
"""

from sae_jax.store.layout import SPLITS, Manifest, read_manifest
from sae_jax.store.reader import Range, Statistics, Store, open_store
from sae_jax.store.writer import (
    Shard,
    StoreWriter,
    check_same_settings,
    read_begun,
)

__all__ = [
    "SPLITS",
    "Manifest",
    "Range",
    "Shard",
    "Statistics",
    "Store",
    "StoreWriter",
    "check_same_settings",
    "open_store",
    "read_begun",
    "read_manifest",
]
