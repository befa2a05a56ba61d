"""Evaluation on held-out text: one file a metric, each with `compute(context, config)`.

A metric is a dict of figures, `{"value", "ci95", "samples", "unit"}`: the value, the
half-width of its 95 % interval over contexts (`sae_jax.evals.figures`) and what it was
taken over.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from sae_jax.config import nearest_name, sparsity
from sae_jax.evals import density, downstream, reconstruction
from sae_jax.evals.context import (
    Context,
    EvaluateConfig,
    Sae,
    choose_row_sequences,
    open_context,
)
from sae_jax.store import Store
from sae_jax.subjects import Subject

__all__ = [
    "METRICS",
    "Context",
    "EvaluateConfig",
    "evaluate",
    "format_name",
    "format_table",
    "format_value",
]

METRICS = {
    "reconstruction": reconstruction.compute,
    "density": density.compute,
    "downstream": downstream.compute,
}
# Below this, a latent that did not fire says little.
ROWS_WANTED = 200_000


def evaluate(
    sae: Sae,
    subject: Subject,
    store: Store,
    metrics: Sequence[str] = tuple(METRICS),
    mesh: Mesh | None = None,
    seed: int = 0,
    config: EvaluateConfig | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """The metrics of an SAE on the held-out rows of its store, ready for JSON.

    Raises:
        ValueError: an unknown metric; SAE, subject, store and mesh that do not belong
            together; a figure that is not finite.
    """
    config = config or EvaluateConfig()
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}: {nearest_name(name, METRICS)}")
    if mesh is not None and mesh != sae.mesh:
        raise ValueError(
            f"the SAE is on a mesh {dict(sae.mesh.shape)}, not {dict(mesh.shape)}: "
            "load it on the mesh that evaluates it"
        )
    context = open_context(sae, subject, store, seed, progress)
    computed = {name: METRICS[name](context, config) for name in metrics}
    for name, figures in computed.items():
        _check_finite(name, figures)
    n_contexts = len(choose_row_sequences(context, config.rows))
    return {
        "site": context.site,
        "architecture": sae.config.architecture,
        "sparsity": sparsity(sae.config),
        "n_latents": sae.n_latents,
        "d_model": sae.d_model,
        "store": str(store.path),
        "subject": {"name": subject.name, "identity": subject.identity},
        "seed": seed,
        "rows": n_contexts * store.context_length,
        "rows_wanted": ROWS_WANTED,
        "context_length": store.context_length,
        "metrics": computed,
    }


def format_table(results: dict[str, Any]) -> str:
    """The results as a table of at most 80 columns."""
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
        lines += ["", f"{metric:<22}{'value':>12}{'± 95 %':>12}  over"]
        for name, figure in figures.items():
            if "value" in figure:
                lines.append(f"  {name:<20}" + _format_figure(figure))
    return "\n".join(lines)


def format_name(results: Mapping[str, Any]) -> str:
    """The architecture, and what says how sparse its codes are."""
    settings = (f"{name} {value:g}" for name, value in results["sparsity"].items())
    return ", ".join((results["architecture"], *settings))


def format_value(value: float) -> str:
    """Whole numbers as they are; others to four places, fewer when they are large."""
    if value == int(value):
        return f"{int(value):,}"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"


def _format_figure(figure: dict[str, Any]) -> str:
    interval = "" if figure["ci95"] is None else format_value(figure["ci95"])
    over = f"{figure['samples']:,} {figure['unit']}"
    return f"{format_value(figure['value']):>12}{interval:>12}  {over}"


def _check_finite(metric: str, figures: dict[str, Any]) -> None:
    for name, value in _numbers(figures, metric):
        if not math.isfinite(value):
            raise ValueError(
                f"{name} = {value} is not finite: the SAE's weights or the store's "
                "rows hold values that are not finite, or do not vary"
            )


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{name}.{key}")
    elif isinstance(value, float):
        yield name, value
