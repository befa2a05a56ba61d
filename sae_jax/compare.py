"""Many SAEs side by side: a table, and frontiers of each figure against L0.

Only what was measured on the same rows can be compared, so evaluations that differ in
text, subject, site or seed are refused, and so are those of a metric that both have by
different settings.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_jax import plots
from sae_jax.evals import MEANINGS, format_name, format_value
from sae_jax.evals.figures import Figure, make_points
from sae_jax.evaluation import EVALUATION_FILE
from sae_jax.files import write_whole
from sae_jax.pages import render

PAGE_FILE = "compare.html"
DATA_FILE = "compare.json"
# The figures that are compared, where they were measured, in this order.
COMPARED = (
    "l0",
    "nmse_raw",
    "dead_fraction",
    "delta_ce",
    "recovered_from_mean",
    "equivalent_compute_share",
    "probe_loss",
    "n2g_f1",
    "ablation_sparsity",
    "task_decoder_cosine",
    "sparse_accuracy_1",
    "absorption_fraction",
    "spurious_removed_5",
    "targeting_5",
)
# What must be the same for figures to be comparable, and settings that need not be.
_SAME = ("corpus", "layout", "dtype", "subject", "site", "seed")
_MAY_DIFFER = ("batch_rows", "against", "against_hash")


@dataclass(frozen=True)
class Row:
    """One SAE: its folder, what it is, and its figures by name."""

    name: str
    about: str
    n_latents: int
    architecture: str
    figures: Mapping[str, Figure]


def compare(folders: Sequence[str | Path], out: str | Path | None = None) -> list[Row]:
    """The SAEs evaluated in these folders, by size and L0.

    Args:
        folders: each with an evaluation.json, as `sae-jax evaluate` leaves it.
        out: a folder for compare.html and compare.json; none is written for None.

    Raises:
        FileNotFoundError: a folder without an evaluation.
        ValueError: evaluations of different rows, or of different settings.
    """
    results = [_read(Path(folder)) for folder in folders]
    for folder, result in zip(folders, results, strict=True):
        _check_same(str(folders[0]), results[0], str(folder), result)
    _check_settings(folders, results)
    names = _name(folders)
    rows = [_make_row(name, result) for name, result in zip(names, results)]
    rows.sort(key=lambda row: (row.n_latents, row.figures["l0"]["value"], row.name))
    if out is not None:
        _write(Path(out), rows, results[0])
    return rows


def list_names(rows: Sequence[Row]) -> list[str]:
    """The compared figures that some row has."""
    return [name for name in COMPARED if any(name in row.figures for row in rows)]


def format_rows(rows: Sequence[Row]) -> str:
    """The rows as a table in text: values, without their intervals."""
    names = list_names(rows)
    cells = [["SAE", "latents", *names]]
    for row in rows:
        values = [_format(row.figures.get(name)) for name in names]
        cells.append([row.name, f"{row.n_latents:,}", *values])
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for first, *rest in cells:
        right = (cell.rjust(width) for cell, width in zip(rest, widths[1:]))
        lines.append("  ".join((first.ljust(widths[0]), *right)).rstrip())
    return "\n".join(lines)


def _format(figure: Figure | None) -> str:
    return "" if figure is None else format_value(figure["value"])


def _read(folder: Path) -> dict[str, Any]:
    file = folder / EVALUATION_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"no {EVALUATION_FILE} in {folder}: run sae-jax evaluate {folder} first"
        )
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        results["metrics"]["reconstruction"]["l0"]["value"]
        results["settings"]["reconstruction"]["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not an evaluation with the suite core: {error!r}; run sae-jax "
            f"evaluate {folder} again"
        ) from error
    return results


def _check_same(
    first: str, wanted: Mapping[str, Any], folder: str, found: Mapping[str, Any]
) -> None:
    for name in _SAME:
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"{folder} was evaluated with {name} {_show(found, wanted, name)}, "
                f"{first} with {_show(wanted, found, name)}: evaluate them alike"
            )


def _check_settings(
    folders: Sequence[str | Path], results: Sequence[Mapping[str, Any]]
) -> None:
    """Refuses metrics that were measured by different settings."""
    first: dict[str, tuple[str | Path, dict[str, Any]]] = {}
    for folder, result in zip(folders, results, strict=True):
        for metric, every in result["settings"].items():
            settings = {n: v for n, v in every.items() if n not in _MAY_DIFFER}
            other, wanted = first.setdefault(metric, (folder, settings))
            for name, value in wanted.items():
                if settings.get(name) != value:
                    raise ValueError(
                        f"{metric} was measured with {name} = {settings.get(name)} in "
                        f"{folder}, with {value} in {other}: evaluate them alike"
                    )


def _show(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> str:
    """The value, of a dict only the entries that differ."""
    value, against = one.get(name), other.get(name)
    if isinstance(value, dict) and isinstance(against, dict):
        value = {k: v for k, v in value.items() if v != against.get(k)}
    return str(value)


def _name(folders: Sequence[str | Path]) -> list[str]:
    """The folders' own names, or their whole paths where two are called alike."""
    paths = [Path(folder).resolve() for folder in folders]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        return [str(folder) for folder in folders]
    return names


def _make_row(name: str, results: Mapping[str, Any]) -> Row:
    figures = {
        figure_name: figure
        for metric in results["metrics"].values()
        for figure_name, figure in metric.items()
        if "value" in figure
    }
    return Row(
        name=name,
        about=f"{format_name(results)}; {results['n_latents']:,} latents",
        n_latents=results["n_latents"],
        architecture=results["architecture"],
        figures=figures,
    )


def _write(out: Path, rows: Sequence[Row], results: Mapping[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    names = list_names(rows)
    frontiers = {
        name: _make_frontier(name, rows) for name in names if name != "l0"
    }
    page = render(
        "compare.html",
        rows=rows,
        names=names,
        site=results["site"],
        subject=results["subject"],
        n_rows=results["rows"],
        seed=results["seed"],
        meanings=MEANINGS,
        plots=[plots.draw(name, plot) for name, plot in frontiers.items()],
    )
    data = {
        "saes": {row.name: dict(row.figures) for row in rows},
        "frontiers": frontiers,
    }
    write_whole(out / PAGE_FILE, page)
    write_whole(out / DATA_FILE, json.dumps(data, indent=2, allow_nan=False) + "\n")


def _make_frontier(name: str, rows: Sequence[Row]) -> Figure:
    """The figure over L0, a line for each architecture and size."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if name in row.figures:
            line = lines.setdefault(f"{row.architecture}, {row.n_latents:,}", [])
            point = (row.figures["l0"]["value"], row.figures[name]["value"])
            line.append(point)
    return make_points(lines, "L0", name, x_log=True)
