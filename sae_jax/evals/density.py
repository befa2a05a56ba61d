"""How often each latent fires, and which never do.

    density_l = rows on which latent l is above 0 / rows
    dead_fraction = latents with density 0 / latents

A latent is dead here when it fires on none of the held-out rows read, so the figure
falls as rows are added and means nothing without their number (Gao et al. 2024,
arXiv:2406.04093, call a latent dead that fires on none of 10 million training rows).
"""

import math
from typing import Any

import numpy as np

from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import Context
from sae_jax.evals.figures import make_figure, make_histogram
from sae_jax.evals.rows import measure_rows

_BINS_PER_DECADE = 5

READS = ("rows",)
MEANINGS = {
    "n_dead": "latents that fire on none of the rows read",
    "dead_fraction": "their share of all latents",
}


def compute(context: Context, config: EvaluateConfig) -> dict[str, Any]:
    """Dead latents, and the histogram of log10 density of those that are alive."""
    rows = measure_rows(context, config)
    counts_l, n_rows = rows.counts_l, rows.n_rows
    n_latents, n_dead = len(counts_l), int(np.sum(counts_l == 0))
    decades = max(1, math.ceil(math.log10(n_rows)))
    log10_edges = np.linspace(-decades, 0, decades * _BINS_PER_DECADE + 1)
    log10_density = np.log10(counts_l[counts_l > 0] / n_rows)
    histogram, _ = np.histogram(log10_density, log10_edges)
    return {
        "n_dead": make_figure(n_dead, None, n_latents, "latents"),
        "dead_fraction": make_figure(n_dead / n_latents, None, n_latents, "latents"),
        "densities": make_histogram(
            log10_edges,
            histogram,
            "log10 of the share of rows that a latent fires on",
            "latents",
        ),
    }
