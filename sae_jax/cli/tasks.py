"""Write binary tasks about Python source, to measure an SAE's latents on.

    sae-jax tasks --out=tasks.jsonl
    sae-jax tasks --out=tasks.jsonl --text=src/ --heldout_every=1 --rows=400

Prints what each task asks, how often the answer is yes, and how many rows it has. The
text is the running Python's standard library unless --text names files or folders; of
it, what a store holds out. `sae-jax evaluate --tasks=tasks.jsonl` reads the file.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from sae_jax.cli.errors import Misuse
from sae_jax.evals import EvaluateConfig
from sae_jax.harvest import HELDOUT_EVERY
from sae_jax.tasks import format_counts, python_examples, write_examples
from sae_jax.text import is_heldout, read_documents, read_standard_library

_OUT = flags.DEFINE_string("out", None, "the file to write")
_TEXT = flags.DEFINE_multi_string("text", None, "a file or folder; may repeat")
_ROWS = flags.DEFINE_integer(
    "rows", EvaluateConfig.task_rows, "rows of a task at most, half of each class"
)
_SEED = flags.DEFINE_integer("seed", 0, "draws the rows")
_HELDOUT_EVERY = flags.DEFINE_integer(
    "heldout_every", HELDOUT_EVERY, "take the one document in so many that is held out"
)


def main(argv: Sequence[str]) -> None:
    """Checks the flags, writes the file and prints the table."""
    if len(argv) > 1:
        raise Misuse(f"unexpected argument {argv[1]!r}: give flags only")
    if _OUT.value is None:
        raise Misuse("--out is required; see sae-jax tasks --help")
    if not Path(_OUT.value).absolute().parent.is_dir():
        raise Misuse(f"--out={_OUT.value}: there is no such folder; make it first")
    documents = read_documents(_TEXT.value) if _TEXT.value else read_standard_library()
    generated = python_examples(
        [each for each in documents if is_heldout(each.name, _HELDOUT_EVERY.value)],
        _ROWS.value,
        _SEED.value,
    )
    write_examples(_OUT.value, generated.examples + generated.pairs)
    print(format_counts(generated))
    print(f"\n{_OUT.value}")
