"""Sparse probing, absorption and perturbation: planted answers, and plain NumPy."""

import dataclasses

import numpy as np
import planted_concepts
import pytest
from planted import D

from sae_jax.evals import absorption, concepts, perturbation, sparse_probing, spurious
from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.figures import average_figure

CONFIG = EvaluateConfig()
FEATURES = planted_concepts.make_features()
TASKS = planted_concepts.make_tasks(FEATURES)
PAIR = planted_concepts.make_pair(FEATURES)
SAES = {
    "true": FEATURES,
    "rotated": planted_concepts.rotate(FEATURES, 0.7),
    "random": planted_concepts.make_features(seed=9),
}


def _context(sae):
    """A context whose tasks have been measured."""
    context = planted_concepts.make_context(sae)
    made = concepts.make_concepts(context, TASKS)
    context.measured["concepts", CONFIG.tasks, CONFIG.task_rows] = made
    rows = "task_rows", CONFIG.tasks, CONFIG.task_rows, CONFIG.batch_sequences
    context.measured[rows] = [*TASKS, PAIR]
    return context


@pytest.fixture(scope="module")
def contexts():
    return {
        name: _context(planted_concepts.make_sae(rows)) for name, rows in SAES.items()
    }


def _values(metric, context):
    figures = metric.compute(context, CONFIG)
    values = {n: f["value"] for n, f in figures.items() if "value" in f}
    assert values.keys() == metric.MEANINGS.keys()
    return values


def test_the_code_and_the_probe_of_a_concept(contexts):
    made = contexts["true"].measured["concepts", "", 1000]
    for concept, task in zip(made, TASKS, strict=True):
        side, n = concept.heldout, task.heldout_n.sum()
        assert len(concept.train.labels_n) == len(task.labels_n) - n
        rebuilt_nd = (side.values_nk[..., None] * SAES["true"][side.indices_nk % D])
        used_nk1 = (side.values_nk > 0)[..., None]
        np.testing.assert_allclose(
            rebuilt_nd.sum(1, where=used_nk1), side.acts_nd, atol=1e-5
        )
        logits_n = concept.logits(side.acts_nd)
        assert concepts.measure_accuracy(logits_n, side.labels_n) > 0.97


def test_values_are_in_activation_space():
    sae = planted_concepts.make_sae(SAES["true"], kind="center_unit_norm")
    [concept] = concepts.make_concepts(planted_concepts.make_context(sae), TASKS[:1])
    side = concept.heldout
    parts_nkd = side.values_nk[..., None] * SAES["true"][side.indices_nk % D]
    used_nk1 = (side.values_nk > 0)[..., None]
    rebuilt_nd = side.acts_nd.mean(1, keepdims=True) + parts_nkd.sum(1, where=used_nk1)
    want_nd = sae.decode(sae.encode(side.acts_nd))
    np.testing.assert_allclose(rebuilt_nd, want_nd, atol=1e-5)


def test_a_probe_is_fit_on_its_own_rows_alone():
    task = TASKS[0]
    probes = [
        concepts.fit_probe(task.acts_nd, task.labels_n, len(task.labels_n) + more)
        for more in (0, 100)
    ]
    (slope_d, intercept), (padded_d, padded_intercept) = probes
    np.testing.assert_allclose(padded_d, slope_d, rtol=1e-3, atol=1e-4)
    assert padded_intercept == pytest.approx(intercept, rel=1e-3, abs=1e-4)


def test_a_row_between_the_classes_is_half_told():
    logits_n, labels_n = np.array([0, 0, 2, -1]), np.array([True, False, True, True])
    assert concepts.measure_accuracy(logits_n, labels_n) == 0.5


def test_shares_are_what_a_latent_gives_to_the_logit(contexts):
    context = contexts["rotated"]
    made = context.measured["concepts", "", 1000][1]
    side = made.heldout
    share_nk = concepts.find_shares(context, side, made.slope_d)
    cosine_nk = concepts.find_cosines(context, side, made.slope_d)
    used_nk = side.values_nk > 0
    rows_nkd = SAES["rotated"][np.where(used_nk, side.indices_nk, 0)]
    along_nk = rows_nkd @ made.slope_d.astype(float)
    want_nk = np.where(used_nk, side.values_nk * along_nk, 0)
    np.testing.assert_allclose(share_nk, want_nk, atol=1e-4)
    length = np.linalg.norm(made.slope_d)
    want_nk = along_nk / length
    np.testing.assert_allclose(cosine_nk[used_nk], want_nk[used_nk], atol=1e-5)


