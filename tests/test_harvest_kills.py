"""Harvests whose processes are killed with SIGKILL, and go on."""

import collections
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import slow_harvest
from numbered_stores import read_folder

PATHS = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def start(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=PATHS)


def run_slowly(path, kill_after=None):
    """Where it was killed, so many seconds after it first told where it is; None if it
    came to its end before. And how long it ran since."""
    with start(slow_harvest.__file__, str(path)) as process:
        first = process.stdout.readline()  # nothing, if the store is complete
        begun = time.monotonic()
        try:
            process.wait(kill_after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        told = (first + process.stdout.read()).split()
    secs = time.monotonic() - begun
    if process.returncode == 0:
        return None, secs
    assert process.returncode == -signal.SIGKILL
    return told[-1].decode(), secs


# Ten kills, and more until one was in each phase. Where the harvest ends before it is
# killed, the next begins anew.
@pytest.mark.parametrize(
    "n_kills, phases",
    [
        (2, ()),
        pytest.param(
            10,
            tuple(slow_harvest.SECS),
            marks=[pytest.mark.slow, pytest.mark.timeout(1800)],
        ),
    ],
    ids=["twice", "ten times"],
)
def test_killed_at_random_moments(tmp_path, n_kills, phases, record_property):
    """Uniform over the time of a harvest; each goes on from where the last was."""
    killed, path = collections.Counter(), tmp_path / "store"
    _, secs = run_slowly(tmp_path / "undisturbed")
    expected = read_folder(tmp_path / "undisturbed")
    rng = np.random.default_rng(0)
    while killed.total() < n_kills or not set(phases) <= set(killed):
        phase, _ = run_slowly(path, rng.uniform(0, secs))
        if phase is not None:
            killed[phase] += 1
            continue
        assert read_folder(path) == expected
        shutil.rmtree(path)
    run_slowly(path)
    assert read_folder(path) == expected
    print(f"killed in {dict(killed)}")
    record_property("killed", dict(killed))


_HARVEST = "from sae_jax.cli import run; run()"
# Stays where a shard's arrays are being written.
_STUCK = f"""
import time
from sae_jax.store import StoreWriter
write_shard = StoreWriter.write_shard

def stick(writer, index, *arguments):
    write_shard(writer, index, *arguments)
    if index == 5:
        print("stuck", flush=True)
        time.sleep(1000)

StoreWriter.write_shard = stick
{_HARVEST}
"""


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_started_again(tmp_path):
    text = Path(__file__).parent.parent / "sae_jax"
    settings = "--max_rows=4000 --context_length=32 --rows_per_shard=256"
    settings += " --rows_per_chunk=32 --site=resid_post.1 --site=mlp_out.0"

    def harvest(code, out, *part):
        arguments = ["harvest", f"--text={text}", f"--out={tmp_path / out}"]
        return start("-c", code, *arguments, *settings.split(), *part)

    parts = [[f"--process={p}", "--n_processes=2"] for p in (0, 1)]
    with harvest(_STUCK, "shared", *parts[1]) as second:
        with harvest(_HARVEST, "shared", *parts[0]) as first:
            assert second.stdout.readline() == b"stuck\n"
            second.send_signal(signal.SIGKILL)
    assert first.returncode == 0
    shards = sorted(int(file.name) for file in tmp_path.glob("shared/shards/*"))
    assert 3 in shards and not {5, 7} & set(shards)  # of those of the second
    with harvest(_HARVEST, "shared", *parts[1]) as second:
        assert b"harvested: " in second.stdout.read()
    with harvest(_HARVEST, "alone") as alone:
        alone.wait()
    assert read_folder(tmp_path / "shared") == read_folder(tmp_path / "alone")
