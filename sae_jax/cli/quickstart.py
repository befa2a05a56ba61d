"""Train, evaluate and picture an SAE of the default subject, from text to report.

    sae-jax quickstart
    sae-jax quickstart --folder=demo

Reads the source of this Python's standard library, needs no network and no
accelerator, and takes some minutes on two cores. Run again, it goes on where it was.
"""

from collections.abc import Sequence

from absl import flags

from sae_jax.cli.errors import Misuse
from sae_jax.quickstart import FOLDER, quickstart

_FOLDER = flags.DEFINE_string("folder", FOLDER, "where to put the store and the run")


def main(argv: Sequence[str]) -> None:
    """Runs the quickstart."""
    if len(argv) > 1:
        raise Misuse(f"unexpected argument {argv[1]!r}: give flags only")
    report = quickstart(_FOLDER.value)
    print(f"\nopen {report.resolve()}")
