"""Every benchmark runs at a tiny shape, and its last line is one JSON object."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHAPE = ("--rows=32", "--d_model=16", "--latents=256", "--k=4", "--repeats=1")


def _run(name, *flags):
    report, table = _run_plain(name, *SHAPE, *flags)
    assert len(table) == 2 + len(report["results"])  # below a header and a rule
    return report["results"]


def _run_plain(name, *flags):
    """The JSON object, and the lines before it."""
    result = subprocess.run(
        [sys.executable, f"experiments/{name}.py", *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    *table, last = result.stdout.splitlines()
    report = json.loads(last)
    assert report["command"].startswith(f"python experiments/{name}.py {flags[0]}")
    return report, table


def test_choices_are_timed_and_their_recall_is_measured():
    results = {result["selection"]: result for result in _run("bench_topk")}
    assert results.keys() == {"sort", "exact", "bucketed", "approx"}
    assert all(result["over_matmul"] > 0 for result in results.values())
    assert results["exact"]["recall"] == 1


@pytest.mark.slow
def test_steps_are_timed_in_parts():
    results = _run("bench_step")
    assert len(results) == 2 + 4
    for result in results[2:]:
        parts = ("select", "decode_and_gradients", "optimizer")
        total = sum(result[part] for part in parts)
        assert total == pytest.approx(result["seconds"])


@pytest.mark.slow
def test_memory_is_measured_where_a_step_is_run():
    compiled, run = _run("bench_memory", "--latents=512,256", "--run_up_to=256")
    assert compiled["added"] is None
    assert 0 <= run["added"] < run["peak"]


@pytest.mark.slow
def test_no_more_moves_than_is_allowed():
    results = _run("bench_traffic")
    assert {result["mesh"] for result in results} == {"1x8", "2x4", "8x1"}
    limited = [result for result in results if result["allowed"] is not None]
    assert all(result["bytes"] <= result["allowed"] for result in limited)
    assert all(result["bytes"] for result in limited if result["allowed"])


@pytest.mark.slow
def test_peers_that_cannot_be_run_are_reported(tmp_path):
    make_venv = [sys.executable, "-m", "venv", "--without-pip", tmp_path]
    subprocess.run(make_venv, check=True)
    results = _run("bench_peers", f"--venv={tmp_path}")
    ours = [result for result in results if "sae_jax" in result["contender"]]
    assert all(result["seconds"] > 0 for result in ours)
    peers = [result for result in results if result not in ours]
    assert all("No module named" in result["failed"] for result in peers)


@pytest.mark.slow
def test_the_loader_is_timed_beside_raw_reads(tmp_path):
    report, _ = _run_plain(
        "bench_loader",
        f"--folder={tmp_path}",
        "--store_gb=0.1",
        "--read_gb=0.2",
        "--batch_rows=256",
        "--rounds=2",
    )
    results = report["results"]
    assert [r["reader"] for r in results] == ["raw", "loader", "rows"] * 2
    assert results[1]["gb"] >= 0.2
    assert report["over_rows"] > 10
    rates = [r["gb_per_second"] for r in results if r["reader"] == "loader"]
    assert report["loader"] == pytest.approx(sum(rates) / 2)
    assert report["loader_least"] == min(rates)


@pytest.mark.slow
def test_a_harvest_is_timed_beside_the_bare_subject():
    report, table = _run_plain("bench_harvest", "--rows=2048", "--rounds=1")
    assert len(table) == 2 + 1
    names = ("pack", "bfloat16", "int8", "bare")
    rounds = report["all"]
    assert [len(rounds[name]) for name in names] == [2, 1, 1, 1]
    assert all(report[name] == statistics.median(rounds[name]) > 0 for name in names)
    assert report["int8_of_bare"] == report["int8"] / report["bare"]
    assert 0 < report["int8_nmse"] < 1e-3
