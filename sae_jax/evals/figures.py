"""Figures with their errors: a value, its 95 % interval and what it was taken over.

Rows of one context resemble each other, so a context, not a row, is the unit of
sampling. With n_s and d_s the sums over context s, out of S contexts,

    R = sum n_s / sum d_s,    var R = S / (S - 1) * sum (n_s - R d_s)^2 / (sum d_s)^2

the linearised variance of a ratio under cluster sampling (Cochran, "Sampling
Techniques", 3rd edition, section 6.3), and the interval is that of Student's t with
S - 1 degrees of freedom. A mean is the ratio to the number of rows or tokens.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

Array = NDArray[np.float64]
Figure = dict[str, Any]


def make_figure(
    value: float, ci95: float | None, samples: int, unit: str
) -> Figure:
    """The JSON form of a figure: value ± ci95 over `samples` of `unit`."""
    return {"value": value, "ci95": ci95, "samples": samples, "unit": unit}


def average_figure(values_n: ArrayLike, unit: str) -> Figure:
    """The mean of independent values, of which there is at least one."""
    numbers_n = np.asarray(values_n, np.float64)
    return ratio_figure(numbers_n, np.ones_like(numbers_n), len(numbers_n), unit)


def mean_figure(values_st: Array, counts_st: NDArray[np.bool_], unit: str) -> Figure:
    """The mean over those of [contexts, positions] that count; others must be 0."""
    counts_s = counts_st.sum(axis=1).astype(np.float64)
    return ratio_figure(values_st.sum(axis=1), counts_s, int(counts_st.sum()), unit)


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
    ci95 = float(stdtrit(n_contexts - 1, 0.975)) * math.sqrt(variance)
    return make_figure(ratio, ci95, samples, unit)


def make_curve(
    x: ArrayLike,
    ys: Mapping[str, ArrayLike],
    x_label: str,
    y_label: str,
    x_log: bool = False,
    y_log: bool = False,
) -> Figure:
    """The JSON form of lines over one x, by their names."""
    return {
        "x": _floats(x),
        "ys": {name: _floats(y) for name, y in ys.items()},
        "x_label": x_label,
        "y_label": y_label,
        "x_log": x_log,
        "y_log": y_log,
    }


def make_points(
    points: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    x_log: bool = False,
    y_log: bool = False,
) -> Figure:
    """The JSON form of lines that have an x of their own, by their names."""
    return {
        "points": {name: sorted(map(list, xy)) for name, xy in points.items()},
        "x_label": x_label,
        "y_label": y_label,
        "x_log": x_log,
        "y_log": y_log,
    }


def make_histogram(
    edges: ArrayLike, counts: ArrayLike, x_label: str, y_label: str
) -> Figure:
    """The JSON form of a histogram; there is one edge more than counts."""
    return {
        "edges": _floats(edges),
        "counts": np.asarray(counts, np.int64).tolist(),
        "x_label": x_label,
        "y_label": y_label,
    }


def make_table(
    columns: Sequence[str], rows: Sequence[Sequence[str | int | float]]
) -> Figure:
    """The JSON form of a table."""
    return {"columns": list(columns), "rows": [list(row) for row in rows]}


def _floats(values: ArrayLike) -> list[float]:
    return np.asarray(values, np.float64).tolist()
