"""Compare SAEs that were evaluated: a table, and frontiers of its figures against L0.

    sae-jax evaluate run1/; sae-jax evaluate run2/
    sae-jax compare run1/ run2/ --out=comparison/

Reads the evaluation.json of each folder. All must have been evaluated alike, on the
same rows. With --out, leaves compare.html and compare.json there.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from sae_jax.cli.errors import Misuse
from sae_jax.compare import PAGE_FILE, compare, format_rows

_OUT = flags.DEFINE_string("out", None, "folder of compare.html and compare.json")


def main(argv: Sequence[str]) -> None:
    """Compares the folders that are the arguments."""
    if len(argv) < 2:
        raise Misuse("give folders: sae-jax compare RUN_DIR RUN_DIR ... [--out=DIR]")
    print(format_rows(compare(argv[1:], _OUT.value)))
    if _OUT.value:
        print(f"\n{Path(_OUT.value) / PAGE_FILE}")