def test_mean_differences_are_those_of_numpy(contexts):
    side = contexts["random"].measured["concepts", "", 1000][2].train
    latents, difference_l = concepts.find_mean_differences(side, side.values_nk)
    dense_nl = np.zeros((len(side.labels_n), latents.max() + 1))
    np.put_along_axis(dense_nl, side.indices_nk, side.values_nk, axis=1)
    want_l = dense_nl[side.labels_n].mean(0) - dense_nl[~side.labels_n].mean(0)
    np.testing.assert_allclose(difference_l, want_l[latents], atol=1e-6)
    best = concepts.choose_given(side, side.values_nk, 3)
    assert best.tolist() == np.argsort(-want_l, kind="stable")[:3].tolist()
    values_nf = concepts.find_values(side, best)
    np.testing.assert_allclose(values_nf, dense_nl[:, best], atol=1e-6)


def test_sparse_probing_tells_dictionaries_apart(contexts):
    true, rotated, random = (
        _values(sparse_probing, contexts[name]) for name in SAES
    )
    assert true["sparse_accuracy_1"] > 0.99
    one = "sparse_accuracy_1"
    assert true[one] - 0.05 > rotated[one] > random[one] + 0.02
    assert random["sparse_accuracy_1"] < random["sparse_accuracy_5"]
    assert true["full_accuracy"] == random["full_accuracy"] > 0.97
    table = sparse_probing.compute(contexts["true"], CONFIG)["sparse_probes"]
    assert [row[1].split()[0] for row in table["rows"]] == list("0123")


def test_sparse_probes_are_of_train_rows_alone():
    """On held-out rows latent 0 tells the opposite, and latent 1 tells it better."""
    n = 40
    labels_n = np.arange(n) % 2 == 1
    noise_n = np.arange(n) // 2 % 2
    # Channel 0 differs more, but channel 1 varies less.
    acts_nd = np.stack([labels_n + 9 * noise_n, labels_n / 2], axis=1)

    def make_side(first_n, second_n):
        values_nk = np.stack([first_n, 3 * second_n], axis=1).astype(np.float32)
        indices_nk = np.tile(np.int32([0, 1]), (n, 1))
        texts_n = np.arange(n)
        return concepts.Side(
            acts_nd.astype(np.float32), labels_n, texts_n, values_nk, indices_nk
        )

    train, heldout = make_side(labels_n, noise_n), make_side(~labels_n, labels_n)
    concept = concepts.Concept("", train, heldout, np.zeros(2, np.float32), 0.0)
    context = planted_concepts.make_context(planted_concepts.make_sae(FEATURES))
    context.measured["concepts", CONFIG.tasks, CONFIG.task_rows] = [concept]
    values = _values(sparse_probing, context)
    assert values["sparse_accuracy_1"] == 0
    assert values["sparse_accuracy_channels_1"] == 1


def test_a_true_latent_is_targeted(contexts):
    true = _values(perturbation, contexts["true"])
    random = _values(perturbation, contexts["random"])
    # Without its feature all rows of a task look alike.
    assert true["targeted_drop_1"] == pytest.approx(0.5, abs=0.03)
    assert abs(true["untargeted_drop_1"]) < 0.02
    assert true["targeting_1"] > random["targeting_1"] + 0.2
    assert true["targeting_1"] > true["targeting_channels_1"] + 0.2


def test_drops_are_averaged_over_what_is_taken_out(contexts, monkeypatch):
    drop_nij = np.random.default_rng(0).random((len(perturbation.NS), 4, 4))
    monkeypatch.setattr(perturbation, "find_latent_drops", lambda *_: drop_nij)
    figures = perturbation.compute(contexts["true"], CONFIG)
    own_i = np.diagonal(drop_nij[1])
    others_i = [np.delete(drop_nij[1, i], i).mean() for i in range(4)]
    for name, want_i in (
        ("targeted_drop_5", own_i),
        ("untargeted_drop_5", others_i),
        ("targeting_5", own_i - others_i),
    ):
        want = average_figure(want_i, "tasks")
        assert figures[name]["value"] == pytest.approx(want["value"]), name
        assert figures[name]["ci95"] == pytest.approx(want["ci95"]), name


