"""How well patterns of tokens explain latents: do these fire where the patterns are?

Held-out contexts are split in two halves in store order, so that all documents but one
are on one side. On the first half latents are explained by Neuron2Graph
(`sae_jax.evals.n2g`): `config.explained_latents` of those that fire there, drawn by the
seed, each from up to 16 tokens on which it fires, evenly spaced by rank from the
weakest activation to the strongest. On every row of the second half, that is on its
token, an explanation predicts whether its latent fires:

    precision = hits / predicted                mean over latents ever predicted
    recall    = hits / fired                    mean over latents that fire there
    f1        = 2 hits / (predicted + fired)    mean over latents with either

and `_pooled` is the same of sums over latents. Tokens on which a latent fires and does
not are in their natural proportion, so no sampling flatters the precision. `unigram_`
figures are those of a simpler explanation: the latent fires on one token alone, the one
on which it fired most often in the first half.

Where all latents that fire in the first half are explained, what the explanations
predict takes the SAE's place in the subject (`sae_jax.evals.simulation`).

Source: Gao et al. 2024 (arXiv:2406.04093), section 4.3. Their recall is over 16
contexts in which a latent fires, this one over all tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sae_jax.evals import simulation
from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import Context, choose_row_sequences
from sae_jax.evals.figures import (
    Array,
    Figure,
    average_figure,
    make_figure,
    make_histogram,
    make_table,
    ratio_figure,
)
from sae_jax.evals.firings import Firings, count_firings, find_firings, join_firings
from sae_jax.evals.n2g import Peaks, find_patterns
from sae_jax.evals.patterns import ANY, Pattern, Trie
from sae_jax.evals.positions import Positions, read_positions
from sae_jax.evals.simulation import Explained
from sae_jax.subjects import Subject

READS = ("explained_latents", "explanation_rows", "sequences")
MEANINGS = {
    "n2g_precision": "share of the tokens predicted that a latent does fire on",
    "n2g_recall": "share of the tokens a latent fires on that are predicted",
    "n2g_f1": "harmonic mean of the two",
    "n2g_precision_pooled": "precision of all predictions together",
    "n2g_recall_pooled": "recall of all firings together",
    "unigram_precision": "precision, if each latent fired on one token alone",
    "unigram_recall": "recall of that",
    "unigram_f1": "harmonic mean of the two",
    "unigram_precision_pooled": "precision of all those predictions together",
    "unigram_recall_pooled": "recall by them of all firings together",
    "n2g_living": "latents that fire in the contexts explained from",
    "n2g_explained": "share of the latents for which any pattern was found",
    "n2g_contexts_explained": "share of the contexts that gave a pattern",
    "n2g_pattern_length": "tokens of a pattern, those that may be any included",
    "n2g_any_tokens": "share of a pattern's tokens that may be any token",
    "n2g_anchored": "share of patterns that must begin where a context begins",
    **simulation.MEANINGS,
}

_CONTEXTS = 16  # a latent is explained from at most
_BINS = 20
_LATENTS_SHOWN = 20
_PATTERNS_SHOWN = 4
_VISIBLE = str.maketrans({"\n": "↵", "\t": "⇥"})

Ints = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Tokens of each latent: predicted, fired on, and both."""

    predicted_n: Array
    fired_n: Array
    hits_n: Array


