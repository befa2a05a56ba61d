"""The report of a run: one HTML file that opens from disk and needs no network.

It holds the figures, the curves of training, the plots and tables of every metric, and
for a sample of latents the text they fire on. Light and dark both read well.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sae_jax import plots
from sae_jax.config import CHOOSE_K
from sae_jax.evals import MEANINGS, format_name
from sae_jax.evals.figures import make_curve
from sae_jax.files import write_whole
from sae_jax.pages import render
from sae_jax.viewer import LatentView

# Figures whose values open the report.
_HEADLINES = ("recovered_from_mean", "nmse_raw", "l0", "dead_fraction")
_AUXK_MEANING = (
    "the share of the residual that the dead latents leave unexplained: 1 is all of "
    "it, and 0 says that none is dead"
)
# What `aux_loss` is while training; other architectures have none.
_AUX_LOSS_MEANINGS = dict.fromkeys(CHOOSE_K, _AUXK_MEANING) | {
    "gated": "the error of a reconstruction from the gate's values, not the magnitudes"
}
# Scalars of metrics.jsonl that are drawn over rows, and whether on a log scale.
_CURVES = {"nmse": True, "aux_loss": False, "n_dead": False, "l0": False}


def write_report(
    path: str | Path,
    results: Mapping[str, Any],
    views: Sequence[LatentView] = (),
    metrics_rows: Sequence[Mapping[str, float]] = (),
    config: str | None = None,
) -> Path:
    """Writes the page; returns its path.

    Args:
        path: the file.
        results: of `sae_jax.evals.evaluate`.
        views: of latents to show.
        metrics_rows: what training reported.
        config: the text of the run's config.json.
    """
    parts = {
        name: part
        for metric in results["metrics"].values()
        for name, part in metric.items()
    }
    figures = {name: part for name, part in parts.items() if "value" in part}
    page = render(
        "report.html",
        results=results,
        name=format_name(results),
        headlines={name: figures[name] for name in _HEADLINES if name in figures},
        meanings=MEANINGS,
        aux_loss_meaning=_AUX_LOSS_MEANINGS.get(results["architecture"]),
        curves={
            name: _draw_training(name, metrics_rows, is_log)
            for name, is_log in _CURVES.items()
            if any(name in row for row in metrics_rows)
        },
        plots=[plots.draw(n, part) for n, part in parts.items() if plots.is_plot(part)],
        tables={name: part for name, part in parts.items() if "columns" in part},
        views=views,
        config=config,
    )
    write_whole(path, page)
    return Path(path)


def _draw_training(
    name: str, metrics_rows: Sequence[Mapping[str, float]], is_log: bool
) -> Markup:
    points = [(row["rows"], row[name]) for row in metrics_rows if name in row]
    rows, values = zip(*points, strict=True)
    return plots.draw(name, make_curve(rows, {name: values}, "rows", "", y_log=is_log))
