"""Absorption: a concept that its latents miss, because others have taken it over.

The main latents of a task are those whose values differ most in favour of its
positives: as few of 1 to 5 as make a sparse probe to which one more adds less than 0.03
of accuracy, all on train rows. On a held-out positive that the probe p of whole rows
tells right, with g_l the share of latent l in its logit,

    main      = sum of g_l over the main latents
    absorbers = the other latents with g_l > 0 whose decoder row has a cosine with p of
                0.1 at least, at most the 5 largest
    absorbed  = sum of g_l over absorbers / (that + main, or 0 where it is below)

is 0 where the main latents have it all and 1 where none of them fires. Then

    absorption_fraction  mean of `absorbed` over such positives on which main is below
                         its mean over train positives, 0 on the others
    absorption_full      share of such positives on which no main latent fires, and the
                         largest absorber gives 0.4 or more of what all latents do

both means over tasks. Source: SAEBench (Karvonen et al. 2025, arXiv:2503.09532) and
Chanin et al. 2024 (arXiv:2409.14507), there for first letters of words; thresholds on
cosines and on accuracy gains here are ours.
"""

from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_jax.evals.concepts import (
    Concept,
    Floats,
    Side,
    choose_given,
    find_cosines,
    find_shares,
    find_values,
    fit_probe,
    measure_accuracy,
    measure_concepts,
)
from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import Context
from sae_jax.evals.figures import average_figure, make_table

MOST_MAIN, MOST_ABSORBERS = 5, 5
LEAST_GAIN, LEAST_COSINE, LEAST_SHARE = 0.03, 0.1, 0.4
_RIDGE = 1e-3

READS = ("tasks", "task_rows")
MEANINGS = {
    "absorption_fraction": "share of a concept that other latents than its own carry",
    "absorption_full": "positives where its own latents are silent and another speaks",
    "main_latents": "latents that a concept is split over",
}


def compute(context: Context, config: EvaluateConfig) -> dict[str, Any]:
    """The figures above, and a table of tasks."""
    concepts = measure_concepts(context, config)
    n_rows = max(len(concept.train.labels_n) for concept in concepts)
    rows: list[list[str | int | float]] = []
    measured: list[tuple[float, float, int]] = []
    for concept in concepts:
        main = choose_main(concept.train, n_rows)
        train_nk = find_shares(context, concept.train, concept.slope_d)
        is_main_nk = np.isin(concept.train.indices_nk, main)
        main_n = np.sum(train_nk, axis=1, where=is_main_nk)
        usual = float(main_n[concept.train.labels_n].mean())
        side = _keep(concept.heldout, _find_told(concept))
        if not len(side.labels_n):
            continue
        share_nk = find_shares(context, side, concept.slope_d)
        cosine_nk = find_cosines(context, side, concept.slope_d)
        absorbed_n, is_full_n = absorb(side, share_nk, cosine_nk, main, usual)
        means = float(absorbed_n.mean()), float(is_full_n.mean())
        measured.append((*means, len(main)))
        n_positives = len(side.labels_n)
        rows.append([concept.name, " ".join(map(str, main)), n_positives, *means])
    if not measured:
        return {}
    figures = {
        name: average_figure(of, "tasks")
        for name, of in zip(
            ("absorption_fraction", "absorption_full", "main_latents"), zip(*measured)
        )
    }
    columns = ["task", "main latents", "positives", "fraction", "full"]
    return {**figures, "absorption_by_task": make_table(columns, rows)}


def choose_main(side: Side, n_rows: int) -> NDArray[np.int64]:
    """The latents that a concept is split over, as the module says."""
    latents = choose_given(side, side.values_nk, MOST_MAIN)
    accuracies = []
    for n in range(1, len(latents) + 1):
        values_nf = find_values(side, latents[:n])
        slope_f, intercept = fit_probe(values_nf, side.labels_n, n_rows, _RIDGE)
        logits_n = values_nf @ slope_f + np.float32(intercept)
        accuracies.append(measure_accuracy(logits_n, side.labels_n))
        if n > 1 and accuracies[-1] - accuracies[-2] < LEAST_GAIN:
            return latents[: n - 1]
    return latents


def absorb(
    side: Side,
    share_nk: Floats,
    cosine_nk: Floats,
    main: NDArray[np.int64],
    usual: float,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """`absorbed` of each row, and whether it is absorbed in full.

    Args:
        side: the positives that are looked at.
        share_nk: of each slot in the logit.
        cosine_nk: of each slot's decoder row with the probe.
        main: the main latents.
        usual: the share of the main latents above which nothing is missing.
    """
    is_main_nk = np.isin(side.indices_nk, main)
    main_n = np.sum(share_nk, axis=1, where=is_main_nk, dtype=np.float64)
    may_absorb_nk = ~is_main_nk & (share_nk > 0) & (cosine_nk >= LEAST_COSINE)
    given_nk = np.where(may_absorb_nk, share_nk, 0).astype(np.float64)
    largest_nk = np.sort(given_nk, axis=1)[:, ::-1][:, :MOST_ABSORBERS]
    absorbers_n = largest_nk.sum(axis=1)
    whole_n = absorbers_n + np.maximum(main_n, 0)
    absorbed_n = np.where(
        (main_n < usual) & (whole_n > 0),
        absorbers_n / np.where(whole_n > 0, whole_n, 1),
        0,
    )
    is_silent_n = ~np.any(is_main_nk & (side.values_nk > 0), axis=1)
    all_n = np.sum(share_nk, axis=1, dtype=np.float64)
    is_large_n = largest_nk[:, 0] >= LEAST_SHARE * np.maximum(all_n, 0)
    return absorbed_n, is_silent_n & is_large_n & (largest_nk[:, 0] > 0)


def _find_told(concept: Concept) -> NDArray[np.bool_]:
    """Held-out positives that the probe of whole rows tells right."""
    side = concept.heldout
    return side.labels_n & (concept.logits(side.acts_nd) > 0)


def _keep(side: Side, chosen_n: NDArray[np.bool_]) -> Side:
    return Side(*(getattr(side, field.name)[chosen_n] for field in fields(side)))
