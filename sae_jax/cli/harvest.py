"""Run a subject model over text and store its activations.

    sae-jax harvest --out=store/
    sae-jax harvest --subject=openai-community/gpt2 --text=wiki.jsonl.gz \
        --site=resid_post.5 --site=mlp_out.5 --dtype=int8 --out=s3://bucket/store

The text is the running Python's standard library unless --text names files, folders or
hf:NAME. The same command goes on with a harvest that was stopped, and makes anew what a
complete store lacks. Several processes share one store, each with its own --process of
--n_processes.
"""

from collections.abc import Sequence

from absl import flags

from sae_jax import harvest as harvests
from sae_jax.cli import part
from sae_jax.cli.errors import Misuse
from sae_jax.mesh import make_local_mesh
from sae_jax.subjects import load_any_subject
from sae_jax.text import open_corpus, standard_library

_SUBJECT = flags.DEFINE_string("subject", "default", "folder, hub name or default")
_SITE = flags.DEFINE_multi_string("site", "resid_post.3", "where to read; may repeat")
_TEXT = flags.DEFINE_multi_string("text", None, "file, folder or hf:NAME; may repeat")
_TEXT_FIELD = flags.DEFINE_string("text_field", "text", "of JSON lines and tables")
_OUT = flags.DEFINE_string("out", None, "the store's folder, or gs:// or s3://")
_WEIGHTS_OVER = flags.DEFINE_integer("weights_over", 1, "devices that share weights")
_SETTINGS: list[flags.FlagHolder] = [
    flags.DEFINE_integer(
        "context_length", None, "tokens in a context; the subject's, at most 2048"
    ),
    flags.DEFINE_integer("max_rows", None, "stop at so many rows"),
    flags.DEFINE_float("max_gb", None, "stop at so many 10^9 bytes of rows and text"),
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "int8"], "of the rows"),
    flags.DEFINE_enum("packing", "joined", ["joined", "padded"], "see docs/data.md"),
    flags.DEFINE_enum("bos", None, ["document", "context", "none"], "what BOS leads"),
    flags.DEFINE_bool("exclude_special", False, "leave out rows of special tokens"),
    flags.DEFINE_integer("heldout_every", harvests.HELDOUT_EVERY, "of documents, one"),
    flags.DEFINE_integer("rows_per_shard", harvests.ROWS_PER_SHARD, "rows in a file"),
    flags.DEFINE_integer("rows_per_chunk", harvests.ROWS_PER_CHUNK, "rows in a read"),
    flags.DEFINE_integer("batch_contexts", harvests.BATCH_CONTEXTS, "read at a time"),
    part.PROCESS,
    part.N_PROCESSES,
]


def main(argv: Sequence[str]) -> None:
    """Checks the flags and harvests."""
    if len(argv) > 1:
        raise Misuse(f"unexpected argument {argv[1]!r}: give flags only")
    if _OUT.value is None:
        raise Misuse("--out is required; see sae-jax harvest --help")
    corpus = standard_library()
    if _TEXT.value:
        corpus = open_corpus(_TEXT.value, _TEXT_FIELD.value)
    mesh = make_local_mesh(_WEIGHTS_OVER.value)
    subject = load_any_subject(_SUBJECT.value, mesh=mesh)
    settings = {flag.name: flag.value for flag in _SETTINGS}
    store = harvests.harvest(subject, corpus, _OUT.value, _SITE.value, **settings)
    rest = f"its part of {_OUT.value}; others still write theirs"
    print(f"harvested: {store or rest}")
