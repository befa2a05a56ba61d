"""Activation stores: rows of activations, as `sae_jax.harvest` leaves them.

A store is a folder, on a disk or in a bucket (`sae_jax.store.folder`):

    manifest.json            what is in it, and whether it is complete
    documents.json           the names of the documents; a document's id is its index
    tokens, documents        zarr3, int32 [contexts, T]: token ids, and document ids
    acts/SITE                zarr3, bfloat16 or int8 [rows, D]
    scales/SITE              zarr3, float32 [rows]: what to multiply int8 rows by
    positions                zarr3, int32 [rows, 2]: (sequence, position) of each row
    shards/N/SITE.npz        the sums of the rows of shard N, written when it was safe
    statistics/SITE.npz      the statistics of all train rows

A context belongs to one split, `train` or `heldout`, and so does each file of text and
of rows. The rows of a split are the positions of its contexts, in order, less padding
and excluded tokens (`sae_jax.store.text`); a file holds `rows_per_shard` of them, only
the last of a split fewer. Files are made of chunks, which carry a crc32c that every
read checks: a damaged file is an error that names it. A file that is not there is an
error too, never rows of zeros.

`open_store` reads one, `StoreWriter` writes one.
"""

from sae_jax.store.begin import check_place, choose_manifest
from sae_jax.store.folder import Folder
from sae_jax.store.layout import SPLITS, Manifest, find_manifest, read_manifest
from sae_jax.store.quantise import Stored
from sae_jax.store.reader import Range, Store, open_store
from sae_jax.store.statistics import Statistics, mix
from sae_jax.store.text import NO_DOCUMENT, Contexts, Text, is_row
from sae_jax.store.whole import is_whole
from sae_jax.store.writer import StoreWriter

__all__ = [
    "NO_DOCUMENT",
    "SPLITS",
    "Contexts",
    "Folder",
    "Manifest",
    "Range",
    "Statistics",
    "Store",
    "StoreWriter",
    "Stored",
    "Text",
    "check_place",
    "choose_manifest",
    "find_manifest",
    "is_row",
    "is_whole",
    "mix",
    "open_store",
    "read_manifest",
]
