"""Figures with their errors: a value, its 95 % interval and what it was taken over.

Rows of one context resemble each other, so a context, not a row, is the unit of
sampling. With n_s and d_s the sums over context s, out of S contexts,

    R = sum n_s / sum d_s,    var R = S / (S - 1) * sum (n_s - R d_s)^2 / (sum d_s)^2

the linearised variance of a ratio under cluster sampling (Cochran, "Sampling
Techniques", 3rd edition, section 6.3). A mean is the ratio to the number of rows.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Figure = dict[str, Any]

_NORMAL_95 = 1.959964


def make_figure(
    value: float, ci95: float | None, samples: int, unit: str
) -> Figure:
    """The JSON form of a figure: value ± ci95 over `samples` of `unit`."""
    return {"value": value, "ci95": ci95, "samples": samples, "unit": unit}


def mean_figure(values_st: Array, unit: str) -> Figure:
    """The mean over all of [contexts, positions]."""
    n_contexts, n_positions = values_st.shape
    counts_s = np.full(n_contexts, n_positions, np.float64)
    return ratio_figure(values_st.sum(axis=1), counts_s, values_st.size, unit)


def ratio_figure(
    numerator_s: Array, denominator_s: Array, samples: int, unit: str
) -> Figure:
    """The ratio of two sums, given by context; no interval for a single context."""
    n_contexts, total = len(numerator_s), float(denominator_s.sum())
    # 0/0 is for the caller to name, with the metric, as a figure that is not finite.
    ratio = float(numerator_s.sum()) / total if total else math.nan
    if n_contexts < 2:
        return make_figure(ratio, None, samples, unit)
    residual_s = numerator_s - ratio * denominator_s
    variance = n_contexts / (n_contexts - 1) * float(np.sum(residual_s**2)) / total**2
    return make_figure(ratio, _NORMAL_95 * math.sqrt(variance), samples, unit)
