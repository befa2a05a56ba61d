"""Every benchmark runs at a tiny shape, and its last line is one JSON object."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHAPE = ("--rows=32", "--d_model=16", "--latents=256", "--k=4", "--repeats=1")


def _run(name, *flags):
    result = subprocess.run(
        [sys.executable, f"experiments/{name}.py", *SHAPE, *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    *table, last = result.stdout.splitlines()
    report = json.loads(last)
    assert report["command"].startswith(f"python experiments/{name}.py --rows=32")
    assert len(table) == 2 + len(report["results"])  # below a header and a rule
    return report["results"]


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
    flags = ("--store_gb=0.1", "--read_gb=0.2", "--batch_rows=256", "--rounds=1")
    result = subprocess.run(
        [sys.executable, "experiments/bench_loader.py", f"--folder={tmp_path}", *flags],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert [r["reader"] for r in report["results"]] == ["raw", "loader", "rows"]
    assert report["results"][1]["gb"] >= 0.2
    assert report["over_rows"] > 10
