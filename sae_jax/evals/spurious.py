"""Spurious features: can latents be taken out of a probe that learned the wrong thing?

Of a pair of concepts, one wanted and one spurious, a biased probe for the wanted one is
fit on train rows that have both or neither, a fair one on rows of all four kinds. The n
latents that give most of the spurious concept to the biased probe are taken out of the
held-out rows, of all four kinds alike, and the biased probe tells the wanted one again:

    spurious_removed_n = sum over pairs of (accuracy without them - biased accuracy)
                         / sum over pairs of (fair accuracy - biased accuracy)

for n = 1, 5, 20: 1 where the harm is undone, 0 where nothing is gained, below 0 where
it is made worse. What a latent gives is its mean share in the biased probe's logit on
train rows with the spurious concept less that on rows without; it is taken out by
setting it to its mean over the train rows. Beside it the same of residual channels.
Where the fair probes are no better in all, nothing can be removed and the figures are
left out; where the interval of spurious_gap comes near 0 they say little. Intervals are
over pairs.

Source: SAEBench (Karvonen et al. 2025, arXiv:2503.09532), spurious correlation removal,
after Marks et al. 2024 (arXiv:2403.19647).
"""

import dataclasses
from typing import Any

import numpy as np

from sae_jax.evals.concepts import (
    NS,
    Concept,
    Floats,
    choose_channels,
    choose_given,
    find_channel_shares,
    find_share_means,
    find_shares,
    fit_probe,
    make_concepts,
    measure_accuracy,
)
from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import Context
from sae_jax.evals.figures import average_figure, make_table, ratio_figure
from sae_jax.evals.task_rows import TaskRows, measure_pair_rows
from sae_jax.progress import Progress

READS = ("tasks", "task_rows")
MEANINGS = {
    "spurious_fair_accuracy": "of a probe that the spurious concept did not mislead",
    "spurious_biased_accuracy": "of a probe that it did",
    "spurious_gap": "the first less the second: the harm",
    **{
        f"spurious_removed_{n}": f"of the harm, what taking out {n} latent(s) undoes"
        for n in NS
    },
    **{
        f"spurious_removed_channels_{n}": f"what taking out {n} channel(s) undoes"
        for n in NS
    },
}


def compute(context: Context, config: EvaluateConfig) -> dict[str, Any]:
    """The figures above and a table of pairs; none where the tasks have no pairs."""
    pairs = measure_pair_rows(context, config)
    if not pairs:
        return {}
    by_pair: list[dict[str, float]] = []
    quiet = dataclasses.replace(context, progress=False)
    shown = Progress(len(pairs), "pairs", "spurious", is_shown=context.progress)
    with shown as progress:
        for pair in pairs:
            by_pair.append(_measure_pair(quiet, pair))
            progress.update(len(by_pair))
    figures = {
        f"spurious_{name}_accuracy": average_figure(
            [of[name] for of in by_pair], "pairs"
        )
        for name in ("fair", "biased")
    }
    gap_p = np.array([of["fair"] - of["biased"] for of in by_pair])
    figures["spurious_gap"] = average_figure(gap_p, "pairs")
    if gap_p.sum() > 0:
        for after in list(by_pair[0])[2:]:
            gain_p = np.array([of[after] - of["biased"] for of in by_pair])
            figures[f"spurious_removed_{after}"] = ratio_figure(
                gain_p, gap_p, len(pairs), "pairs"
            )
    rows: list[list[str | float]] = [
        [pair.name, *of.values()] for pair, of in zip(pairs, by_pair)
    ]
    columns = ["wanted, spurious", *by_pair[0]]
    return {**figures, "spurious_pairs": make_table(columns, rows)}


def _measure_pair(context: Context, pair: TaskRows) -> dict[str, float]:
    """Accuracies: fair, biased, and without latents or channels, by how many."""
    [fair] = make_concepts(context, [pair])
    assert pair.spurious_n is not None
    is_train_n = ~pair.heldout_n
    agree_n = (pair.labels_n == pair.spurious_n)[is_train_n]
    slope_d, intercept = fit_probe(
        fair.train.acts_nd[agree_n], fair.train.labels_n[agree_n], len(agree_n)
    )
    biased = dataclasses.replace(fair, slope_d=slope_d, intercept=intercept)
    # Labelled by the spurious concept: what tells it is to be found.
    train = dataclasses.replace(fair.train, labels_n=pair.spurious_n[is_train_n])
    accuracies = {"fair": _tell(fair), "biased": _tell(biased)}
    share_nk = find_shares(context, train, slope_d)
    latents = choose_given(train, share_nk, max(NS))
    means_m = find_share_means(train, share_nk, latents)
    taken_nk = find_shares(context, biased.heldout, slope_d)
    for n in NS:
        is_out_nk = np.isin(biased.heldout.indices_nk, latents[:n])
        taken_n = np.sum(taken_nk, axis=1, where=is_out_nk)
        accuracies[str(n)] = _tell(biased, taken_n - means_m[:n].sum())
    by_spurious = dataclasses.replace(biased, train=train)
    channels = choose_channels(by_spurious, max(NS))
    share_nd = find_channel_shares(biased)
    for n in NS:
        taken_n = share_nd[:, channels[:n]].sum(axis=1)
        accuracies[f"channels_{n}"] = _tell(biased, taken_n)
    return accuracies


def _tell(concept: Concept, taken_n: Floats | float = 0.0) -> float:
    """The accuracy on held-out rows with so much taken out of their logits."""
    side = concept.heldout
    return measure_accuracy(concept.logits(side.acts_nd) - taken_n, side.labels_n)