def test_channels_are_set_to_their_mean_of_train_rows(contexts):
    for concept in contexts["true"].measured["concepts", "", 1000]:
        mean_1d = concept.train.acts_nd.mean(axis=0, keepdims=True)
        want_n = concept.logits(concept.heldout.acts_nd) - concept.logits(mean_1d)
        share_nd = perturbation.find_channel_shares(concept)
        np.testing.assert_allclose(share_nd.sum(axis=1), want_n, atol=1e-4)


def test_drops_are_those_of_rows_without_the_latents(contexts):
    context = contexts["rotated"]
    made = context.measured["concepts", "", 1000]
    drop_nij = perturbation.find_latent_drops(context, made)
    for i, j in ((0, 0), (1, 3)):
        latents = perturbation.choose_latents(context, made[i])[:5]
        side = made[j].heldout
        is_out_nk = np.isin(side.indices_nk, latents) & (side.values_nk > 0)
        taken_nkd = side.values_nk[..., None] * SAES["rotated"][side.indices_nk % D]
        train = made[j].train
        code_nl = np.zeros((len(train.labels_n), D))
        for values_n, indices_n in zip(train.values_nk.T, train.indices_nk.T):
            np.add.at(code_nl, (np.arange(len(code_nl)), indices_n % D), values_n)
        mean_d = code_nl.mean(0)[latents] @ SAES["rotated"][latents]
        rest_nd = side.acts_nd - taken_nkd.sum(1, where=is_out_nk[..., None]) + mean_d
        before, after = (
            concepts.measure_accuracy(made[j].logits(acts), side.labels_n)
            for acts in (side.acts_nd, rest_nd.astype(np.float32))
        )
        at = perturbation.NS.index(5)
        assert drop_nij[at, i, j] == pytest.approx(before - after, abs=0.011)


def test_absorption_is_found_where_it_was_planted(contexts, monkeypatch):
    assert _values(absorption, contexts["true"])["absorption_full"] == 0
    # Latent 0 is silent where feature 1 is there too, and latent D speaks for both.
    f0, f1 = FEATURES[:2]
    encoder_ld = np.concatenate([FEATURES, [2 * (f0 + f1)]])
    encoder_ld[0] = f0 - 3 * f1
    rows_ld = np.concatenate([FEATURES, [(f0 + f1) / np.sqrt(2)]])
    bias_l = np.zeros(D + 1)
    bias_l[D] = -4  # above every one of them alone, below both
    sae = planted_concepts.make_sae(rows_ld, encoder_ld=encoder_ld, bias_l=bias_l)
    context = _context(sae)
    # Else the latent of both, which tells some rows that latent 0 does not, is main.
    monkeypatch.setattr(absorption, "LEAST_GAIN", 0.2)
    table = absorption.compute(context, CONFIG)["absorption_by_task"]
    by_task = {row[0]: row for row in table["rows"]}
    positives = context.measured["concepts", "", 1000][0].heldout
    has_both = (positives.acts_nd @ f1 > 0.5)[positives.labels_n].mean()
    assert by_task["f0"][1].split()[0] == "0" and has_both > 0.1
    assert by_task["f0"][4] == pytest.approx(has_both, abs=0.03)
    assert by_task["f2"][4] == 0


def test_absorption_is_of_positives_that_are_told(contexts, monkeypatch):
    """By probes that miss half the positives, or take half the negatives for them."""
    context, absorb, usuals = contexts["rotated"], absorption.absorb, []
    monkeypatch.setattr(
        absorption, "absorb", lambda *args: usuals.append(args[-1]) or absorb(*args)
    )
    made = context.measured["concepts", "", 1000][0]
    side, logits_n = made.heldout, made.logits(made.heldout.acts_nd)
    for label in (True, False):
        middle = float(np.median(logits_n[side.labels_n == label]))
        moved = dataclasses.replace(made, intercept=made.intercept - middle)
        measured = {("concepts", "", 1000): [moved]}
        of_moved = dataclasses.replace(context, measured=measured)
        [row] = absorption.compute(of_moved, CONFIG)["absorption_by_task"]["rows"]
        assert row[2] == np.sum(side.labels_n & (logits_n > middle))
        main = np.array(row[1].split(), int)
        share_nm = concepts.find_values(made.train, main) * (
            SAES["rotated"][main] @ made.slope_d
        )
        usual = share_nm.sum(axis=1)[made.train.labels_n].mean()
        assert usuals[-1] == pytest.approx(usual, rel=1e-4)


