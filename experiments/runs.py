"""Many small runs, each trained, measured and forgotten: what the sweeps here share."""

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging

import sae_jax
from sae_jax.config import TrainConfig
from sae_jax.evals import EvaluateConfig

Figures = dict[str, Any]


class Runs:
    """Figures of runs, kept as JSON lines, so that a stopped sweep goes on."""

    def __init__(
        self,
        out: str | Path,
        get_config: Callable[..., TrainConfig],
        measure: Callable[..., Figures],
    ):
        """`measure(sae, *run)` is asked about the SAE of `get_config(*run)`."""
        self._out = Path(out)
        self._out.mkdir(parents=True, exist_ok=True)
        self._get_config, self._measure = get_config, measure
        self._path = self._out / "results.jsonl"
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        results = [json.loads(line) for line in lines]
        self._done = {tuple(result["run"]): result for result in results}

    def figures(self, *run: Any) -> Figures:
        """Those of one run, which is trained unless it was before."""
        if run not in self._done:
            workdir = self._out / "run"
            shutil.rmtree(workdir, ignore_errors=True)
            with (self._out / "log").open("a") as log, contextlib.redirect_stderr(log):
                sae_jax.train(self._get_config(*run), workdir)
            sae = sae_jax.load(workdir)
            result = {"run": run} | self._measure(sae, *run)
            shutil.rmtree(workdir)
            with self._path.open("a") as file:
                file.write(json.dumps(result) + "\n")
            self._done[run] = result
        return self._done[run]


def start(
    name: str,
    get_config: Callable[..., TrainConfig],
    measure: Callable[[str], Callable[..., Figures]],
    print_table: Callable[[Runs], None],
) -> None:
    """The main of a sweep: flags, its runs, its table."""
    store = flags.DEFINE_string("store", "store", "the activation store")
    out = flags.DEFINE_string("out", name, "where results are kept")

    def main(argv: list[str]) -> None:
        del argv
        logging.set_verbosity(logging.WARNING)
        of_store = functools.partial(get_config, store=store.value)
        print_table(Runs(out.value, of_store, measure(store.value)))

    app.run(main)


def measure_heldout(
    store: str, names: Sequence[str], rows: int | None = None
) -> Callable[..., Figures]:
    """A `measure` for `Runs`: these figures on so many held-out rows, or on all."""
    subject, opened = sae_jax.load_subject(), sae_jax.open_store(store)
    config = EvaluateConfig(rows=rows or opened.rows("heldout"))

    def figures(sae: Any, *run: Any) -> Figures:
        del run
        metrics = ("reconstruction", "density")
        results = sae_jax.evaluate(sae, subject, opened, metrics, config=config)
        measured = results["metrics"]["reconstruction"] | results["metrics"]["density"]
        return {name: measured[name]["value"] for name in names}

    return figures


def spread(values: Iterable[float], places: int) -> str:
    """Mean ± half of the range."""
    values = list(values)
    half = (max(values) - min(values)) / 2
    return f"{np.mean(values):.{places}f} ± {half:.{places}f}"


def print_row(cells: Sequence[Any]) -> None:
    """One row of a Markdown table."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def print_header(names: Sequence[str]) -> None:
    print_row(names)
    print("|" + "---|" * len(names), flush=True)
