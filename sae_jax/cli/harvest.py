"""Run a subject model over text and store its activations.

    sae-jax harvest --out=store/
    sae-jax harvest --text=docs/ --text=notes.txt --site=resid_post.3 --out=store/

The text is the running Python's standard library unless --text names files or
folders. The same command goes on with a harvest that was stopped.
"""

from collections.abc import Sequence

from absl import flags

from sae_jax.cli.errors import Misuse
from sae_jax.harvest import HELDOUT_EVERY, ROWS_PER_CHUNK, ROWS_PER_SHARD, harvest
from sae_jax.subjects import load_subject
from sae_jax.text import read_documents, read_standard_library

_SUBJECT = flags.DEFINE_string("subject", "default", "the model's folder, or default")
_SITE = flags.DEFINE_multi_string("site", "resid_post.3", "where to read; may repeat")
_TEXT = flags.DEFINE_multi_string("text", None, "a file or folder; may repeat")
_OUT = flags.DEFINE_string("out", None, "the store's folder, made if missing")
_CONTEXT_LENGTH = flags.DEFINE_integer(
    "context_length", None, "tokens in a context; the subject's own if not given"
)
_MAX_ROWS = flags.DEFINE_integer("max_rows", None, "stop at so many rows")
_ROWS_PER_SHARD = flags.DEFINE_integer(
    "rows_per_shard", ROWS_PER_SHARD, "rows in a file"
)
_ROWS_PER_CHUNK = flags.DEFINE_integer(
    "rows_per_chunk", ROWS_PER_CHUNK, "rows in one read"
)
_HELDOUT_EVERY = flags.DEFINE_integer(
    "heldout_every", HELDOUT_EVERY, "hold out one document in so many"
)


def main(argv: Sequence[str]) -> None:
    """Checks the flags and harvests."""
    if len(argv) > 1:
        raise Misuse(f"unexpected argument {argv[1]!r}: give flags only")
    if _OUT.value is None:
        raise Misuse("--out is required; see sae-jax harvest --help")
    store = harvest(
        load_subject(_SUBJECT.value),
        read_documents(_TEXT.value) if _TEXT.value else read_standard_library(),
        _OUT.value,
        _SITE.value,
        context_length=_CONTEXT_LENGTH.value,
        max_rows=_MAX_ROWS.value,
        heldout_every=_HELDOUT_EVERY.value,
        rows_per_shard=_ROWS_PER_SHARD.value,
        rows_per_chunk=_ROWS_PER_CHUNK.value,
    )
    rows = ", ".join(f"{n:,} {split} rows" for split, n in store.manifest.rows.items())
    print(f"harvested: {_OUT.value}: {rows} of {', '.join(store.sites)}")