def test_a_spurious_feature_is_taken_out_by_its_latent(contexts):
    true, rotated, random = (_values(spurious, contexts[name]) for name in SAES)
    assert true["spurious_fair_accuracy"] > true["spurious_biased_accuracy"] + 0.1
    assert true["spurious_removed_1"] > 0.9
    one = "spurious_removed_1"
    assert true[one] > rotated[one] > random[one]
    assert true[one] > true["spurious_removed_channels_1"] + 0.3


def test_what_is_removed_is_a_ratio_of_sums_over_all_pairs(contexts, monkeypatch):
    """Also over one without harm: leaving it out would choose by held-out rows."""
    accuracies = ((0.9, 0.7, 0.9), (0.8, 0.7, 0.7), (0.7, 0.8, 0.9))
    names = ["fair", "biased", *map(str, spurious.NS)]
    names += [f"channels_{n}" for n in spurious.NS]
    by_pair = [
        dict.fromkeys(names, after) | {"fair": fair, "biased": biased}
        for fair, biased, after in accuracies
    ]
    given = iter(by_pair)
    monkeypatch.setattr(spurious, "measure_pair_rows", lambda *_: [PAIR] * 3)
    monkeypatch.setattr(spurious, "_measure_pair", lambda *_: next(given))
    figures = spurious.compute(contexts["true"], CONFIG)
    assert figures["spurious_fair_accuracy"]["value"] == pytest.approx(0.8)
    for name in names[2:]:
        figure = figures[f"spurious_removed_{name}"]
        assert figure["value"] == pytest.approx((0.2 + 0 + 0.1) / (0.2 + 0.1 - 0.1))
        assert figure["samples"] == 3


def test_a_probe_without_the_spurious_latent_tells_rows_without_it(contexts):
    context = contexts["true"]
    [row] = spurious.compute(context, CONFIG)["spurious_pairs"]["rows"]
    columns = spurious.compute(context, CONFIG)["spurious_pairs"]["columns"]
    told = dict(zip(columns, row, strict=True))
    train_n = ~PAIR.heldout_n
    agree_n = train_n & (PAIR.labels_n == PAIR.spurious_n)
    slope_d, intercept = concepts.fit_probe(
        PAIR.acts_nd[agree_n], PAIR.labels_n[agree_n], int(train_n.sum())
    )
    heldout_nd, labels_n = PAIR.acts_nd[PAIR.heldout_n], PAIR.labels_n[PAIR.heldout_n]
    mean = (PAIR.acts_nd[train_n] @ FEATURES[1]).mean()
    without_nd = heldout_nd - np.outer(heldout_nd @ FEATURES[1] - mean, FEATURES[1])
    for name, acts_nd in (("biased", heldout_nd), ("1", without_nd)):
        right_n = (acts_nd @ slope_d + intercept > 0) == labels_n
        assert told[name] == pytest.approx(right_n.mean(), abs=0.011), name


def test_what_is_absorbed_is_counted_by_hand():
    side = concepts.Side(
        acts_nd=np.zeros((3, 1), np.float32),
        labels_n=np.ones(3, bool),
        texts_n=np.arange(3),
        values_nk=np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1]], np.float32),
        indices_nk=np.array([[0, 1, 2], [3, 1, 2], [0, 3, 2]], np.int32),
    )
    share_nk = np.array([[5, 2, 0], [3, 1, -1], [1, 2, 2]], np.float32)
    cosine_nk = np.array([[0.5, 0.5, 0], [0.5, 0.05, 0.5], [0.5, 0.5, 0.2]])
    absorbed_n, is_full_n = absorption.absorb(
        side, share_nk, cosine_nk, np.array([0]), usual=4
    )
    # Row 0 has its usual share; row 1 is silent, and 1 is not along the probe.
    np.testing.assert_allclose(absorbed_n, [0, 1, 4 / 5])
    assert is_full_n.tolist() == [False, True, False]


def test_meshes_agree(contexts):
    sharded = _context(planted_concepts.make_sae(SAES["rotated"], mesh_shape=(2, 4)))
    for metric in (sparse_probing, absorption, perturbation, spurious):
        one, many = (_values(metric, c) for c in (contexts["rotated"], sharded))
        for name, value in one.items():
            assert many[name] == pytest.approx(value, abs=0.011), name
