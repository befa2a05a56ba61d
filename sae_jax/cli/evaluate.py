"""Measure a trained SAE on held-out text.

    sae-jax evaluate run/
    sae-jax evaluate run/ --suite=all
    sae-jax evaluate run/checkpoints/390 --rows=1000000 --weights=raw --noreport

Prints the table of figures, and leaves evaluation.json and report.html in the run
folder, for a checkpoint in evaluations/ of it. An evaluation that was stopped goes on
with what it had not measured; --fresh measures all of it again. The store and the
subject are those of the run, unless given.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags

from sae_jax.cli.errors import Misuse
from sae_jax.evals import SUITES, EvaluateConfig, format_table
from sae_jax.evaluation import EVALUATION_FILE, REPORT_FILE, evaluate_run, find_out
from sae_jax.run import WEIGHTS, name_file

_SUITE = flags.DEFINE_enum(
    "suite",
    "core",
    SUITES,
    "; ".join(f"{name}: {', '.join(metrics)}" for name, metrics in SUITES.items()),
)
_STORE = flags.DEFINE_string("store", None, "activation store; the run's by default")
_SUBJECT = flags.DEFINE_string("subject", None, "subject model; the store's by default")
_WEIGHTS = flags.DEFINE_enum("weights", "ema", WEIGHTS, "averaged or raw weights")
_SEED = flags.DEFINE_integer("seed", 0, "draws all samples, and the latents shown")
_OUT = flags.DEFINE_string("out", None, "folder of the results; the run's by default")
_FRESH = flags.DEFINE_bool("fresh", False, "measure again what evaluation.json has")
_REPORT = flags.DEFINE_bool("report", True, "write report.html")

_DEFINE: dict[Any, Any] = {int: flags.DEFINE_integer, str: flags.DEFINE_string}
_CONFIG: dict[str, Any] = {
    field.name: _DEFINE[field.type](
        field.name, field.default, field.metadata["meaning"]
    )
    for field in dataclasses.fields(EvaluateConfig)
}


def main(argv: Sequence[str]) -> None:
    """Evaluates the run folder that is the one argument."""
    if len(argv) != 2:
        raise Misuse("give one run folder: sae-jax evaluate RUN_DIR [--flag=value]")
    out = find_out(argv[1], _OUT.value)
    results = evaluate_run(
        argv[1],
        store=_STORE.value,
        subject=_SUBJECT.value,
        weights=_WEIGHTS.value,
        suite=_SUITE.value,
        config=EvaluateConfig(**{name: flag.value for name, flag in _CONFIG.items()}),
        seed=_SEED.value,
        out=out,
        fresh=_FRESH.value,
        report=_REPORT.value,
    )
    print(format_table(results))
    print(f"\n{name_file(out, EVALUATION_FILE)}")
    if _REPORT.value:
        print(name_file(out, REPORT_FILE))
