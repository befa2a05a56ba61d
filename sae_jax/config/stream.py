"""Rows that come straight from a subject, where a run has no store."""

import dataclasses

from sae_jax.config.fields import check_at_least, check_fields, setting


@dataclasses.dataclass(unsafe_hash=True)
class StreamConfig:
    """The subject and the text of a run without a store (see `sae_jax.stream`)."""

    subject: str = setting(
        "", "a model's folder or its name on the hub, or 'default'; '': data.store"
    )
    text: str = setting(
        "", "files, folders or hf:NAME, with commas; '': Python's standard library"
    )
    text_field: str = setting("text", "of JSON lines and tables")
    context_length: int | None = setting(
        None, "tokens in a context; None: what the subject reads, at most 2048"
    )
    bos: str | None = setting(
        None,
        "what the beginning-of-sequence token leads; None: documents, if there is one",
        choices=("document", "context", "none"),
    )
    exclude_special: bool = setting(
        False, "leave out the rows of that token: with bos = 'context' only"
    )
    batch_contexts: int = setting(
        16,
        "contexts that the subject reads at a time, over all devices: at most so many, "
        "as many of each of data.lanes, and at least one of each",
    )

    def __post_init__(self) -> None:
        check_fields(self, "stream.")
        check_at_least("stream.batch_contexts", self.batch_contexts, 1)
        if self.context_length is not None:
            check_at_least("stream.context_length", self.context_length, 2)
        if self.exclude_special and self.bos != "context":
            raise ValueError(
                f"stream.exclude_special with stream.bos = {self.bos!r}: contexts "
                "would have different numbers of rows; set stream.bos to 'context', "
                "where each begins with that token"
            )
