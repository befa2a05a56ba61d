"""Sparse probing: how well the few latents that differ most tell a task.

    difference_l = mean value of latent l on positives - on negatives, of train rows
    accuracy_k   = share of held-out rows that a logistic probe of the k latents with
                   the largest |difference| tells right, mean over tasks

for k = 1, 2, 5; beside it the same of the k channels of the row whose means differ
most, for their deviation, and of a probe of the whole row. Labels are balanced, so
chance is 0.5. Intervals are over tasks.

Source: SAEBench (Karvonen et al. 2025, arXiv:2503.09532), sparse probing; Gurnee et al.
2023 (arXiv:2305.01610).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_jax.evals.concepts import (
    Concept,
    Floats,
    Side,
    find_mean_differences,
    find_values,
    fit_probe,
    measure_accuracy,
    measure_concepts,
)
from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import Context
from sae_jax.evals.figures import average_figure, make_table

KS = (1, 2, 5)
_RIDGE = 1e-3

READS = ("tasks", "task_rows")
MEANINGS = {
    **{
        f"sparse_accuracy_{k}": f"held-out rows told right by a probe of {k} latent(s)"
        for k in KS
    },
    **{
        f"sparse_accuracy_channels_{k}": f"the same by a probe of {k} channel(s)"
        for k in KS
    },
    "full_accuracy": "the same by a probe of the whole row",
}


def compute(context: Context, config: EvaluateConfig) -> dict[str, Any]:
    """The figures above, and a table of tasks."""
    concepts = measure_concepts(context, config)
    n_rows = max(len(concept.train.labels_n) for concept in concepts)
    accuracies: dict[str, list[float]] = {name: [] for name in MEANINGS}
    rows: list[list[str | float]] = []
    for concept in concepts:
        latents = choose_latents(concept.train, max(KS))
        by_channel = _choose_channels(concept.train, max(KS))
        for k in KS:
            sides = [find_values(s, latents[:k]) for s in _sides(concept)]
            accuracy = _tell(concept, sides, n_rows)
            accuracies[f"sparse_accuracy_{k}"].append(accuracy)
            sides = [side.acts_nd[:, by_channel[:k]] for side in _sides(concept)]
            accuracy = _tell(concept, sides, n_rows)
            accuracies[f"sparse_accuracy_channels_{k}"].append(accuracy)
        heldout = concept.heldout
        full = measure_accuracy(concept.logits(heldout.acts_nd), heldout.labels_n)
        accuracies["full_accuracy"].append(full)
        told = [of[-1] for of in accuracies.values()]
        rows.append([concept.name, " ".join(map(str, latents)), *told])
    figures = {name: average_figure(of, "tasks") for name, of in accuracies.items()}
    return {**figures, "sparse_probes": make_table(["task", "latents", *figures], rows)}


def choose_latents(side: Side, n: int) -> NDArray[np.int64]:
    """The n latents with the largest mean difference; all that fire, if fewer."""
    latents, difference_l = find_mean_differences(side, side.values_nk)
    return latents[np.argsort(-np.abs(difference_l), kind="stable")[:n]]


def _choose_channels(side: Side, n: int) -> NDArray[np.int64]:
    positive_d = side.acts_nd[side.labels_n].mean(axis=0)
    difference_d = positive_d - side.acts_nd[~side.labels_n].mean(axis=0)
    deviation_d = np.maximum(side.acts_nd.std(axis=0), 1e-12)
    return np.argsort(-np.abs(difference_d / deviation_d), kind="stable")[:n]


def _sides(concept: Concept) -> tuple[Side, Side]:
    return concept.train, concept.heldout


def _tell(concept: Concept, sides: Sequence[Floats], n_rows: int) -> float:
    """The accuracy on held-out features of the probe of train features [N, F]."""
    train_nf, heldout_nf = sides
    slope_f, intercept = fit_probe(train_nf, concept.train.labels_n, n_rows, _RIDGE)
    logits_n = heldout_nf @ slope_f + np.float32(intercept)
    return measure_accuracy(logits_n, concept.heldout.labels_n)
