"""An inspection as a page: one HTML file that needs no network."""

from pathlib import Path

import numpy as np
from markupsafe import Markup

from sae_jax import plots
from sae_jax.evals.figures import make_curve, make_histogram
from sae_jax.files import write_whole
from sae_jax.inspection import Inspection
from sae_jax.inspection.describe import (
    describe_row,
    format_bytes,
    list_figures,
    list_settings,
)
from sae_jax.inspection.figures import SiteFigures
from sae_jax.pages import render

_BINS = 40
_LOG_RANGE = 20  # norms that reach over more are drawn on a log scale


def write_page(path: str | Path, inspection: Inspection) -> Path:
    """Writes the page, whose folder must be there; returns its path."""
    page = render(
        "inspect.html",
        inspection=inspection,
        settings=list_settings(inspection),
        figures={
            name: list_figures(site)
            for name, site in inspection.sites.items()
            if site.statistics
        },
        plots={name: _draw_site(name, s) for name, s in inspection.sites.items()},
        outlier_rows={
            name: [describe_row(row) for row in site.outlier_rows]
            for name, site in inspection.sites.items()
        },
        n_bytes={name: format_bytes(n) for name, n in inspection.bytes.items()},
    )
    write_whole(path, page)
    return Path(path)


def _draw_site(name: str, site: SiteFigures) -> list[Markup]:
    found, drawn = site.statistics, {}
    if found is not None:
        is_known = np.isfinite(found.norm_t)
        norms = {
            "mean": found.norm_t[is_known],
            "largest": found.largest_norm_t[is_known],
        }
        most, least = norms["largest"].max(), norms["mean"].min()
        drawn["norms by position"] = make_curve(
            np.flatnonzero(is_known),
            norms,
            "position",
            "norm",
            y_log=bool(most > _LOG_RANGE * least),
        )
    if len(site.sample_norms):
        counts, edges = np.histogram(site.sample_norms, bins=_BINS)
        drawn["norms of sampled rows"] = make_histogram(edges, counts, "norm", "rows")
    if found is not None:
        spectrum = {
            "second moment": np.sort(found.second_moment_d)[::-1],
            "variance": np.sort(found.variance_d)[::-1],
        }
        drawn["spectrum by dimension"] = make_curve(
            np.arange(1, site.width + 1), spectrum, "rank", "", x_log=True, y_log=True
        )
    return [plots.draw(f"{name}: {title}", plot) for title, plot in drawn.items()]
