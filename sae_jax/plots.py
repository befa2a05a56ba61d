"""Plots as inline SVG that takes its colours from the page around it.

A plot is the JSON form that `sae_jax.evals.figures` makes: a curve, points, or a
histogram.
"""

import io
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator

# Colours that no plot uses, replaced in the SVG by those of the page.
_PAGE_COLOURS = {"#010203": "currentColor", "#040506": "var(--accent)"}
_INK, _ACCENT = _PAGE_COLOURS
_STYLES = tuple(
    (colour, line, marker)
    for line, marker in (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))
    for colour in (_ACCENT, _INK)
)
_FEW = 12  # points that each get a marker
_PLOT_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sae_jax",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}


def is_plot(value: Any) -> bool:
    """Whether this part of a metric is a plot."""
    return isinstance(value, Mapping) and any(kind in value for kind in _KINDS)


def draw(name: str, plot: Mapping[str, Any]) -> Markup:
    """A plot as inline SVG, sized by the page."""
    kind = next(kind for kind in _KINDS if kind in plot)
    return _draw(name.replace("_", " "), lambda axes: _KINDS[kind](axes, plot))


def _draw_curves(axes: Axes, plot: Mapping[str, Any]) -> None:
    _draw_lines(axes, plot, {name: (plot["x"], y) for name, y in plot["ys"].items()})


def _draw_points(axes: Axes, plot: Mapping[str, Any]) -> None:
    lines = {name: tuple(zip(*xy)) for name, xy in plot["points"].items() if xy}
    _draw_lines(axes, plot, lines)


def _draw_lines(
    axes: Axes, plot: Mapping[str, Any], lines: Mapping[str, Sequence[Any]]
) -> None:
    for (name, (x, y)), style in zip(lines.items(), itertools.cycle(_STYLES)):
        colour, line, marker = style
        # Not clipped: a line at zero lies on the axis.
        axes.plot(
            x,
            y,
            label=name,
            marker=marker if len(y) <= _FEW else None,
            markersize=4,
            linewidth=1.5,
            clip_on=False,
            color=colour,
            linestyle=line,
        )
    xs = [value for x, _ in lines.values() for value in x]
    ys = [value for _, y in lines.values() for value in y]
    axes.set_xlabel(plot["x_label"])
    axes.set_ylabel(plot["y_label"])
    if plot["x_log"] and min(xs) > 0:
        axes.set_xscale("log")
        _label_plainly(axes.xaxis)
    elif max(xs) >= 10_000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if plot["y_log"] and min(ys) > 0:
        axes.set_yscale("log")
        _label_plainly(axes.yaxis)
    elif min(ys) >= 0:
        axes.set_ylim(0, 1.1 * max(ys) or 1)
    if len(lines) > 1:
        axes.legend(fontsize=7)


def _draw_histogram(axes: Axes, plot: Mapping[str, Any]) -> None:
    axes.stairs(plot["counts"], plot["edges"], fill=True, color=_ACCENT)
    axes.set_xlabel(plot["x_label"])
    axes.set_ylabel(plot["y_label"])


_KINDS = {"x": _draw_curves, "points": _draw_points, "edges": _draw_histogram}


def _label_plainly(axis: Axis) -> None:
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.set_minor_formatter("{x:g}")


def _draw(title: str, on_axes: Callable[[Axes], None]) -> Markup:
    with matplotlib.rc_context(_PLOT_STYLE):
        figure = Figure(figsize=(4.2, 2.4), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        on_axes(axes)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # Inside HTML an SVG needs no namespaces, and its size comes from the view box.
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for stand_in, colour in _PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    # The ids of one plot must not be those of another.
    prefix = re.sub(r"\W+", "-", title) + "-"
    return Markup(re.sub(r'( id="|href="#|url\(#)', rf"\1{prefix}", svg))
