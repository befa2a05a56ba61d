"""The trie against a walk token by token, and n-gram models against counting."""

import numpy as np
import oracle_n2g
import pytest

from sae_jax.evals.ngrams import predict_tokens
from sae_jax.evals.patterns import ANY, Pattern, Trie
from sae_jax.evals.positions import NO_TOKEN


@pytest.mark.parametrize("seed", range(8))
def test_a_trie_predicts_what_a_walk_does(seed):
    """On few tokens, so that paths are shared, cross and lead nowhere."""
    rng = np.random.default_rng(seed)
    patterns, slow = [], {}
    for index in range(rng.integers(1, 12)):
        tokens = tuple(rng.integers(ANY, 4, size=rng.integers(1, 5)).tolist())
        pattern = Pattern(tokens, bool(rng.integers(3) == 0), index + 1.0)
        patterns.append(pattern)
        named = [oracle_n2g.ANY if token == ANY else token for token in tokens]
        oracle_n2g.insert(slow, named, pattern.is_anchored, pattern.value)
    tokens_st = rng.integers(4, size=(30, 9)).astype(np.int32)
    want_st = oracle_n2g.predict(slow, tokens_st)
    assert Trie(patterns).predict(tokens_st).tolist() == want_st.tolist()
    assert 0 < np.count_nonzero(want_st)


def test_what_a_trie_prefers():
    def predict(patterns, *tokens):
        trie = Trie([Pattern(*pattern) for pattern in patterns])
        return trie.predict(np.array([tokens], np.int32))[0].tolist()

    both = [((ANY, 2), False, 1.0), ((1, 2), False, 3.0)]
    assert predict(both, 2, 1, 2, 0, 2) == [0, 0, 3, 0, 1]
    # The way over the token itself is taken even where it leads nowhere.
    crossed = [((5, 1, 2), False, 3.0), ((ANY, ANY, 2), False, 1.0)]
    assert predict(crossed, 0, 1, 2) == [0, 0, 0]
    assert predict(crossed, 0, 0, 2) == [0, 0, 1]
    shorter = [((1, 2), False, 3.0), ((2,), False, 1.0)]
    assert predict(shorter, 1, 2) == [0, 1]
    assert predict([((1, 2), True, 3.0)], 1, 2, 1, 2) == [0, 3, 0, 0]
    assert predict([((ANY,), True, 3.0)], 7, 7) == [3, 0]
    assert predict([((2,), False, 1.0), ((2,), False, 4.0)], 2) == [4]
    assert predict([], 1, 2) == [0, 0]


def test_ngram_models_are_those_of_counting():
    rng = np.random.default_rng(0)
    # The next token leans on the two before it.
    tokens = [0, 1]
    for _ in range(1500):
        likely = (tokens[-1] + tokens[-2]) % 6
        tokens.append(likely if rng.random() < 0.6 else int(rng.integers(6)))
    train_st = np.array(tokens[:1400], np.int32).reshape(-1, 20)
    tokens_st = np.array(tokens[1400:1500], np.int32).reshape(-1, 20)
    got = predict_tokens(train_st, tokens_st, 7, 3)
    want = oracle_n2g.ngram_log_p(train_st.tolist(), tokens_st.tolist(), 7, 3)
    for log_p, slow in zip(got, want, strict=True):
        np.testing.assert_allclose(log_p.ravel(), slow, rtol=1e-9)
    assert got[2].mean() > got[1].mean() + 0.2


def test_ngram_models_of_contexts_that_end_early():
    rng = np.random.default_rng(2)
    texts = []
    for n_contexts in (60, 20):
        tokens_st = rng.integers(4, size=(n_contexts, 9)).astype(np.int32)
        tokens_st[:, 2::3] = tokens_st[:, 1::3]
        tokens_st[np.arange(9) >= rng.integers(1, 10, size=(n_contexts, 1))] = NO_TOKEN
        texts.append(tokens_st)
    lists = [
        [[token for token in context if token != NO_TOKEN] for context in text.tolist()]
        for text in texts
    ]
    got = predict_tokens(*texts, 5, 3)
    want = oracle_n2g.ngram_log_p(*lists, 5, 3)
    is_text_st = texts[1][:, 1:] != NO_TOKEN
    for log_p, slow in zip(got, want, strict=True):
        assert np.isfinite(log_p).all()
        np.testing.assert_allclose(log_p[is_text_st], slow, rtol=1e-9)


def test_ngram_models_give_probabilities():
    """Over all tokens that may come next they sum to one, known or not."""
    rng = np.random.default_rng(1)
    train_st = rng.integers(4, size=(20, 10)).astype(np.int32)
    for before in ([0, 1, 2], [5, 5, 5]):
        tokens_st = np.array([[*before, token] for token in range(6)], np.int32)
        for log_p in predict_tokens(train_st, tokens_st, 6, 3):
            assert np.exp(log_p[:, -1]).sum() == pytest.approx(1)
