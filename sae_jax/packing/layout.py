"""How text lies in contexts, and which positions of these are rows."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sae_jax.store import NO_DOCUMENT

PACKINGS = ("joined", "padded")
BOS_PLACES = ("document", "context", "none")

Ids = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The lie of text in contexts; `sae_jax.packing` tells what the words mean."""

    context_length: int
    vocab_size: int  # of the subject; every token is below it
    bos_id: int | None
    pad_id: int
    packing: str = "joined"
    bos: str = "document"
    excluded_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, known in (("packing", PACKINGS), ("bos", BOS_PLACES)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} = {value!r}: give one of {', '.join(known)}")
        if self.bos != "none" and self.bos_id is None:
            raise ValueError(
                f"bos = {self.bos!r}, and the subject has no beginning-of-sequence "
                "token: give bos = 'none'"
            )
        for name in ("bos_id", "pad_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"{name} = {value}, and the subject's tokens are 0 to "
                    f"{self.vocab_size - 1}: its tokenizer does not fit it"
                )
        least = 2 if self.bos == "context" else 1
        if self.context_length < least:
            raise ValueError(
                f"context_length = {self.context_length}: must be at least {least} "
                f"with bos = {self.bos!r}"
            )

    @property
    def before_document(self) -> list[int]:
        """The tokens that lead a document, which count as its text."""
        return self._bos_if("document")

    @property
    def before_context(self) -> list[int]:
        """The tokens that lead a context, and are of the document that follows."""
        return self._bos_if("context")

    def _bos_if(self, place: str) -> list[int]:
        return [self.bos_id] if self.bos == place and self.bos_id is not None else []


def lay(
    layout: Layout, text: Ids, owners: Ids, lengths: NDArray[np.int64]
) -> tuple[Ids, Ids, int]:
    """The text's contexts: token ids and document ids, both [n, T]; and how much of
    the text is in them, since the end of joined text may fill none.

    `owners` are the documents of the tokens, `lengths` the tokens of each document.
    """
    width = layout.context_length - len(layout.before_context)
    if layout.packing == "joined":
        n_contexts = len(text) // width
        n_used = n_contexts * width
        tokens, documents = text[:n_used], owners[:n_used]
    else:
        contexts = -(-lengths // width)  # of each document
        n_contexts, n_used = int(contexts.sum()), len(text)
        start = np.cumsum(lengths) - lengths
        move = (np.cumsum(contexts) - contexts) * width - start
        places = np.arange(len(text)) + np.repeat(move, lengths)
        tokens = np.full(n_contexts * width, layout.pad_id, np.int32)
        documents = np.full(n_contexts * width, NO_DOCUMENT, np.int32)
        tokens[places], documents[places] = text, owners
    tokens, documents = (a.reshape(n_contexts, width) for a in (tokens, documents))
    for token in layout.before_context:
        tokens = np.insert(tokens, 0, token, axis=1)
        documents = np.insert(documents, 0, documents[:, 0], axis=1)
    return tokens, documents, n_used