def compute(context: Context, config: EvaluateConfig) -> dict[str, Any]:
    """The figures above, and some latents, drawn by the seed, with their patterns."""
    half, other = _split(context, config.explanation_rows)
    counts_l = count_firings(context, half, config.batch_rows, "explanations")
    drawn = np.random.default_rng(context.seed).permutation(np.flatnonzero(counts_l))
    living = make_figure(len(drawn), None, context.sae.n_latents, "latents")
    if not len(drawn):
        return {"n2g_living": living}
    latents_n = drawn[: config.explained_latents]
    known, tested = (
        find_firings(context, sequences, latents_n, config.batch_rows, "explanations")
        for sequences in (half, other)
    )
    from_half, from_other = (read_positions(context.store, s) for s in (half, other))
    peaks = _choose_peaks(known, latents_n, context.store.context_length)
    patterns = _group(find_patterns(context, from_half, peaks), peaks, latents_n)
    tries = [Trie(of_latent) for of_latent in patterns]
    simulated = _predict(tries, from_other)
    n2g = _score(simulated, tested, from_other)
    unigrams = _predict_unigrams(known, from_half, from_other)
    unigram = _score(unigrams, tested, from_other)
    measured: dict[str, Any] = {
        **_describe_scores("n2g", n2g),
        **_describe_scores("unigram", unigram),
        "n2g_living": living,
        **_describe_patterns(patterns, peaks, latents_n),
        "n2g_f1_of_latents": _draw_f1(n2g),
        "explained_latents": _tabulate(context.subject, latents_n, patterns, n2g),
    }
    if len(latents_n) == len(drawn):
        predicted = _predict(tries, from_half).at(from_half.is_row_st.ravel())
        explained = Explained(latents_n, half, other, known, predicted, simulated)
        measured |= simulation.compute(context, config, explained)
    return measured


def _split(context: Context, rows: int) -> tuple[Ints, Ints]:
    """The contexts to explain from, and those to test on."""
    sequences = choose_row_sequences(context, rows)
    if len(sequences) < 2:
        raise ValueError(
            f"{context.store.path}: explanations have {len(sequences)} held-out "
            "context, and want 2, one to explain from and one to test on: harvest "
            "more documents, or raise explanation_rows"
        )
    middle = len(sequences) // 2
    return sequences[:middle], sequences[middle:]


