"""Evaluation on held-out text: one file a metric, each with `compute(context, config)`.

A metric is a dict of figures, `{"value", "ci95", "samples", "unit"}`: the value, the
half-width of its 95 % interval (`sae_jax.evals.figures`) and what it was taken over;
beside them are plots and tables. Its MEANINGS say what each figure is.
"""

import dataclasses
import hashlib
import json
import math
import platform
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
from sae_jax.evals.family import read_family
from sae_jax.evals.table import format_name, format_table, format_value
from sae_jax.files import write_whole
from sae_jax.run import CONFIG_FILE, locate
from sae_jax.store import Store
from sae_jax.subjects import Subject
from sae_jax.tasks import read_examples

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
# Below this, a latent that did not fire says little.
ROWS_WANTED = 200_000


def evaluate(
    sae: Sae,
    subject: Subject,
    store: Store,
    metrics: Sequence[str] = SUITES["core"],
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
        metrics: names of METRICS; `SUITES` has the usual choices.
        mesh: where given, the mesh that the SAE must be on.
        seed: draws all samples: the same seed, the same figures.
        config: how much to measure on.
        progress: whether to show progress lines.
        raw: the SAE with raw weights where `sae` has averaged ones, to compare.
        about: what else the results should say, such as the step.
        file: where the results are written each time that a metric is done. Metrics
            that it has from an evaluation that differs in nothing are taken over.

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
    context = open_context(sae, subject, store, seed, progress, raw)
    _check_files(context, config)
    results = _describe(context, config) | dict(about or {})
    done = _read_done(Path(file), results) if file else {}
    results["metrics"] = done
    for name in metrics:
        if name not in done:
            done[name] = METRICS[name].compute(context, config)
            _check_finite(name, done[name])
        results["metrics"] = {name: done[name] for name in METRICS if name in done}
        if file:
            write_whole(file, json.dumps(results, indent=2, allow_nan=False) + "\n")
    return results


def _check_files(context: Context, config: EvaluateConfig) -> None:
    """Reads every file that the config names, so that none is refused hours later."""
    if config.family:
        read_family(config.family)
    if config.tasks:
        read_examples(config.tasks)
    if config.directions:
        recovery.read_directions(config.directions, context.sae.d_model)
    if config.against:
        recovery.open_other(context, config.against)


def _describe(context: Context, config: EvaluateConfig) -> dict[str, Any]:
    """What the figures are of, and what they were taken on."""
    sae, subject, store = context.sae, context.subject, context.store
    n_contexts = len(choose_row_sequences(context, config.rows))
    return {
        "site": context.site,
        "architecture": sae.config.architecture,
        "sparsity": sparsity(sae.config),
        "n_latents": sae.n_latents,
        "d_model": sae.d_model,
        "store": str(store.path),
        "corpus": store.manifest.corpus,
        "subject": {"name": subject.name, "identity": subject.identity},
        "seed": context.seed,
        "settings": dataclasses.asdict(config),
        "files": _identify_files(config),
        "rows": n_contexts * store.context_length,
        "rows_wanted": ROWS_WANTED,
        "context_length": store.context_length,
    }


def _identify_files(config: EvaluateConfig) -> dict[str, str]:
    """A hash of each file that the config names; of a run, of its config."""
    paths = {
        field.name: Path(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.type is str and getattr(config, field.name)
    }
    if "against" in paths:
        workdir, step = locate(paths["against"])
        paths["against"] = workdir / CONFIG_FILE
    hashes = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for name, path in paths.items()
    }
    if "against" in paths:
        hashes["against"] += f" step {step}"
    # Generated tasks are made of this Python's standard library, by its own parser.
    return hashes if config.tasks else hashes | {"python": platform.python_version()}


def _read_done(file: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics in a file that says of itself what `results` says so far."""
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    metrics = earlier.pop("metrics", {}) if isinstance(earlier, dict) else {}
    return metrics if earlier == json.loads(json.dumps(results)) else {}


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
