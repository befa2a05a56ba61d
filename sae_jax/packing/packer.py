"""The stream: documents in, blocks of contexts out, a split each."""

import sys
from array import array
from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer

from sae_jax.packing.layout import Ids, Layout, lay
from sae_jax.store import NO_DOCUMENT, SPLITS, Contexts, is_row
from sae_jax.text import Document, is_heldout

TOKEN_BYTES = 8  # of a position of a context: its token and its document
# What is tokenised at once, by all cores: enough to keep them busy.
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 2**20


def pack(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    layout: Layout,
    *,
    heldout_every: int,
    max_rows: int | None,
    rows_per_chunk: int,
    sequences_per_block: int,
    max_bytes: int | None = None,
    row_bytes: int = 0,
) -> "Packer":
    """The documents' contexts: at most `max_rows` rows, in whole chunks of rows, and
    `max_bytes` of contexts and rows, of which each takes `row_bytes`.

    Of the chunks, one in `heldout_every` is for `heldout`. Blocks are of
    `sequences_per_block` contexts, but for the last of each split.
    """
    if max_bytes is not None:  # padding makes it fewer
        most = max_bytes // (row_bytes + TOKEN_BYTES)
        max_rows = most if max_rows is None else min(most, max_rows)
    quota = _share(max_rows, rows_per_chunk, heldout_every)
    sizes = rows_per_chunk, sequences_per_block, row_bytes
    splits = {
        name: _Split(
            name,
            layout,
            n_rows,
            None if max_bytes is None else max_bytes * n_rows // sum(quota.values()),
            *sizes,
        )
        for name, n_rows in quota.items()
    }
    return Packer(documents, tokenizer, heldout_every, splits)


class Packer:
    """Gives blocks of contexts, once; the figures hold when it has come to its end,
    and `rows` are on the way those found so far."""

    def __init__(
        self,
        documents: Iterable[Document],
        tokenizer: Tokenizer,
        heldout_every: int,
        splits: "dict[str, _Split]",
    ):
        self.names: list[str] = []  # of the documents, by id
        self._documents = documents
        self._tokenizer = tokenizer
        self._heldout_every = heldout_every
        self._splits = splits

    @property
    def rows(self) -> dict[str, int]:
        """By split, whole chunks: the first so many kept positions of its contexts."""
        return {name: split.n_rows for name, split in self._splits.items()}

    @property
    def dropped_tokens(self) -> dict[str, int]:
        """By split: tokens of its documents that are in no context."""
        return {name: split.n_dropped for name, split in self._splits.items()}

    def __iter__(self) -> Iterator[Contexts]:
        """Raises ValueError for a token that the subject does not have and, at the
        end, if a split fills no chunk of rows."""
        for split, name, ids in self._tokenise():
            if ids and not split.is_full:
                split.add(ids, len(self.names))
                self.names.append(name)
                yield from split.take_blocks()
        if not self.names:
            raise ValueError(
                "no text: no document has a token; give files with text in them"
            )
        for split in self._splits.values():
            if not split.n_documents:
                raise ValueError(
                    f"no document of the text is {split.name}: whole documents are "
                    f"held out, about one in {self._heldout_every}; give more text, "
                    "JSON lines with a document a line, or another heldout_every"
                )
            split.finish()
        for split in self._splits.values():
            yield from split.take_blocks(is_last=True)

    def _tokenise(self) -> "Iterator[tuple[_Split, str, list[int]]]":
        for batch in self._batch():
            encodings = self._tokenizer.encode_batch_fast(
                [document.text for _, document in batch], add_special_tokens=False
            )
            for (split, document), encoding in zip(batch, encodings, strict=True):
                yield split, document.name, encoding.ids

    def _batch(self) -> "Iterator[list[tuple[_Split, Document]]]":
        """What is tokenised together, without the documents of a split that is full."""
        batch: list[tuple[_Split, Document]] = []
        n_characters = 0
        for document in self._documents:
            if all(split.is_full for split in self._splits.values()):
                return
            is_out = is_heldout(document.name, self._heldout_every)
            split = self._splits["heldout" if is_out else "train"]
            if split.is_full:
                continue
            batch.append((split, document))
            n_characters += len(document.text)
            if len(batch) == _BATCH_DOCUMENTS or n_characters >= _BATCH_CHARACTERS:
                yield batch
                batch, n_characters = [], 0
        if batch:
            yield batch


