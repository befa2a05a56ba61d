"""n-gram models of a store's tokens: what is predicted without a language model.

    p_0(w)     = 1 / V
    p_n(w | h) = λ c(h w) / c(h) + (1 - λ) p_{n-1}(w | h')

w is the next token, h the n - 1 tokens before it in its context, h' the same without
the first, and c counts in train contexts. λ depends on n and on c(h) alone, by powers
of two, and is found by expectation maximisation on train contexts that are not counted;
where h was never seen, or the context has no n - 1 tokens before w, λ is 0.

Source: Jelinek and Mercer 1980, "Interpolated estimation of Markov source parameters".
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sae_jax.evals.figures import Array
from sae_jax.evals.positions import NO_TOKEN

_NO_KEY = -1  # of a run with padding; so is that of what comes before it
_UNCOUNTED = 10  # one in so many contexts, the last ones, is left for λ
_STEPS = 30

Tokens = NDArray[np.int32]


def predict_tokens(
    train_st: Tokens, tokens_st: Tokens, vocab_size: int, longest: int
) -> list[Array]:
    """log p_n of every token after the first, [S, T - 1], for n = 1 to `longest`.

    Where a context has no token (NO_TOKEN) nothing is counted, and log p says nothing.
    """
    n_counted = len(train_st) - max(1, len(train_st) // _UNCOUNTED)
    counted_st, uncounted_st = train_st[:n_counted], train_st[n_counted:]
    known, wanted = (
        np.full((len(texts), texts.shape[1] - 1), 1 / vocab_size)
        for texts in (uncounted_st, tokens_st)
    )
    is_text_st = (uncounted_st[:, 1:] != NO_TOKEN) & (uncounted_st[:, :-1] != NO_TOKEN)
    log_p = []
    for n in range(1, longest + 1):
        counts = _count(counted_st, n, vocab_size)
        shares_st, before_st = counts.look_up(uncounted_st)
        lambda_c = _fit(*(part[is_text_st] for part in (known, shares_st, before_st)))
        known = _mix(lambda_c, known, shares_st, before_st)
        wanted = _mix(lambda_c, wanted, *counts.look_up(tokens_st))
        log_p.append(np.log(wanted))
    return log_p


@dataclass(frozen=True, eq=False)
class _Counts:
    """How often n tokens, and the first n - 1 of them, follow one another."""

    n: int
    vocab_size: int
    grams: tuple[NDArray[np.int64], NDArray[np.int64]]  # keys, ascending, and counts
    before: tuple[NDArray[np.int64], NDArray[np.int64]]

    def look_up(self, tokens_st: Tokens) -> tuple[Array, NDArray[np.int64]]:
        """c(h w) / c(h), and c(h), of every token after the first."""
        keys_st = _make_keys(tokens_st, self.n, self.vocab_size)
        before_st = _find(self.before, keys_st // self.vocab_size)
        shares_st = _find(self.grams, keys_st) / np.maximum(before_st, 1)
        n_predicted = tokens_st.shape[1] - 1
        missing = max(0, n_predicted - keys_st.shape[1])
        return tuple(  # type: ignore[return-value]
            np.pad(values_st[:, -n_predicted:], ((0, 0), (missing, 0)))
            for values_st in (shares_st, before_st)
        )


def _count(tokens_st: Tokens, n: int, vocab_size: int) -> _Counts:
    keys_st = _make_keys(tokens_st, n, vocab_size)
    keys = keys_st[keys_st != _NO_KEY]
    grams = np.unique(keys, return_counts=True)
    before = np.unique(keys // vocab_size, return_counts=True)
    return _Counts(n, vocab_size, grams, before)


def _make_keys(tokens_st: Tokens, n: int, vocab_size: int) -> NDArray[np.int64]:
    """One number for each run of n tokens, [S, T - n + 1]."""
    n_runs = tokens_st.shape[1] - n + 1
    keys_st = np.zeros((len(tokens_st), n_runs), np.int64)
    is_text_st = np.ones(keys_st.shape, bool)
    for i in range(n):
        token_st = tokens_st[:, i : i + n_runs]
        keys_st = keys_st * vocab_size + token_st
        is_text_st &= token_st != NO_TOKEN
    return np.where(is_text_st, keys_st, _NO_KEY)


def _find(
    counts: tuple[NDArray[np.int64], NDArray[np.int64]], keys_st: NDArray[np.int64]
) -> NDArray[np.int64]:
    known, of_known = counts
    if not known.size:
        return np.zeros_like(keys_st)
    found_st = np.minimum(np.searchsorted(known, keys_st), known.size - 1)
    return np.where(known[found_st] == keys_st, of_known[found_st], 0)


def _fit(lower_n: Array, shares_n: Array, before_n: NDArray[np.int64]) -> Array:
    """The λ of each class of c(h) under which these tokens are likeliest."""
    classes_n = _classify(before_n)
    tokens_c = np.bincount(classes_n, minlength=64)
    lambda_c = np.full(64, 0.5)
    for _ in range(_STEPS):
        from_counts_n = lambda_c[classes_n] * shares_n
        total_n = from_counts_n + (1 - lambda_c[classes_n]) * lower_n
        sums_c = np.bincount(classes_n, from_counts_n / total_n, 64)
        lambda_c = sums_c / np.maximum(tokens_c, 1)
    return lambda_c


def _mix(
    lambda_c: Array, lower_st: Array, shares_st: Array, before_st: NDArray[np.int64]
) -> Array:
    lambda_st = np.where(before_st > 0, lambda_c[_classify(before_st)], 0)
    return lambda_st * shares_st + (1 - lambda_st) * lower_st


def _classify(before_st: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 for what was never seen, else one more than the whole part of log2."""
    return np.frexp(before_st)[1].astype(np.int64)
