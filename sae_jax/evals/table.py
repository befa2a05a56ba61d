"""Results as text: a table of at most 80 columns."""

from collections.abc import Mapping
from typing import Any


_LARGE = 1e7  # a number from here on that counts nothing is given to three digits
_NOTHING = 1e-12  # below it rounding is all there is


def format_table(results: Mapping[str, Any]) -> str:
    """All figures, metric by metric; plots and tables are left to the report."""
    lines = [
        format_name(results),
        f"{results['n_latents']:,} latents at {results['site']} of "
        f"{results['subject']['name']}, {results['rows']:,} held-out rows",
    ]
    if "step" in results:
        lines.append(
            f"{results['weights']} weights of step {results['step']:,} of "
            f"{results['n_steps']:,}"
        )
    if results["rows"] < results["rows_wanted"]:
        lines.append(
            f"fewer rows than the {results['rows_wanted']:,} wanted: rare latents may "
            "look dead"
        )
    for metric, figures in results["metrics"].items():
        values = {name: fig for name, fig in figures.items() if "value" in fig}
        if values:
            lines += ["", f"{metric:<30}{'value':>9}{'± 95 %':>10}  over"]
        for name, figure in values.items():
            lines.append(f"  {name:<28}" + _format_figure(figure))
    return "\n".join(lines)


def format_name(results: Mapping[str, Any]) -> str:
    """The architecture, and what says how sparse its codes are."""
    settings = (f"{name} {value:g}" for name, value in results["sparsity"].items())
    return ", ".join((results["architecture"], *settings))


def format_value(value: float) -> str:
    """Whole numbers as they are; others to four places, fewer when they are large."""
    if abs(value) >= _LARGE and not isinstance(value, int):
        return f"{value:.3g}"
    if abs(value) < _NOTHING or value == int(value):
        return f"{int(value):,}"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"


def _format_figure(figure: Mapping[str, Any]) -> str:
    interval = "" if figure["ci95"] is None else format_value(figure["ci95"])
    over = f"{figure['samples']:,} {figure['unit']}"
    return f"{format_value(figure['value']):>9}{interval:>10}  {over}"
