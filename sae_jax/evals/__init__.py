"""Evaluation on held-out text: one file a metric, each with `compute(context, config)`.

A metric is a dict of figures, `{"value", "ci95", "samples", "unit"}`: the value, the
half-width of its 95 % interval (`sae_jax.evals.figures`) and what it was taken over;
beside them are plots and tables. Its MEANINGS say what each figure is.
"""

import json
import math
import os
import platform
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from sae_jax.config import nearest_name, sparsity
from sae_jax.evals import (
    ablation,
    absorption,
    averaging,
    density,
    downstream,
    equivalent_compute,
    explanations,
    perturbation,
    probes,
    reconstruction,
    recovery,
    sparse_probing,
    spurious,
)
from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import Context, Sae, choose_row_sequences, open_context
from sae_jax.evals.identity import identify
from sae_jax.evals.inputs import check_inputs
from sae_jax.evals.positions import read_positions
from sae_jax.evals.table import format_name, format_table, format_value
from sae_jax.files import write_whole
from sae_jax.store import Store
from sae_jax.subjects import Subject

__all__ = [
    "MEANINGS",
    "METRICS",
    "SUITES",
    "Context",
    "EvaluateConfig",
    "evaluate",
    "format_name",
    "format_table",
    "format_value",
]

METRICS: dict[str, types.ModuleType] = {
    "reconstruction": reconstruction,
    "averaging": averaging,
    "density": density,
    "downstream": downstream,
    "equivalent_compute": equivalent_compute,
    "probes": probes,
    "explanations": explanations,
    "ablation": ablation,
    "recovery": recovery,
    "sparse_probing": sparse_probing,
    "absorption": absorption,
    "spurious": spurious,
    "perturbation": perturbation,
}
_CORE = ("reconstruction", "averaging", "density", "downstream")
_PAPER = (*_CORE, "equivalent_compute", "probes", "explanations", "ablation")
SUITES = {"core": _CORE, "paper": _PAPER, "all": tuple(METRICS)}
MEANINGS: dict[str, str] = {
    name: meaning
    for metric in METRICS.values()
    for name, meaning in metric.MEANINGS.items()
}
# How text lies in contexts, and what of it are no rows.
_LAYOUT = ("context_length", "packing", "bos", "excluded_ids")
# What of the results may differ where figures are the same.
_PASSING = ("store", "rows", "n_steps")
# Below this, a latent that did not fire says little.
ROWS_WANTED = 200_000


def evaluate(
    sae: Sae,
    subject: Subject,
    store: Store,
    metrics: str | Sequence[str] = "core",
    mesh: Mesh | None = None,
    seed: int = 0,
    config: EvaluateConfig | None = None,
    progress: bool = False,
    *,
    raw: Sae | None = None,
    about: Mapping[str, Any] | None = None,
    file: str | Path | None = None,
) -> dict[str, Any]:
    """The metrics of an SAE on the held-out rows of its store, ready for JSON.

    Args:
        sae: the SAE.
        subject: the language model its rows came from.
        store: the activation store, with held-out rows.
        metrics: a suite, or names of METRICS.
        mesh: where given, the mesh that the SAE must be on.
        seed: draws all samples: the same seed, the same figures.
        config: how much to measure on.
        progress: whether to show progress lines.
        raw: the SAE with raw weights where `sae` has averaged ones, to compare.
        about: what else the results should say, such as the step.
        file: where the results are written each time that a metric is done. Metrics
            that it has of the same SAE, by the same settings, are taken over; of
            another SAE or seed it is kept with the ending `.old`.

    Raises:
        ValueError: an unknown metric; SAE, subject, store and mesh that do not belong
            together; more asked for than there is; a figure that is not finite.
    """
    config = config or EvaluateConfig()
    metrics = SUITES.get(metrics, (metrics,)) if isinstance(metrics, str) else metrics
    for name in metrics:
        if name not in METRICS:
            hint = nearest_name(name, {**METRICS, **SUITES})
            raise ValueError(f"unknown metric {name!r}: {hint}")
    if mesh is not None and mesh != sae.mesh:
        raise ValueError(
            f"the SAE is on a mesh {dict(sae.mesh.shape)}, not {dict(mesh.shape)}: "
            "load it on the mesh that evaluates it"
        )
    context = open_context(sae, subject, store, seed, progress, raw)
    files = check_inputs(context, config, metrics)
    results = _describe(context, config) | dict(about or {})
    settings = {name: _list_settings(name, config, files) for name in METRICS}
    done = _take_over(Path(file), results, settings) if file else {}
    for name in metrics:
        if name in done:
            continue
        done[name] = METRICS[name].compute(context, config)
        _check_finite(name, done[name])
        if file:
            whole = _put_together(results, done, settings)
            write_whole(file, json.dumps(whole, indent=2, allow_nan=False) + "\n")
    return _put_together(results, done, settings)


def _describe(context: Context, config: EvaluateConfig) -> dict[str, Any]:
    """What the figures are of."""
    sae, subject, store = context.sae, context.subject, context.store
    sequences = choose_row_sequences(context, config.rows)
    identities = {"sae": identify(sae)}
    if context.raw is not None:
        identities["raw"] = identify(context.raw)
    return {
        "site": context.site,
        "architecture": sae.config.architecture,
        "sparsity": sparsity(sae.config),
        "n_latents": sae.n_latents,
        "d_model": sae.d_model,
        "identities": identities,
        "store": str(store.path),
        "corpus": store.manifest.corpus,
        "layout": {name: getattr(store.manifest, name) for name in _LAYOUT},
        "dtype": store.dtype,
        "subject": {"name": subject.name, "identity": subject.identity},
        "seed": context.seed,
        "rows": int(read_positions(store, sequences).is_row_st.sum()),
        "rows_wanted": ROWS_WANTED,
        "context_length": store.context_length,
    }


def _list_settings(
    metric: str, config: EvaluateConfig, files: Mapping[str, str]
) -> dict[str, Any]:
    """What a metric reads of the config, and a hash of every file that this names."""
    reads = METRICS[metric].READS
    settings = {name: getattr(config, name) for name in reads}
    if "tasks" in reads and not config.tasks:
        # Made of this Python's standard library, by its own parser.
        settings["python"] = platform.python_version()
    return settings | {f"{name}_hash": files[name] for name in reads if name in files}


def _take_over(
    file: Path, results: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The metrics that a file has of the same SAE, by the same settings."""
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        earlier = None
    wanted = json.loads(json.dumps({"results": results, "settings": settings}))
    if not isinstance(earlier, dict):
        differs = ["contents"]
    else:
        differs = [
            name
            for name, value in wanted["results"].items()
            if name not in _PASSING and earlier.get(name) != value
        ]
    if differs:
        old = file.with_name(file.name + ".old")
        os.replace(file, old)
        print(
            f"{file} was of another {', '.join(differs)}: kept as {old.name}",
            file=sys.stderr,
        )
        return {}
    measured_by = earlier.get("settings", {})
    return {
        name: figures
        for name, figures in earlier.get("metrics", {}).items()
        if measured_by.get(name) == wanted["settings"].get(name)
    }


def _put_together(
    results: Mapping[str, Any], done: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The results with what is done, in the order of METRICS."""
    names = [name for name in METRICS if name in done]
    return {
        **results,
        "settings": {name: settings[name] for name in names},
        "metrics": {name: done[name] for name in names},
    }


def _check_finite(metric: str, figures: Any) -> None:
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
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)
    elif isinstance(value, float):
        yield name, value
