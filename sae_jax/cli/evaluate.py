"""Measure a trained SAE on held-out text.

    sae-jax evaluate run/
    sae-jax evaluate run/ --rows=1000000 --weights=raw --noreport

Prints the table of figures, and leaves evaluation.json and report.html in the run
folder. The store and the subject are those of the run, unless given.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from sae_jax.cli.errors import Misuse
from sae_jax.evals import EvaluateConfig, format_table
from sae_jax.report import EVALUATION_FILE, REPORT_FILE, evaluate_run
from sae_jax.run import WEIGHTS

_STORE = flags.DEFINE_string("store", None, "activation store; the run's by default")
_SUBJECT = flags.DEFINE_string("subject", None, "subject model; the store's by default")
_ROWS = flags.DEFINE_integer("rows", EvaluateConfig.rows, "held-out rows to measure on")
_SEQUENCES = flags.DEFINE_integer(
    "sequences", EvaluateConfig.sequences, "held-out contexts for downstream figures"
)
_WEIGHTS = flags.DEFINE_enum("weights", "ema", WEIGHTS, "averaged or raw weights")
_SEED = flags.DEFINE_integer("seed", 0, "draws the contexts, and the latents shown")
_REPORT = flags.DEFINE_bool("report", True, "write report.html")


def main(argv: Sequence[str]) -> None:
    """Evaluates the run folder that is the one argument."""
    if len(argv) != 2:
        raise Misuse("give one run folder: sae-jax evaluate RUN_DIR [--flag=value]")
    run_dir = Path(argv[1])
    results = evaluate_run(
        run_dir,
        store=_STORE.value,
        subject=_SUBJECT.value,
        weights=_WEIGHTS.value,
        config=EvaluateConfig(rows=_ROWS.value, sequences=_SEQUENCES.value),
        seed=_SEED.value,
        report=_REPORT.value,
    )
    print(format_table(results))
    print(f"\n{run_dir / EVALUATION_FILE}")
    if _REPORT.value:
        print(run_dir / REPORT_FILE)
