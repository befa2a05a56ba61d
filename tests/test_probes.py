"""Probe losses against float64 SciPy, planted features, meshes and broken latents."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import oracle_probes
import planted_tasks
import pytest

from sae_jax import directions
from sae_jax.directions import RandomDirections
from sae_jax.evals import EvaluateConfig, probes
from sae_jax.evals.figures import average_figure

D, L = 16, 24
CHANCE = np.log(2)


@pytest.fixture
def compute(monkeypatch):
    """The metric of an SAE, over given tasks."""

    def compute(sae, tasks, seed=0):
        monkeypatch.setattr(probes, "measure_task_rows", lambda *_: tasks)
        context = planted_tasks.make_context(sae, seed)
        results = probes.compute(context, EvaluateConfig())
        assert json.loads(json.dumps(results)) == results
        return results

    return compute


def _values(results):
    return {n: figure["value"] for n, figure in results.items() if "value" in figure}


def _tell(features, task, slope_d, intercept):
    """Loss and accuracy on the held-out rows."""
    logits_n = features[task.heldout_n] @ slope_d + intercept
    labels_n = task.labels_n[task.heldout_n]
    loss = oracle_probes.log_loss(logits_n, labels_n).mean()
    return loss, ((logits_n > 0) == labels_n).mean()


def _tell_by_one(rows_nd, task, directions_ld):
    """The same of the best direction, and which it is."""
    features_nl = rows_nd @ np.float64(directions_ld).T
    is_train_n = ~task.heldout_n
    fits = [
        oracle_probes.fit(feature_n[is_train_n], task.labels_n[is_train_n])
        for feature_n in features_nl.T
    ]
    best = int(np.argmin([loss for _, _, loss in fits]))
    slope_1, intercept, _ = fits[best]
    return *_tell(features_nl[:, [best]], task, slope_1, intercept), best


def _tell_by_all(rows_nd, task):
    train = np.flatnonzero(~task.heldout_n)
    texts_n = task.texts_n[train]
    is_checked_n = np.isin(texts_n, np.unique(texts_n)[::4])
    losses = []
    for ridge in probes._RIDGES:
        rest, checked = train[~is_checked_n], train[is_checked_n]
        fit = oracle_probes.fit(rows_nd[rest], task.labels_n[rest], ridge=ridge)
        logits_n = rows_nd[checked] @ fit[0] + fit[1]
        losses.append(oracle_probes.log_loss(logits_n, task.labels_n[checked]).mean())
    ridge = probes._RIDGES[np.argmin(losses)]
    fit = oracle_probes.fit(rows_nd[train], task.labels_n[train], ridge=ridge)
    return *_tell(rows_nd, task, *fit[:2]), ridge


@pytest.mark.parametrize("kind", ["none", "center_unit_norm"])
def test_figures_are_those_of_numpy(compute, kind):
    features_fd = planted_tasks.random_rows(20, D)
    tasks = planted_tasks.make_tasks(features_fd, 3, noise=0.5)
    w_enc_ld = 3 * planted_tasks.random_rows(L, D, seed=2)
    results = compute(planted_tasks.make_sae(w_enc_ld, kind), tasks, seed=4)
    random_ld = RandomDirections(jax.random.key(4), (L, D)).at(jnp.arange(L))
    by_kind = {"": w_enc_ld, "_channels": np.eye(D), "_random": random_ld}
    told = {ending: [] for ending in (*by_kind, "_full")}
    for task in tasks:
        rows_nd, _, _ = oracle.normalize(kind, np.float64(task.acts_nd))
        for ending, rows_ld in by_kind.items():
            told[ending].append(_tell_by_one(rows_nd, task, rows_ld))
        told["_full"].append(_tell_by_all(rows_nd, task))
    assert {ridge for _, _, ridge in told["_full"]} - set(probes._RIDGES[:1])
    loss_t = {e: np.array([of[0] for of in told[e]]) for e in told}
    want = {f"probe_loss{ending}": loss_t[ending] for ending in told}
    want |= {f"probe_accuracy{e}": np.array([of[1] for of in told[e]]) for e in told}
    for other in ("_channels", "_random"):
        want[f"probe_gain{other}"] = loss_t[other] - loss_t[""]
    assert _values(results).keys() == want.keys() == probes.MEANINGS.keys()
    for name, values_t in want.items():
        expected = average_figure(values_t, "tasks")
        for key in ("value", "ci95"):
            assert results[name][key] == pytest.approx(expected[key], abs=2e-4), name
        assert (results[name]["samples"], results[name]["unit"]) == (3, "tasks")
    columns, rows = results["tasks"]["columns"], results["tasks"]["rows"]
    table = {name: [row[at] for row in rows] for at, name in enumerate(columns)}
    assert table["task"] == [task.name for task in tasks]
    assert table["train rows"] == [(~task.heldout_n).sum() for task in tasks]
    assert table["held-out rows"] == [task.heldout_n.sum() for task in tasks]
    assert table["latent"] == [of[2] for of in told[""]]
    np.testing.assert_allclose(table["channel loss"], loss_t["_channels"], atol=2e-4)


def test_planted_features(compute):
    """True features are told, random directions are not, features in pairs half."""
    d_model = 256
    features_fd = np.linalg.qr(planted_tasks.random_rows(d_model, d_model))[0][:128]
    tasks = planted_tasks.make_tasks(features_fd, 4, n_rows=600)
    dictionaries = {
        "true": features_fd,
        "turned": (features_fd + np.roll(features_fd, 1, axis=0)) / np.sqrt(2),
        "random": planted_tasks.random_rows(128, d_model, seed=3),
    }
    found = {}
    for name, w_ld in dictionaries.items():
        results = compute(planted_tasks.make_sae(w_ld), tasks)
        found[name] = _values(results)
        if name == "true":
            assert [row[3] for row in results["tasks"]["rows"]] == [0, 1, 2, 3]
    true, turned, random = found.values()
    assert true["probe_loss"] < 0.01 and true["probe_accuracy"] == 1
    # Where just one of a pair is there, it is the task's twice as often as the other.
    between = np.log(3) / 2 - np.log(2) / 3
    assert turned["probe_loss"] == pytest.approx(between, abs=0.05)
    assert random["probe_loss"] == pytest.approx(CHANCE, abs=0.05)
    assert true["probe_loss_random"] == pytest.approx(CHANCE, abs=0.05)
    assert true["probe_gain_random"] > 0.6
    assert true["probe_loss_full"] < turned["probe_loss"]


def test_sharded_equals_one_device(compute, monkeypatch):
    """In tiles of 4 of the 24 or 6 latents of a shard; three tasks on two shards."""
    tasks = planted_tasks.make_tasks(planted_tasks.random_rows(20, D), 3)
    w_ld = planted_tasks.random_rows(L, D)
    n_most = max(int((~task.heldout_n).sum()) for task in tasks)
    monkeypatch.setattr(directions, "_TILE_SIZE", 4 * n_most)
    directions.find_best.clear_cache()
    results = [
        compute(planted_tasks.make_sae(w_ld, "layer_norm", shape), tasks)
        for shape in ((1, 1), (2, 4))
    ]
    directions.find_best.clear_cache()
    one, eight = map(_values, results)
    for name, value in one.items():
        assert eight[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    latents = [[row[3] for row in of["tasks"]["rows"]] for of in results]
    assert latents[0] == latents[1]


def test_the_seed_draws_the_random_directions(compute):
    tasks = planted_tasks.make_tasks(planted_tasks.random_rows(20, D), 2)
    sae = planted_tasks.make_sae(planted_tasks.random_rows(L, D))
    first, again, other = (compute(sae, tasks, seed) for seed in (1, 1, 2))
    assert first == again
    assert _values(other)["probe_loss"] == _values(first)["probe_loss"]
    assert _values(other)["probe_loss_random"] != _values(first)["probe_loss_random"]


def test_broken_latents_and_separable_tasks_are_finite(compute):
    """Labels that a constant, a zero and a NaN latent must not win."""
    tasks = planted_tasks.make_tasks(planted_tasks.random_rows(20, D), 2)
    w_enc_ld = planted_tasks.random_rows(L, D)
    w_enc_ld[:3] = 0
    w_enc_ld[3] = np.nan
    values = _values(compute(planted_tasks.make_sae(w_enc_ld), tasks))
    assert np.isfinite(list(values.values())).all()
    signs_n1 = np.where(tasks[0].labels_n, 1, -1)[:, None]
    one_text = dataclasses.replace(
        tasks[0],
        acts_nd=np.float32(signs_n1 * np.ones(D)),
        texts_n=np.where(tasks[0].heldout_n, 1, 0),
    )
    values = _values(compute(planted_tasks.make_sae(w_enc_ld), [one_text]))
    assert values.pop("probe_loss") < 0.01
    assert np.isfinite(list(values.values())).all()


def test_an_sae_of_nan_is_refused(compute):
    tasks = planted_tasks.make_tasks(planted_tasks.random_rows(20, D), 1)
    with pytest.raises(ValueError, match="'task 0' can be told by nothing") as told:
        compute(planted_tasks.make_sae(np.full((L, D), np.nan)), tasks)
    assert "\n" not in str(told.value)
