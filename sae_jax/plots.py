"""Plots as inline SVG that takes its colours from the page around it.

A plot is the JSON form that `sae_jax.evals.figures` makes: a curve or a histogram.
"""

import io
import itertools
import re
from collections.abc import Callable, Mapping
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
_STYLES = ((_ACCENT, "-"), (_INK, "--"), (_INK, ":"), (_INK, "-."))
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
    return isinstance(value, Mapping) and ("x" in value or "edges" in value)


def draw(name: str, plot: Mapping[str, Any]) -> Markup:
    """A curve or a histogram as inline SVG, sized by the page."""
    on_axes = _draw_curves if "x" in plot else _draw_histogram
    return _draw(name.replace("_", " "), lambda axes: on_axes(axes, plot))


def _draw_curves(axes: Axes, plot: Mapping[str, Any]) -> None:
    for (name, y), (colour, line) in zip(plot["ys"].items(), itertools.cycle(_STYLES)):
        marker = "o" if len(y) <= 12 else None
        # Not clipped: a line at zero lies on the axis.
        axes.plot(
            plot["x"],
            y,
            label=name,
            marker=marker,
            markersize=3,
            linewidth=1.5,
            clip_on=False,
            color=colour,
            linestyle=line,
        )
    values = [value for y in plot["ys"].values() for value in y]
    axes.set_xlabel(plot["x_label"])
    axes.set_ylabel(plot["y_label"])
    if plot["x_log"] and min(plot["x"]) > 0:
        axes.set_xscale("log")
    elif max(plot["x"], default=0) >= 10_000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if plot["y_log"] and min(values) > 0:
        axes.set_yscale("log")
        _label_plainly(axes.yaxis)
    elif min(values) >= 0:
        axes.set_ylim(0, 1.1 * max(values) or 1)
    if len(plot["ys"]) > 1:
        axes.legend()


def _draw_histogram(axes: Axes, plot: Mapping[str, Any]) -> None:
    axes.stairs(plot["counts"], plot["edges"], fill=True, color=_ACCENT)
    axes.set_xlabel(plot["x_label"])
    axes.set_ylabel(plot["y_label"])


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
