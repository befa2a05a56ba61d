"""Targeted perturbation: does taking out a concept's latents leave others alone?

For each pair of tasks i and j, the n latents that give most to the probe of i are taken
out of the rows of j, and the probe of j tells its held-out rows again:

    drop_ij         = accuracy of probe j before - after
    targeted_drop   = mean over i of drop_ii
    untargeted_drop = mean over i and j ≠ i of drop_ij
    targeting       = targeted_drop - untargeted_drop

for n = 1, 5, 20. What latent l gives is its mean share in the logit of i on positives
less that on negatives, of train rows; it is taken out by setting it to its mean over
the train rows of j (`sae_jax.evals.concepts`). Beside it the same of residual channels.
Intervals are over tasks i.

Source: SAEBench (Karvonen et al. 2025, arXiv:2503.09532), targeted probe perturbation,
there over the classes of one dataset.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_jax.evals.concepts import (
    NS,
    Concept,
    Floats,
    choose_channels,
    choose_given,
    find_channel_shares,
    find_share_means,
    find_shares,
    measure_accuracy,
    measure_concepts,
)
from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import Context
from sae_jax.evals.figures import Figure, average_figure

_DROPS = {
    "targeted_drop": "accuracy that a task loses with its {n} {what} taken out",
    "untargeted_drop": "accuracy that it loses with those of another task taken out",
    "targeting": "the first less the second: 0 where nothing is apart",
}
_KINDS = {"": "latent(s)", "_channels": "channel(s)"}
READS = ("tasks", "task_rows")
MEANINGS = {
    f"{name}{kind}_{n}": meaning.format(n=n, what=what)
    for kind, what in _KINDS.items()
    for n in NS
    for name, meaning in _DROPS.items()
}


def compute(context: Context, config: EvaluateConfig) -> dict[str, Any]:
    """The figures above; none for a single task."""
    concepts = measure_concepts(context, config)
    if len(concepts) < 2:
        return {}
    drops = {
        "": find_latent_drops(context, concepts),
        "_channels": find_channel_drops(concepts),
    }
    figures: dict[str, Figure] = {}
    for kind, drop_nij in drops.items():
        for n, drop_ij in zip(NS, drop_nij, strict=True):
            own_i = np.diagonal(drop_ij)
            others_i = (drop_ij.sum(axis=1) - own_i) / (len(concepts) - 1)
            values = (own_i, others_i, own_i - others_i)
            for name, of_i in zip(_DROPS, values, strict=True):
                figures[f"{name}{kind}_{n}"] = average_figure(of_i, "tasks")
    return figures


def find_latent_drops(
    context: Context, concepts: Sequence[Concept]
) -> NDArray[np.float64]:
    """drop_ij for each of NS, where latents are taken out."""
    chosen = [choose_latents(context, concept) for concept in concepts]
    drops = []
    for concept in concepts:
        train_nk, share_nk = (
            find_shares(context, side, concept.slope_d)
            for side in (concept.train, concept.heldout)
        )
        means = [find_share_means(concept.train, train_nk, of) for of in chosen]
        owners_nk = concept.heldout.indices_nk
        drops.append(_find_drops(concept, chosen, owners_nk, share_nk, means))
    return np.stack(drops, axis=-1)


def find_channel_drops(concepts: Sequence[Concept]) -> NDArray[np.float64]:
    """drop_ij for each of NS, where channels are set to their mean."""
    chosen = [choose_channels(concept, max(NS)) for concept in concepts]
    means = [np.zeros(len(channels)) for channels in chosen]
    drops = []
    for concept in concepts:
        share_nd = find_channel_shares(concept)
        owners_1d = np.arange(len(concept.slope_d))[None]
        drops.append(_find_drops(concept, chosen, owners_1d, share_nd, means))
    return np.stack(drops, axis=-1)


def choose_latents(context: Context, concept: Concept) -> NDArray[np.int64]:
    """The latents that give most to the task's own probe, the most first."""
    share_nk = find_shares(context, concept.train, concept.slope_d)
    return choose_given(concept.train, share_nk, max(NS))


def _find_drops(
    concept: Concept,
    chosen: Sequence[NDArray[np.int64]],
    owners: NDArray[Any],
    shares: Floats,
    means: Sequence[NDArray[np.float64]],
) -> NDArray[np.float64]:
    """drop_ij of one task j for each of NS and each i.

    Args:
        concept: task j.
        chosen: for each i, what to take out.
        owners: whose each of the shares is.
        shares: of held-out rows in the logit.
        means: for each i, the mean share of each that is chosen.
    """
    drops_ni = np.zeros((len(NS), len(chosen)))
    labels_n = concept.heldout.labels_n
    logits_n = concept.logits(concept.heldout.acts_nd)
    before = measure_accuracy(logits_n, labels_n)
    for i, (numbers, means_m) in enumerate(zip(chosen, means, strict=True)):
        for at, n in enumerate(NS):
            taken_n = np.sum(shares, axis=1, where=np.isin(owners, numbers[:n]))
            after_n = logits_n - taken_n + means_m[:n].sum()
            drops_ni[at, i] = before - measure_accuracy(after_n, labels_n)
    return drops_ni
