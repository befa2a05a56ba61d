"""Recovered directions and matched dictionaries: NumPy, planted, meshes, refusals."""

import dataclasses
import json
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import planted_tasks
import pytest
import synthetic

from sae_jax import loop, run
from sae_jax.config import MeshConfig
from sae_jax.directions import RandomDirections
from sae_jax.evals import EvaluateConfig, recovery
from sae_jax.evals.figures import average_figure

D, L = 64, 32
ANGLE = 0.6


@pytest.fixture
def compute(monkeypatch):
    """The metric of an SAE, with settings by name."""

    def compute(sae, tasks=(), seed=0, **settings):
        monkeypatch.setattr(recovery, "measure_task_rows", lambda *_: tasks)
        context = planted_tasks.make_context(sae, seed)
        results = recovery.compute(context, EvaluateConfig(**settings))
        assert json.loads(json.dumps(results)) == results
        return results

    return compute


@pytest.fixture
def given(tmp_path):
    """A file of orthonormal directions, and these."""
    rows_ld = np.linalg.qr(planted_tasks.random_rows(D, D))[0][:L]
    np.save(tmp_path / "given.npy", rows_ld)
    return str(tmp_path / "given.npy"), rows_ld


def _values(results):
    return {n: figure["value"] for n, figure in results.items() if "value" in figure}


def _largest(rows_nd, others_ld):
    rows_nd, others_ld = (
        np.float64(x) / np.linalg.norm(x, axis=1, keepdims=True)
        for x in (rows_nd, others_ld)
    )
    return (rows_nd @ others_ld.T).max(axis=1)


@pytest.mark.parametrize("kind", ["none", "center_unit_norm"])
def test_the_tasks_own_directions(compute, kind):
    tasks = planted_tasks.make_tasks(planted_tasks.random_rows(20, D), 3)
    w_dec_ld, w_enc_ld = (planted_tasks.random_rows(L, D, seed) for seed in (2, 3))
    sae = planted_tasks.make_sae(w_dec_ld, kind, w_enc_ld=5 * w_enc_ld)
    results = compute(sae, tasks, seed=6)
    rows_nd = []
    for task in tasks:
        for_n, against_n = (~task.heldout_n & (task.labels_n == y) for y in (1, 0))
        rows_nd.append(task.acts_nd[for_n].mean(0) - task.acts_nd[against_n].mean(0))
    rows_nd = np.stack(rows_nd)
    if kind == "center_unit_norm":
        rows_nd -= rows_nd.mean(axis=1, keepdims=True)
    random_ld = RandomDirections(jax.random.key(6), (L, D)).at(jnp.arange(L))
    names = ("decoder", "encoder", "random")
    for name, others_ld in zip(names, (w_dec_ld, w_enc_ld, random_ld), strict=True):
        cosine_n = _largest(rows_nd, others_ld)
        expected = average_figure(cosine_n, "directions")
        figure = results[f"task_{name}_cosine"]
        assert figure["value"] == pytest.approx(expected["value"], rel=1e-5)
        assert figure["ci95"] == pytest.approx(expected["ci95"], rel=1e-4)
        assert figure["samples"] == 3
        curve = results["shares_of_directions"]["ys"][name]
        assert curve[0] == 1 and curve[30] == np.mean(cosine_n >= 0.3)
    table = results["directions"]
    assert [row[0] for row in table["rows"]] == [task.name for task in tasks]
    assert len(table["columns"]) == len(table["rows"][0])
    values = _values(results)
    assert len(values) == 6 and values.keys() < recovery.MEANINGS.keys()


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_given_directions_that_are_there_turned_or_not(compute, given, shape):
    file, rows_ld = given
    dictionaries = {
        "true": 3 * rows_ld[::-1],
        "turned": planted_tasks.rotate(rows_ld, ANGLE),
        "random": planted_tasks.random_rows(L, D, seed=9),
    }
    found = {}
    for name, w_ld in dictionaries.items():
        sae = planted_tasks.make_sae(w_ld, mesh_shape=shape)
        found[name] = _values(compute(sae, directions=file))
    true, turned, random = found.values()
    assert true["given_decoder_cosine"] == pytest.approx(1, rel=1e-6)
    assert turned["given_decoder_cosine"] == pytest.approx(np.cos(ANGLE), rel=1e-6)
    assert true["given_encoder_recall"] == true["given_decoder_recall"] == 1
    assert turned["given_decoder_recall"] == random["given_decoder_recall"] == 0
    chance = true["given_random_cosine"]
    assert random["given_decoder_cosine"] == pytest.approx(chance, abs=0.03)
    assert chance < 0.4 and true["given_random_recall"] == 0
    assert chance == turned["given_random_cosine"]


def _stand_in(monkeypatch, other, n_latents=L):
    """Has another run's SAE be this one."""
    config = synthetic.make_config()
    sae = dataclasses.replace(config.sae, n_latents=n_latents)
    monkeypatch.setattr(run, "locate", lambda path: (Path(path), 1))
    monkeypatch.setattr(
        run, "read_config", lambda path: dataclasses.replace(config, sae=sae)
    )
    monkeypatch.setattr(run, "load", lambda path, mesh: other)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4)])
