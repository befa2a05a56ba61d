"""How well rows are rebuilt, under the names that papers and libraries use.

Over held-out rows x, their mean m and reconstructions x̂:

    nmse            sum |x̂ - x|^2 / sum |x - m|^2, in the SAE's normalised space
    nmse_raw        the same in activation space; compare this across normalisations
    mse_over_power  mean of |x̂ - x|^2 / |x|^2, in activation space; rows x = 0 left out
    fvu_batch       mean over batches of sum |x̂ - x|^2 / sum |x - batch mean|^2, in
                    activation space
    cosine          mean of x̂·x / |x̂||x|, in activation space
    explained_variance  mean over dimensions d of 1 - sum (x̂_d - x_d)^2 / sum (x_d -
                    m_d)^2, in activation space; dimensions that do not vary left out
    shrinkage       γ = E|x̂ - m|^2 / E (x̂ - m)·(x - m), in the SAE's space: below 1
                    where reconstructions are too short (Rajamanoharan et al. 2024,
                    arXiv:2404.16014, there without m, which hides the effect);
                    left out where x̂ does not follow x at all
    l0              mean number of latents above 0 in a code
    l0_cut          mean number above 0 that a code has no room for (`sae.max_active`)

Source: Gao et al. 2024 (arXiv:2406.04093), section 2.1, for nmse; its released code
for mse_over_power; SAE libraries for fvu_batch.
"""

import math
from typing import Any

import numpy as np

from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import Context
from sae_jax.evals.figures import (
    Array,
    Figure,
    make_curve,
    make_figure,
    mean_figure,
    ratio_figure,
)
from sae_jax.evals.rows import RowMeasures, measure_rows

_LEAST_CORRELATION = 1e-4  # below it, rounding decides the quotient

READS = ("rows", "batch_rows")
MEANINGS = {
    "nmse": "squared error over that of the mean row, in the SAE's space",
    "nmse_raw": "the same in activation space",
    "mse_over_power": "squared error over squared norm, mean over rows",
    "fvu_batch": "squared error over that of each batch's mean row",
    "cosine": "between row and reconstruction",
    "explained_variance": "1 less a dimension's own nmse, mean over dimensions",
    "shrinkage": "length of reconstructions: below 1 where they are too short",
    "l0": "latents above 0 on a row",
    "l0_cut": "further ones, which sae.max_active leaves out of a code",
}


def compute(context: Context, config: EvaluateConfig) -> dict[str, Any]:
    """The figures above, all over the same held-out rows."""
    rows = measure_rows(context, config)

    def mean(values_st: Array) -> Figure:
        return mean_figure(values_st, rows.is_row_st, "rows")

    return {
        "nmse": _ratio(rows, rows.error_st, rows.variation_st),
        "nmse_raw": _ratio(rows, rows.error_raw_st, rows.variation_raw_st),
        "mse_over_power": _mean_quotient(rows.error_raw_st, rows.power_raw_st),
        **_average_batches(rows),
        "cosine": mean(rows.cosine_st),
        **_explained(rows),
        **_shrinkage(rows),
        "l0": mean(rows.l0_st),
        "l0_cut": mean(rows.n_cut_st),
    }


def _average_batches(rows: RowMeasures) -> dict[str, Figure]:
    n_batches = len(rows.fvu_n)
    if not n_batches:
        return {}
    mean = float(rows.fvu_n.mean())
    return {"fvu_batch": make_figure(mean, None, n_batches, "batches")}


def _explained(rows: RowMeasures) -> dict[str, Any]:
    """Explained variance by dimension: its mean, and the dimensions in order of it."""
    varies_d = rows.variation_raw_d > 0
    if not varies_d.any():
        return {}
    explained_d = 1 - rows.error_raw_d[varies_d] / rows.variation_raw_d[varies_d]
    return {
        "explained_variance": make_figure(
            float(explained_d.mean()), None, len(explained_d), "dimensions"
        ),
        "explained_variance_by_dimension": make_curve(
            np.arange(len(explained_d)),
            {"explained variance": np.sort(explained_d)},
            "dimensions, from the one explained least",
            "explained variance",
        ),
    }


def _shrinkage(rows: RowMeasures) -> dict[str, Figure]:
    most = math.sqrt(rows.recon_variation_st.sum() * rows.variation_st.sum())
    if abs(rows.covariation_st.sum()) <= _LEAST_CORRELATION * most:
        return {}
    return {"shrinkage": _ratio(rows, rows.recon_variation_st, rows.covariation_st)}


def _ratio(rows: RowMeasures, numerator_st: Array, denominator_st: Array) -> Figure:
    return ratio_figure(
        numerator_st.sum(axis=1), denominator_st.sum(axis=1), rows.n_rows, "rows"
    )


def _mean_quotient(numerator_st: Array, denominator_st: Array) -> Figure:
    is_defined_st = denominator_st > 0
    quotient_st = np.divide(
        numerator_st,
        denominator_st,
        where=is_defined_st,
        out=np.zeros_like(numerator_st),
    )
    counts_s = is_defined_st.sum(axis=1).astype(np.float64)
    return ratio_figure(quotient_st.sum(axis=1), counts_s, int(counts_s.sum()), "rows")
