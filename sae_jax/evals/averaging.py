"""The averaged weights against the raw ones, over the same held-out rows.

    nmse_raw_average  squared error over that of the mean row, in activation space, with
                      the weights averaged over the last steps
    nmse_raw_last     the same with the weights as the last step left them
    averaging_gain    nmse_raw_last - nmse_raw_average: above 0 where the average is
                      better

Source: Gao et al. 2024 (arXiv:2406.04093), appendix A: the average is what is
evaluated, and where a run is short the better of the two is taken.
"""

import dataclasses

from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import Context
from sae_jax.evals.figures import Array, Figure, ratio_figure
from sae_jax.evals.rows import measure_rows

READS = ("rows", "batch_rows")
MEANINGS = {
    "nmse_raw_average": "nmse_raw with the averaged weights",
    "nmse_raw_last": "nmse_raw with the weights of the last step",
    "averaging_gain": "the second less the first: above 0 where the average is better",
}


def compute(context: Context, config: EvaluateConfig) -> dict[str, Figure]:
    """The figures above; none where the context has no raw weights to compare with."""
    if context.raw is None:
        return {}
    of_raw = dataclasses.replace(context, sae=context.raw, measured={})
    average_s, variation_s = _sum_by_context(context, config)
    last_s, _ = _sum_by_context(of_raw, config)
    n_rows = measure_rows(context, config).n_rows

    def make(error_s: Array) -> Figure:
        return ratio_figure(error_s, variation_s, n_rows, "rows")

    return {
        "nmse_raw_average": make(average_s),
        "nmse_raw_last": make(last_s),
        "averaging_gain": make(last_s - average_s),
    }


def _sum_by_context(context: Context, config: EvaluateConfig) -> tuple[Array, Array]:
    rows = measure_rows(context, config)
    return rows.error_raw_st.sum(axis=1), rows.variation_raw_st.sum(axis=1)