def test_another_dictionary(compute, given, monkeypatch, shape):
    file, rows_ld = given
    sae = planted_tasks.make_sae(rows_ld, mesh_shape=shape)
    others = {
        "same": np.random.default_rng(1).permutation(rows_ld),
        "turned": planted_tasks.rotate(rows_ld, ANGLE),
        "random": planted_tasks.random_rows(L, D, seed=9),
    }
    found = {}
    for name, w_ld in others.items():
        _stand_in(monkeypatch, planted_tasks.make_sae(w_ld, mesh_shape=shape))
        results = compute(sae, directions=file, against="other")
        found[name] = _values(results)
    assert (results["stable_share"]["samples"], results["stable_share"]["unit"]) == (
        L,
        "latents",
    )
    same, turned, random = found.values()
    assert same["matched_cosine"] == pytest.approx(1, rel=1e-6)
    assert same["stable_share"] == same["stable_share_90"] == 1
    assert turned["matched_cosine"] == pytest.approx(np.cos(ANGLE), rel=1e-6)
    assert (turned["stable_share"], turned["stable_share_90"]) == (1, 0)
    assert random["stable_share"] == same["stable_share_random"] == 0
    chance = same["matched_cosine_random"]
    assert random["matched_cosine"] == pytest.approx(chance, abs=0.03)
    assert chance < same["nearest_cosine_random"] < 0.4
    assert set(same) | {n.replace("given", "task") for n in same} == set(
        recovery.MEANINGS
    )


def test_a_run_is_matched_with_itself(compute, planted_store, tmp_path):
    config = synthetic.make_config(planted_store, mesh=MeshConfig(1, 1), rows=3 * 64)
    loop.train(config, tmp_path / "run")
    sae = run.load(tmp_path / "run")
    tasks = planted_tasks.make_tasks(planted_tasks.random_rows(4, sae.d_model), 2)
    values = _values(compute(sae, tasks, against=str(tmp_path / "run")))
    assert values["matched_cosine"] == pytest.approx(1, rel=1e-6)
    assert values["stable_share_90"] == 1 and values["stable_share_random"] < 1


def test_refusals_of_another_run(compute, given, monkeypatch, tmp_path):
    file, rows_ld = given
    sae = planted_tasks.make_sae(rows_ld, mesh_shape=(2, 4))

    def refuses(match, error=ValueError, other=None, n_latents=L, path="other"):
        if other is not None:
            _stand_in(monkeypatch, other, n_latents)
        with pytest.raises(error, match=match) as told:
            compute(sae, directions=file, against=path)
        assert "\n" not in str(told.value)

    refuses("neither a run folder", FileNotFoundError, path=str(tmp_path))
    narrow = planted_tasks.make_sae(rows_ld[:, 1:])
    refuses(f"against = other: an SAE of width {D - 1} .* of width {D}", other=narrow)
    elsewhere = planted_tasks.make_sae(rows_ld, site="mlp_out.0")
    refuses("at mlp_out.0 cannot be matched with .* at resid_post.1", other=elsewhere)
    refuses("30 latents do not divide among the 4", other=narrow, n_latents=30)


def test_refusals_of_directions(compute, tmp_path):
    sae, file = planted_tasks.make_sae(np.eye(D)[:L]), tmp_path / "directions.npy"

    def refuses(match, write):
        with open(file, "wb") as stream:
            write(stream)
        with pytest.raises(ValueError, match=match) as told:
            compute(sae, directions=str(file))
        assert str(file) in str(told.value) and "\n" not in str(told.value)

    def of(array):
        return lambda stream: np.save(stream, array, allow_pickle=True)

    unreadable = "cannot be read as a .npy file of numbers"
    refuses(unreadable, lambda stream: None)
    refuses(unreadable, lambda stream: pickle.dump([1], stream))
    refuses(unreadable, of(np.array([{}, 1], object)))
    refuses(unreadable, lambda stream: np.savez(stream, np.ones((2, D))))
    refuses("holds values of type <U1: must be numbers", of(np.full((2, D), "a")))
    refuses(rf"has shape \(0, {D}\)", of(np.ones((0, D))))
    refuses(rf"has shape \(3, {D - 1}\): must be \[N, {D}\]", of(np.ones((3, D - 1))))
    refuses(r"has shape \(64,\)", of(np.ones(D)))
    broken_nd = np.ones((3, D))
    broken_nd[1] = 0
    refuses("row 1 of 3 is 0 or not finite", of(broken_nd))
    broken_nd[0, 5] = np.inf
    refuses("row 0 of 3 is 0 or not finite", of(broken_nd))
    with pytest.raises(FileNotFoundError, match="missing.npy"):
        compute(sae, directions=str(tmp_path / "missing.npy"))