def _choose_peaks(known: Firings, latents_n: Ints, n_positions: int) -> Peaks:
    """Of each latent's firings, weakest to strongest, 16 evenly spaced by rank."""
    parts = []
    for index, latent in enumerate(latents_n):
        rows, values = known.of(index)
        rising = np.argsort(values, kind="stable")
        n = min(_CONTEXTS, len(rising))
        chosen = rising[np.round(np.linspace(0, len(rising) - 1, n)).astype(int)]
        parts.append((np.full(n, latent), rows[chosen], values[chosen]))
    latents, rows, values = map(np.concatenate, zip(*parts, strict=True))
    return Peaks(latents, rows // n_positions, rows % n_positions, values)


def _group(
    found: Sequence[Pattern | None], peaks: Peaks, latents_n: Ints
) -> list[list[Pattern]]:
    """The patterns of each latent."""
    of_latent: dict[int, list[Pattern]] = {int(latent): [] for latent in latents_n}
    for latent, pattern in zip(peaks.latents_n.tolist(), found, strict=True):
        if pattern is not None:
            of_latent[latent].append(pattern)
    return list(of_latent.values())


def _predict(tries: Sequence[Trie], positions: Positions) -> Firings:
    """What explanations predict in contexts, whether or not there is a row."""

    def predict(trie: Trie) -> Any:
        values_r = trie.predict(positions.tokens_st).reshape(-1)
        rows = np.flatnonzero(values_r)
        return rows, values_r[rows]

    return join_firings(map(predict, tries))


def _predict_unigrams(
    known: Firings, half: Positions, other: Positions
) -> Firings:
    """Every place of the token on which each latent fired most often."""
    tokens_r, others_r = half.tokens_st.reshape(-1), other.tokens_st.reshape(-1)

    def predict(index: int) -> Any:
        tokens, counts = np.unique(tokens_r[known.of(index)[0]], return_counts=True)
        rows = np.flatnonzero(others_r == tokens[np.argmax(counts)])
        return rows, np.ones(len(rows), np.float32)

    return join_firings(map(predict, range(len(known.counts_n))))


def _score(predicted: Firings, fired: Firings, positions: Positions) -> Scores:
    """What is predicted where there is no row is neither right nor wrong."""
    predicted = predicted.at(positions.is_row_st.ravel())
    hits = [
        len(np.intersect1d(predicted.of(i)[0], fired.of(i)[0], assume_unique=True))
        for i in range(len(fired.counts_n))
    ]
    return Scores(
        *(
            np.asarray(counts, np.float64)
            for counts in (predicted.counts_n, fired.counts_n, hits)
        )
    )


def _describe_scores(name: str, scores: Scores) -> dict[str, Figure]:
    """Figures of what there is a mean of."""
    either_n = (scores.predicted_n + scores.fired_n) / 2
    precision = ("precision", scores.predicted_n, "latents predicted", "predictions")
    recall = ("recall", scores.fired_n, "latents firing", "firings")
    figures = {}
    f1 = ("f1", either_n, "latents", "")
    for figure, total_n, unit, _ in (precision, recall, f1):
        if total_n.any():
            values_n = _divide(scores.hits_n, total_n)
            figures[f"{name}_{figure}"] = average_figure(values_n, unit)
    for figure, total_n, _, unit in (precision, recall):
        if total_n.any():
            figures[f"{name}_{figure}_pooled"] = ratio_figure(
                scores.hits_n, total_n, int(total_n.sum()), unit
            )
    return figures


def _divide(hits_n: Array, total_n: Array) -> Array:
    """Of the latents with a total."""
    return hits_n[total_n > 0] / total_n[total_n > 0]


def _describe_patterns(
    patterns: Sequence[Sequence[Pattern]], peaks: Peaks, latents_n: Ints
) -> dict[str, Figure]:
    def total(of_pattern: Callable[[Pattern], int]) -> Array:
        return np.array([sum(map(of_pattern, own)) for own in patterns], np.float64)

    patterns_n = total(lambda pattern: 1)
    tokens_n = total(lambda pattern: len(pattern.tokens))
    any_n = total(lambda pattern: pattern.tokens.count(ANY))
    anchored_n = total(lambda pattern: pattern.is_anchored)
    peaks_n = np.bincount(peaks.latents_n)[latents_n].astype(np.float64)
    figures = {"n2g_explained": average_figure(patterns_n > 0, "latents")}
    for name, part_n, whole_n, unit in (
        ("contexts_explained", patterns_n, peaks_n, "contexts"),
        ("pattern_length", tokens_n, patterns_n, "patterns"),
        ("any_tokens", any_n, tokens_n, "tokens"),
        ("anchored", anchored_n, patterns_n, "patterns"),
    ):
        if whole_n.any():
            figures[f"n2g_{name}"] = ratio_figure(
                part_n, whole_n, int(whole_n.sum()), unit
            )
    return figures


def _draw_f1(scores: Scores) -> Figure:
    f1_n = _divide(scores.hits_n, (scores.predicted_n + scores.fired_n) / 2)
    counts, edges = np.histogram(f1_n, _BINS, (0, 1))
    return make_histogram(edges, counts, "f1", "latents")


def _tabulate(
    subject: Subject,
    latents_n: Ints,
    patterns: Sequence[Sequence[Pattern]],
    scores: Scores,
) -> Figure:
    """The latents drawn first: what is shown is typical, not the best."""
    rows = []
    for index, latent in enumerate(latents_n[:_LATENTS_SHOWN].tolist()):
        predicted, fired, hits = (
            int(counts_n[index])
            for counts_n in (scores.predicted_n, scores.fired_n, scores.hits_n)
        )
        precision = round(hits / predicted, 3) if predicted else ""
        recall = round(hits / fired, 3) if fired else ""
        text = _write_patterns(subject, patterns[index])
        rows.append((latent, fired, predicted, precision, recall, text))
    columns = ("latent", "fired", "predicted", "precision", "recall", "patterns")
    return make_table(columns, rows)


def _write_patterns(subject: Subject, patterns: Sequence[Pattern]) -> str:
    """As [*][ a][b], where [*] is any token; ^ is where a context begins."""
    texts = []
    for pattern in patterns:
        known = iter(subject.decode_tokens([t for t in pattern.tokens if t != ANY]))
        tokens = ("*" if token == ANY else next(known) for token in pattern.tokens)
        text = "".join(f"[{token}]" for token in tokens).translate(_VISIBLE)
        texts.append("^" * pattern.is_anchored + text)
    # Of the same text once; the strongest come last.
    distinct = list(dict.fromkeys(reversed(texts)))
    more = len(distinct) - _PATTERNS_SHOWN
    shown = distinct[:_PATTERNS_SHOWN] + [f"and {more} more"] * (more > 0)
    return "  ".join(shown)