class _Split:
    """One split on its way: text to be laid into contexts, contexts to be given."""

    def __init__(
        self,
        name: str,
        layout: Layout,
        quota: int,
        max_bytes: int | None,
        rows_per_chunk: int,
        sequences_per_block: int,
        row_bytes: int,
    ):
        self.name = name
        self.n_documents = self.n_dropped = 0
        self._layout = layout
        self._quota = quota  # of rows
        self._max_bytes = max_bytes  # of contexts and rows
        self._context_bytes = TOKEN_BYTES * layout.context_length
        self._row_bytes = row_bytes
        self._rows_per_chunk = rows_per_chunk
        self._sequences_per_block = sequences_per_block
        self._text = array("i")
        self._owners: list[int] = []  # the documents of the text,
        self._lengths: list[int] = []  # and how much of it is theirs
        no_contexts = np.empty((0, layout.context_length), np.int32)
        self._tokens, self._documents = no_contexts, no_contexts
        self._starts = np.empty(0, np.int64)  # the rows before each, in the split
        self._n_laid_rows = self._n_laid_contexts = 0

    @property
    def is_full(self) -> bool:
        return self._n_laid_rows >= self._quota

    @property
    def n_rows(self) -> int:
        laid = self._n_laid_rows // self._rows_per_chunk * self._rows_per_chunk
        return min(laid, self._quota)

    def add(self, ids: list[int], document: int) -> None:
        before = len(self._text)
        self._text.fromlist(self._layout.before_document)
        self._text.fromlist(ids)
        length = len(self._text) - before
        self._owners.append(document)
        self._lengths.append(length)
        self.n_dropped += length
        self.n_documents += 1
        a_block = self._sequences_per_block * self._layout.context_length
        if self._may_be_full() or len(self._text) >= a_block:
            self._lay()

    def finish(self) -> None:
        """Lays what is left; ValueError if the split gives no chunk of rows."""
        self._lay()
        if not self._quota:
            raise ValueError(
                f"max_gb has room for {self._max_bytes} bytes of {self.name}, less "
                f"than a chunk of rows_per_chunk = {self._rows_per_chunk} rows takes "
                "with its contexts: raise it, or lower rows_per_chunk"
            )
        if not self.n_rows:
            raise ValueError(
                f"the {self.name} documents give {self._n_laid_rows} rows in contexts "
                f"of context_length = {self._layout.context_length}, and one chunk "
                f"takes rows_per_chunk = {self._rows_per_chunk}: give more text, or "
                "lower them"
            )

    def take_blocks(self, is_last: bool = False) -> Iterator[Contexts]:
        """Blocks of the contexts that hold rows for certain."""
        size = self._sequences_per_block
        if len(self._tokens) < size and not is_last:
            return
        n_certain = int(np.searchsorted(self._starts, self.n_rows))
        n = n_certain if is_last else n_certain // size * size
        tokens, self._tokens = self._tokens[:n], self._tokens[n:]
        documents, self._documents = self._documents[:n], self._documents[n:]
        self._starts = self._starts[n:]
        n_lead = n * len(self._layout.before_context)
        self.n_dropped -= int(np.count_nonzero(documents != NO_DOCUMENT)) - n_lead
        for first in range(0, n, size):
            block = slice(first, first + size)
            yield Contexts(self.name, tokens[block], documents[block])

    def _may_be_full(self) -> bool:
        """Whether the text that is not laid yet may be the last that is wanted."""
        # A token gives at most two rows, its own and that of a context's first.
        n_rows = self._n_laid_rows + 2 * len(self._text)
        if n_rows >= self._quota or self._max_bytes is None:
            return n_rows >= self._quota
        width = self._layout.context_length - len(self._layout.before_context)
        n_contexts = len(self._text) // width + len(self._lengths)
        n_contexts += self._n_laid_contexts
        n_bytes = n_contexts * self._context_bytes + n_rows * self._row_bytes
        return n_bytes >= self._max_bytes

    def _lay(self) -> None:
        """Text becomes contexts; what of joined text fills none is kept."""
        text = np.array(self._text, np.int32)
        self._check_tokens(text)
        lengths = np.array(self._lengths, np.int64)
        owners = np.repeat(np.array(self._owners, np.int32), lengths)
        tokens, documents, n_used = lay(self._layout, text, owners, lengths)
        rows = is_row(tokens, documents, self._layout.excluded_ids).sum(axis=1)
        starts = self._n_laid_rows + np.cumsum(rows) - rows
        self._lower_quota(starts, starts + rows)
        self._n_laid_rows += int(rows.sum())
        self._n_laid_contexts += len(rows)
        self._tokens = np.concatenate([self._tokens, tokens])
        self._documents = np.concatenate([self._documents, documents])
        self._starts = np.concatenate([self._starts, starts])
        self._text = array("i", text[n_used:].tobytes())
        left, lengths = np.unique(owners[n_used:], return_counts=True)
        self._owners, self._lengths = left.tolist(), lengths.tolist()

    def _lower_quota(self, starts: np.ndarray, ends: np.ndarray) -> None:
        """To the rows that there is room for, once these contexts, which hold rows
        `starts` to `ends`, go beyond `max_bytes`."""
        if self._max_bytes is None:
            return
        n_contexts = self._n_laid_contexts + 1 + np.arange(len(starts))
        room = self._max_bytes - n_contexts * self._context_bytes
        most = room // self._row_bytes  # rows beside so many contexts
        if (is_over := ends > most).any():
            first = int(np.argmax(is_over))
            rows = int(max(starts[first], most[first]))
            self._quota = min(self._quota, rows - rows % self._rows_per_chunk)

    def _check_tokens(self, text: Ids) -> None:
        if len(text) and (token := int(np.max(text))) >= self._layout.vocab_size:
            raise ValueError(
                f"the tokenizer gave token {token}, and the subject's are 0 to "
                f"{self._layout.vocab_size - 1}: its tokenizer does not fit it; take "
                "the tokenizer.json that came with the weights"
            )


def _share(
    max_rows: int | None, rows_per_chunk: int, heldout_every: int
) -> dict[str, int]:
    """How many rows of each split are wanted at most, in whole chunks."""
    if max_rows is None:
        return dict.fromkeys(SPLITS, sys.maxsize)
    n_chunks = max_rows // rows_per_chunk
    if n_chunks < 2:
        raise ValueError(
            f"max_rows = {max_rows} is less than a train and a heldout chunk of "
            f"rows_per_chunk = {rows_per_chunk}: make it at least {2 * rows_per_chunk}"
        )
    heldout = max(1, round(n_chunks / heldout_every))
    chunks = {"train": n_chunks - heldout, "heldout": heldout}
    return {split: n * rows_per_chunk for split, n in chunks.items()}
