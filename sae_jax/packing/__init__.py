"""Packing: a stream of documents to contexts of T token ids, in bounded memory.

`packing` says how the documents of a split, `train` or `heldout`, come to contexts:

    joined   one after the other, cut every T tokens; the end that fills none is dropped
    padded   each by itself, cut every T tokens, its last context filled with `pad_id`

and `bos` where the beginning-of-sequence token stands: before each `document`, before
each `context` (of which text then takes T - 1), or nowhere: `none`.

Every position is a row of the store but padding and the tokens of `excluded_ids`.
"""

from sae_jax.packing.layout import Layout
from sae_jax.packing.packer import TOKEN_BYTES, Packer, pack

__all__ = ["TOKEN_BYTES", "Layout", "Packer", "pack"]
