"""Explanations against plain Python, planted features, meshes and refusals."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import numpy as np
import oracle
import oracle_n2g
import planted
import planted_patterns
import pytest
from planted import SITE, D, K, L, T
from planted_patterns import ALWAYS, FIRST, pair

from sae_jax.evals import explanations, n2g
from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import open_context
from sae_jax.evals.patterns import ANY
from sae_jax.evals.positions import Positions

LONGEST = 4  # tokens of a suffix, so that fewer programs are compiled
SMALL = EvaluateConfig(batch_rows=4 * T, batch_sequences=4)


@pytest.fixture(scope="module")
def subject():
    return planted_patterns.make_subject()


@pytest.fixture(scope="module")
def store(subject, tmp_path_factory):
    folder = tmp_path_factory.mktemp("patterns")
    return planted_patterns.write_store(folder / "store", subject)


def _measure(sae, subject, store, config=SMALL, seed=0):
    return explanations.compute(open_context(sae, subject, store, seed), config)


def _values(measured):
    return {name: part["value"] for name, part in measured.items() if "value" in part}


@pytest.mark.parametrize("kind", ["none", "center_unit_norm"])
@pytest.mark.parametrize("write", [planted.write_store, planted.write_holed_store])
def test_explanations_are_those_of_plain_python(tmp_path, kind, write, monkeypatch):
    """Rows that depend on all tokens before them, so that most patterns are wrong."""
    monkeypatch.setattr(n2g, "LONGEST", LONGEST)
    subject, params = planted.make_subject(), planted.random_params()
    store = write(tmp_path / "store", subject)
    measured = _measure(planted.make_sae(params, kind=kind), subject, store)
    want = _Slow(subject, params, store, kind).measure()
    got = _values(measured)
    assert got.keys() == want.keys() == explanations.MEANINGS.keys()
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=2e-5, abs=1e-7), name
    assert 0.05 < want["n2g_f1"] < 0.9 and 0 < want["n2g_anchored"] < 1
    assert 0 < want["n2g_any_tokens"] and want["n2g_contexts_explained"] < 1


def test_true_features_are_explained_in_full(subject, store):
    sae = planted_patterns.make_sae(planted_patterns.true_params())
    measured = _measure(sae, subject, store)
    values = _values(measured)
    assert values["n2g_living"] == L
    for name in ("precision", "recall", "f1", "precision_pooled", "recall_pooled"):
        assert values[f"n2g_{name}"] == 1, name
    assert values["n2g_explained"] == values["n2g_contexts_explained"] == 1
    assert measured["n2g_f1_of_latents"]["counts"][-1] == L
    # A token alone says nothing of the one before it.
    assert values["unigram_recall"] > 0.9 and values["unigram_precision"] < 0.5
    # The simulated latents are the latents.
    for name in ("simulated", "patterns_alone"):
        assert values[f"tested_ce_{name}"] == pytest.approx(values["tested_ce_sae"])


def test_what_is_found_of_true_features(subject, store):
    sae = planted_patterns.make_sae(planted_patterns.true_params())
    context = open_context(sae, subject, store)
    # 2 is the padding token.
    tokens_st = np.array([[3, 2, 0, 4, 1, 2, 2] + [0] * (T - 7)], np.int32)
    asked = {
        (3, 0): ((3,), False),  # of a token
        (2, 1): ((2,), False),
        (pair(0, 4), 3): ((0, 4), False),  # of two in order
        (pair(2, 0), 2): ((2, 0), False),
        (pair(2, 2), 6): ((2, 2), False),
        (FIRST, 0): ((ANY,), True),
        (ALWAYS, 5): ((ANY,), False),
        (pair(1, 1), 6): None,  # does not fire there
    }
    latents, positions = np.array(list(asked)).T
    peaks = SimpleNamespace(
        latents_n=latents,
        sequences_n=np.zeros_like(latents),
        positions_n=positions,
        acts_n=np.ones(len(latents), np.float32),
    )
    every_st = np.ones(tokens_st.shape, bool)
    positions = Positions(tokens_st, every_st, every_st)
    found = n2g.find_patterns(context, positions, peaks)
    got = [pattern and (pattern.tokens, pattern.is_anchored) for pattern in found]
    assert got == list(asked.values())
    assert all(pattern is None or pattern.value == 1 for pattern in found)


def test_scores_fall_to_chance_as_rows_are_dealt_at_random(subject, store):
    """Rows changed places: latents fire anywhere, the patterns of their tokens stay."""
    sae = planted_patterns.make_sae(planted_patterns.true_params())
    f1 = {}
    for share in (0, 0.3, 1):
        values = _values(_measure(sae, subject, _Dealt(store, share)))
        f1[share] = values["n2g_f1"]
    assert f1[0] == 1 and 0.4 < f1[0.3] < 0.9
    # One row in five has a token, one in 25 a pair, and most latents are of pairs.
    assert values["n2g_precision"] < 0.2 and f1[1] < 0.2


def test_a_sample_of_latents(subject, store):
    sae = planted_patterns.make_sae(planted_patterns.true_params())
    config = dataclasses.replace(SMALL, explained_latents=5)
    measured = _measure(sae, subject, store, config)
    shown = {row[0] for row in measured["explained_latents"]["rows"]}
    assert len(shown) == 5 == measured["n2g_explained"]["samples"]
    assert _measure(sae, subject, store, config) == measured
    other = _measure(sae, subject, store, config, seed=1)
    assert {row[0] for row in other["explained_latents"]["rows"]} != shown
    # Only where all that live are explained do explanations replace them.
    assert not any(name.startswith("tested_") for name in measured)
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured


def test_patterns_as_text(subject, store):
    sae = planted_patterns.make_sae(planted_patterns.true_params())
    config = dataclasses.replace(SMALL, explained_latents=L)
    table = _measure(sae, subject, store, config)["explained_latents"]
    texts = {row[0]: row[-1] for row in table["rows"]}
    want = {3: "[b]", 1: "[↵]", FIRST: "^[*]", ALWAYS: "[*]", pair(0, 1): "[ a][↵]"}
    shown = texts.keys() & want.keys()
    assert len(texts) == 20 and shown
    assert all(texts[latent] == want[latent] for latent in shown)


def test_sharded_equals_one_device(tmp_path, monkeypatch):
    monkeypatch.setattr(n2g, "LONGEST", LONGEST)
    subject, params = planted.make_subject(), planted.random_params()
    store = planted.write_store(tmp_path / "store", subject)
    one, eight = (
        _measure(
            planted.make_sae(params, kind="center_unit_norm", mesh_shape=shape),
            subject,
            store,
        )
        for shape in ((1, 1), (2, 4))
    )
    values = _values(eight)
    for name, value in _values(one).items():
        assert values[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert one["explained_latents"] == eight["explained_latents"]


def test_no_latent_lives(subject, store):
    params = planted_patterns.true_params()
    params["b_enc_l"] = np.full(L, -1e6)
    measured = _measure(planted_patterns.make_sae(params), subject, store)
    assert _values(measured) == {"n2g_living": 0}


def test_refuses_a_single_heldout_context(subject, store, tmp_path):
    sae = planted_patterns.make_sae(planted_patterns.true_params())
    lone = planted_patterns.write_store(tmp_path / "lone", subject, heldout=1)
    with pytest.raises(ValueError, match="1 held-out context.* want 2") as error:
        _measure(sae, subject, lone)
    assert "\n" not in str(error.value)
    few = dataclasses.replace(SMALL, explanation_rows=T)
    with pytest.raises(ValueError, match="raise explanation_rows"):
        _measure(sae, subject, store, few)


class _Dealt:
    """The store, but a share of its held-out rows has been permuted."""

    def __init__(self, store, share):
        self._store, heldout = store, store.sequences("heldout")
        self._acts, self._first = store.read_contexts(SITE, heldout)[0], heldout[0]
        rows = self._acts.reshape(-1, D)
        rng = np.random.default_rng(3)
        moved = np.flatnonzero(rng.random(len(rows)) < share)
        rows[moved] = rows[rng.permutation(moved)]

    def __getattr__(self, name):
        return getattr(self._store, name)

    def read_contexts(self, site, sequences):
        is_row_st = self._store.find_rows(sequences)[1]
        return self._acts[sequences - self._first], is_row_st


class _Slow:
    """The whole metric, one token at a time, with all latents explained."""

    def __init__(self, subject, params, store, kind):
        self.subject, self.params, self.kind = subject, params, kind
        self.store = store
        self.tokens_st, is_real_st, is_row_st = planted.find_positions(store)
        self.middle = len(self.tokens_st) // 2
        acts = planted.heldout_rows(store)
        self.code_stl = planted.encode(params, acts, K, kind)[0] * is_row_st[..., None]
        self.halves = slice(self.middle), slice(self.middle, None)
        self.is_real_st, self.is_row_st = is_real_st, is_row_st

    def measure(self):
        known, tested = (self.tokens_st[half] for half in self.halves)
        known_stl, fired_stl = (self.code_stl[half] for half in self.halves)
        from_known, from_tested = (self.is_row_st[half] for half in self.halves)
        living = np.flatnonzero((known_stl > 0).any((0, 1)))
        tokens, counts = np.unique(known[from_known], return_counts=True)
        pads = tokens[np.argsort(-counts, kind="stable")][:2].tolist()
        simulated_stl = np.zeros_like(fired_stl)
        found, scores, unigram = {}, [], []
        for latent in living:
            of_latent = self.explain(latent, known, known_stl[..., latent], pads)
            found[latent] = of_latent
            trie = {}
            for pattern in of_latent:
                if pattern is not None:
                    oracle_n2g.insert(trie, *pattern)
            fired = fired_stl[..., latent] > 0
            predicted = oracle_n2g.predict(trie, tested)
            scores.append(_count((predicted > 0) & from_tested, fired))
            tokens, counts = np.unique(
                known[known_stl[..., latent] > 0], return_counts=True
            )
            is_top = (tested == tokens[np.argmax(counts)]) & from_tested
            unigram.append(_count(is_top, fired))
            s, a = oracle_n2g.predict(trie, known) * from_known, known_stl[..., latent]
            scale = (s * a).sum() / (s * s).sum() if s.any() else 0
            simulated_stl[..., latent] = scale * predicted
        return {
            "n2g_living": len(living),
            **_average("n2g", np.array(scores)),
            **_average("unigram", np.array(unigram)),
            **_describe(found),
            **self.splice(tested, simulated_stl),
        }

    def explain(self, latent, tokens_st, acts_st, pads):
        rows = np.flatnonzero(acts_st)
        rising = sorted(rows, key=lambda row: acts_st.flat[row])
        n = min(16, len(rising))
        peaks = [rising[round(i)] for i in np.linspace(0, len(rising) - 1, n)]
        found = []
        for row in peaks:
            s, t = divmod(int(row), T)
            tokens = tokens_st[s, : t + 1].tolist()
            read = functools.partial(self.read, latent)
            act = acts_st[s, t]
            found.append(oracle_n2g.find_pattern(tokens, act, read, pads, LONGEST))
        return found

    def read(self, latent, tokens):
        return self.encode_last(tuple(tokens))[latent]

    @functools.cache
    def encode_last(self, tokens):
        row_d = planted.rows_of(self.subject, np.array([tokens]))[0, -1]
        return planted.encode(self.params, row_d[None], K, self.kind)[0][0]

    def splice(self, tokens_st, simulated_stl):
        acts = planted.rows_of(self.subject, tokens_st)
        known, tested = self.halves
        rows = planted.heldout_rows(self.store)[known][self.is_row_st[known]]
        _, shifts, scales = oracle.normalize(self.kind, rows)
        _, *own = oracle.normalize(self.kind, acts.reshape(-1, D))
        shift, scale = (part.reshape(*acts.shape[:2], 1) for part in own)
        recon = simulated_stl @ self.params["w_dec_ld"] + self.params["b_dec_d"]
        spliced = {
            "clean": acts,
            "sae": planted.encode(self.params, acts, K, self.kind)[1],
            "simulated": recon * scale + shift,
            "patterns_alone": recon * scales.mean() + shifts.mean(),
            "mean_ablated": np.zeros_like(acts) + self.store.statistics(SITE).mean_d,
        }
        nats = {}
        is_read = self.is_real_st[tested][:, :-1] & self.is_real_st[tested][:, 1:]
        for name, rows in spliced.items():
            rows = planted.put_at_rows(self.store, tokens_st, rows, acts)
            log_p = planted.log_predictions(self.subject, rows)[:, :-1]
            chosen = np.take_along_axis(log_p, tokens_st[:, 1:, None], -1)
            nats[name] = -chosen[is_read].mean()
        train = self.store.sequences("train")
        lists = [
            [t[is_real].tolist() for t, is_real in zip(tokens, is_reals, strict=True)]
            for tokens, is_reals in (
                (self.store.read_tokens(train), self.store.read_documents(train) >= 0),
                (tokens_st, self.is_real_st[tested]),
            )
        ]
        log_p = oracle_n2g.ngram_log_p(*lists, planted.VOCAB, 3)
        for name, log_st in zip(("unigram", "bigram", "trigram"), log_p, strict=True):
            nats[name] = -log_st.mean()
        below = nats["bigram"] - nats["simulated"]
        figures = {f"tested_ce_{name}": value for name, value in nats.items()}
        return figures | {"simulated_below_bigram": below}


def _count(predicted, fired):
    return predicted.sum(), fired.sum(), (predicted & fired).sum()


def _average(name, scores):
    precisions = [hits / n for n, _, hits in scores if n]
    recalls = [hits / n for _, n, hits in scores if n]
    f1s = [2 * hits / (n + m) for n, m, hits in scores if n + m]
    predicted, fired, hits = scores.sum(0)
    return {
        f"{name}_precision": np.mean(precisions),
        f"{name}_recall": np.mean(recalls),
        f"{name}_f1": np.mean(f1s),
        f"{name}_precision_pooled": hits / predicted,
        f"{name}_recall_pooled": hits / fired,
    }


def _describe(found):
    patterns = [p for of_latent in found.values() for p in of_latent if p]
    tokens = [token for pattern, _, _ in patterns for token in pattern]
    n_contexts = sum(map(len, found.values()))
    return {
        "n2g_explained": np.mean([any(own) for own in found.values()]),
        "n2g_contexts_explained": len(patterns) / n_contexts,
        "n2g_pattern_length": len(tokens) / len(patterns),
        "n2g_any_tokens": tokens.count(oracle_n2g.ANY) / len(tokens),
        "n2g_anchored": np.mean([is_anchored for _, is_anchored, _ in patterns]),
    }
