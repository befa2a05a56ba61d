"""From an SAE on disk to evaluation.json: what is written, taken over, and refused."""

import contextlib
import dataclasses
import json

import planted
import pytest
from planted import T

from sae_jax import evaluation
from sae_jax.checkpoint import FOLDER
from sae_jax.config import to_json
from sae_jax.evals import METRICS, SUITES, EvaluateConfig
from sae_jax.evals.identity import identify
from synthetic import make_config

SMALL = EvaluateConfig(rows=336, batch_rows=4 * T, sequences=8, batch_sequences=4)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder, and what was asked for: loads, then metrics that were computed."""
    subject = planted.make_subject()
    planted.write_store(tmp_path / "store", subject)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(to_json(make_config(tmp_path / "store")))
    (run_dir / "metrics.jsonl").write_text('{"rows": 1, "nmse": 0.5}\n')
    sae, asked = planted.make_sae(planted.random_params()), []
    monkeypatch.setattr(evaluation, "load", lambda *args: asked.append(args) or sae)
    monkeypatch.setattr(evaluation, "locate", lambda path: (run_dir, 7))
    monkeypatch.setattr(evaluation, "load_subject", lambda name: subject)
    for name, metric in METRICS.items():
        monkeypatch.setattr(metric, "compute", _recording(name, metric.compute, asked))
    return run_dir, asked


def _recording(name, compute, asked):
    return lambda *args: asked.append(name) or compute(*args)


def _evaluate(run_dir, **settings):
    settings = {"subject": "mine", "config": SMALL, "progress": False} | settings
    return evaluation.evaluate_run(run_dir, **settings)


def test_it_leaves_both_files(run):
    run_dir, asked = run
    results = _evaluate(run_dir, weights="raw")
    path, mesh, weights = asked[0]
    assert (path, weights) == (run_dir / FOLDER / "7", "raw")
    assert mesh.shape == {"data": 1, "latent": 8}
    assert json.loads((run_dir / "evaluation.json").read_text()) == results
    assert (results["weights"], results["step"]) == ("raw", 7)
    assert list(results["metrics"]) == list(SUITES["core"])
    assert "latent " in (run_dir / "report.html").read_text(encoding="utf-8")
    (run_dir / "report.html").unlink()
    _evaluate(run_dir, weights="raw", report=False)
    assert not (run_dir / "report.html").exists()


def test_only_averaged_weights_are_compared_with_raw_ones(run):
    run_dir, asked = run
    averaged = _evaluate(run_dir, report=False)["metrics"]["averaging"]
    gain = averaged["averaging_gain"]
    assert gain["value"] == gain["ci95"] == 0  # one SAE stands in for both
    assert [args[2] for args in asked[:2]] == ["ema", "raw"]
    assert _evaluate(run_dir, weights="raw", report=False)["metrics"]["averaging"] == {}


def test_a_stopped_evaluation_goes_on(run, monkeypatch):
    run_dir, asked = run

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(METRICS["density"], "compute", stop)
        with pytest.raises(KeyboardInterrupt):
            _evaluate(run_dir)
    done = [name for name in asked if name in METRICS]
    assert done == ["reconstruction", "averaging"]
    kept = json.loads((run_dir / "evaluation.json").read_text())["metrics"]
    asked.clear()
    results = _evaluate(run_dir)
    assert [name for name in asked if name in METRICS] == ["density", "downstream"]
    assert {name: results["metrics"][name] for name in kept} == kept


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"weights": "raw"}, {"fresh": True}],
)
def test_nothing_is_taken_over_from_an_evaluation_that_differs(run, change, capsys):
    run_dir, asked = run
    _evaluate(run_dir, report=False)
    kept = (run_dir / "evaluation.json").read_text()
    asked.clear()
    _evaluate(run_dir, report=False)
    assert not set(asked) & set(METRICS)
    _evaluate(run_dir, report=False, **change)
    assert [name for name in asked if name in METRICS] == list(SUITES["core"])
    if "fresh" not in change:  # and nothing is lost
        assert (run_dir / "evaluation.json.old").read_text() == kept
        told = capsys.readouterr().err
        assert "was of another" in told and [*change][0] in told


def test_metrics_are_taken_over_that_do_not_read_what_has_changed(run):
    run_dir, asked = run
    _evaluate(run_dir, report=False)
    asked.clear()
    results = _evaluate(
        run_dir, config=dataclasses.replace(SMALL, rows=100), report=False
    )
    measured = ["reconstruction", "averaging", "density"]
    assert [name for name in asked if name in METRICS] == measured
    assert list(results["metrics"]) == list(SUITES["core"])
    assert results["settings"]["density"] == {"rows": 100}


@pytest.mark.parametrize("other", ["run", "step", "weights"])
def test_nothing_is_taken_over_from_another_sae(run, monkeypatch, tmp_path, other):
    run_dir, asked = run
    _evaluate(run_dir, report=False)
    if other == "run":
        elsewhere = make_config(tmp_path / "store", seed=1)
        (run_dir / "config.json").write_text(to_json(elsewhere))
    elif other == "step":
        monkeypatch.setattr(evaluation, "locate", lambda path: (run_dir, 8))
    else:
        params = planted.random_params()
        params["b_dec_d"][0] += 1e-3
        sae = planted.make_sae(params)
        monkeypatch.setattr(evaluation, "load", lambda *_: sae)
    asked.clear()
    _evaluate(run_dir, report=False)
    assert [name for name in asked if name in METRICS] == list(SUITES["core"])


def test_an_identity_is_that_of_the_weights_on_every_mesh():
    params = planted.random_params()
    one, two, many = (
        identify(planted.make_sae(params, mesh_shape=shape))
        for shape in (None, (1, 8), (2, 4))
    )
    assert one == two == many
    swapped = params | {"w_enc_ld": params["w_enc_ld"][[1, 0, *range(2, planted.L)]]}
    assert identify(planted.make_sae(swapped)) != one
    assert identify(planted.make_sae(params, kind="layer_norm")) != one


def test_the_seed_draws_what_the_report_shows(run, monkeypatch):
    seeds = []

    def show(*_, seed=0, **settings):
        seeds.append(seed)
        return []

    monkeypatch.setattr(evaluation, "top_contexts", show)
    _evaluate(run[0], seed=3)
    assert seeds == [3]


def test_a_changed_file_is_measured_again(run, tmp_path, monkeypatch):
    run_dir, asked = run
    family = tmp_path / "family.csv"
    config = dataclasses.replace(SMALL, family=str(family))
    for name in set(METRICS) - {"equivalent_compute"}:
        monkeypatch.setattr(METRICS[name], "compute", lambda *_: {})
    for last_loss in (3.0, 2.5):
        family.write_text(f"compute,loss\n1,5\n2,4\n4,{last_loss}\n")
        asked.clear()
        _evaluate(run_dir, config=config, report=False, suite="paper")
        assert asked.count("equivalent_compute") == 1


def test_a_file_that_is_wrong_is_refused_before_anything_is_measured(run, tmp_path):
    run_dir, asked = run
    wrong = tmp_path / "wrong"
    wrong.write_text("no such thing")
    for name in ("family", "tasks", "directions"):
        with pytest.raises(ValueError, match="wrong"):
            _evaluate(run_dir, config=EvaluateConfig(**{name: str(wrong)}))
    with pytest.raises(FileNotFoundError, match="wrong: neither a run folder"):
        _evaluate(run_dir, config=EvaluateConfig(against=str(wrong)))
    assert not set(asked) & set(METRICS)


@pytest.mark.parametrize(
    "asked, match",
    [
        ({"rows": 500}, "rows = 500: .* has 336 held-out rows: ask for no more"),
        ({"sequences": 22}, "sequences = 22: .* has 21 held-out contexts"),
        ({"explanation_rows": 337}, "explanation_rows = 337"),
        ({"ablation_horizon": T + 1}, f"ablation_horizon = {T + 1}: .* {T} tokens"),
        ({"task_rows": 8}, "task_rows = 8: .* at least 16"),
    ],
)
def test_more_than_there_is_is_refused_at_once(run, asked, match):
    run_dir, computed = run
    with pytest.raises(ValueError, match=match):
        _evaluate(run_dir, config=EvaluateConfig(**asked), suite="all")
    assert not set(computed) & set(METRICS)


def test_of_a_checkpoint_the_results_have_their_own_folder(run):
    run_dir, _ = run
    _evaluate(run_dir / FOLDER / "7", report=False)
    assert (run_dir / "evaluations" / "7" / "evaluation.json").exists()
    _evaluate(run_dir, report=False, out=run_dir / "elsewhere")
    assert (run_dir / "elsewhere" / "evaluation.json").exists()
    assert not (run_dir / "evaluation.json").exists()


def test_a_store_that_is_not_where_the_config_says_may_be_named(run):
    run_dir, _ = run
    (run_dir / "config.json").write_text(to_json(make_config("elsewhere/store")))
    with pytest.raises(FileNotFoundError, match="elsewhere/store.* with --store"):
        _evaluate(run_dir)


@pytest.mark.parametrize("store, trained", [("", "without a"), ("a,b", "on several")])
def test_one_store_must_be_named(run, store, trained):
    run_dir, _ = run
    config = make_config("a")
    data = dataclasses.replace(config.data, store=store)
    config = dataclasses.replace(config, data=data)
    (run_dir / "config.json").write_text(to_json(config))
    with pytest.raises(ValueError, match=f"was trained {trained} store.* --store"):
        _evaluate(run_dir)


def test_documents_that_were_trained_on_are_not_held_out(run):
    run_dir, _ = run
    for heldout_every, is_refused in ((5, False), (10, True), (4, True)):
        config = make_config(run_dir.parent / "store")
        data = dataclasses.replace(config.data, heldout_every=heldout_every)
        config = dataclasses.replace(config, data=data)
        (run_dir / "config.json").write_text(to_json(config))
        told = f"trained on all but one in {heldout_every}, .* --heldout_every="
        with contextlib.ExitStack() as stack:
            if is_refused:
                stack.enter_context(pytest.raises(ValueError, match=told))
            _evaluate(run_dir)


def test_a_subject_that_is_not_in_the_package_must_be_named(run):
    with pytest.raises(ValueError, match="subject 'planted', .* with --subject"):
        _evaluate(run[0], subject=None)
