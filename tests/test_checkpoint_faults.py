"""Checkpoints under faults: kills while they are written, no room, no rights, and runs
that go on elsewhere than they began."""

import contextlib
import dataclasses
import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pods
import pytest
import synthetic
from pods import leaves, read_metrics, read_state
from test_checkpoint import flip_bit

from sae_jax import loop, run, state
from sae_jax.checkpoint import Checkpoints
from sae_jax.config import MeshConfig, SaeConfig
from sae_jax.mesh import make_mesh
from sae_jax.store import open_store

ONE = MeshConfig(1, 1)
OFTEN = ("--peer_timeout_secs=5", "--config.mesh.data=2")
EVERY = 2  # steps
SAVES = (
    *OFTEN,
    f"--config.checkpoint_every_steps={EVERY}",
    "--config.sae.n_latents=4096",  # some megabytes
    "--config.mesh.latent=1",
)
# `sae-jax` on a disk that has no room for a file of so many bytes.
LIMITED = """
import resource, signal, sys
limit = int(sys.argv.pop(1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from sae_jax.cli import run
run()
"""
# The most that is held while an SAE is loaded, and the bytes of its parameters.
LOADING = """
import sys
import jax
from sae_jax import run

def read(name):
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith(name))
    return int(line.split()[1]) * 1024

run.load(f"{sys.argv[1]}/small", weights=sys.argv[2])
before = read("VmRSS")
sae = run.load(f"{sys.argv[1]}/large", weights=sys.argv[2])
weights, _ = sae.weights()
jax.block_until_ready(weights)
print(read("VmHWM") - before, sum(weight.nbytes for weight in weights.values()))
"""


def train(store, workdir, shape, n_steps):
    config = synthetic.make_config(
        store, mesh=MeshConfig(*shape), rows=n_steps * 64, checkpoint_every_steps=100
    )
    loop.train(config, workdir)


@pytest.fixture(scope="module")
def saved(planted_store, tmp_path_factory):
    """The folder of a run of two processes, (2, 4), of 24 steps."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    with pods.Pod(workdir, planted_store, 2, 4, *OFTEN) as pod:
        assert pod.wait() == [0, 0], pod.tell(0)
    return workdir


@pytest.fixture(scope="module")
def sizes(planted_store, tmp_path_factory):
    """Run folders of an SAE of 16 KiB and one of 256 MiB, saved from four devices."""
    mesh, path = make_mesh(MeshConfig(1, 4)), tmp_path_factory.mktemp("sizes")
    setup = synthetic.make_setup(
        synthetic.make_config(), mesh, open_store(planted_store)
    )
    for name, n_latents, d_model in (("small", 128, 16), ("large", 2**15, 2**10)):
        sae = dataclasses.replace(
            setup.config.sae, n_latents=n_latents, d_model=d_model
        )
        config = dataclasses.replace(setup.config, sae=sae)
        setup = dataclasses.replace(setup, config=config)
        sample_bd = np.random.default_rng(0).normal(size=(64, d_model))
        made = state.create(setup, sample_bd.astype(np.float32))
        checkpoints = Checkpoints(path / name)
        checkpoints.save(1, made, setup)
        checkpoints.close()
    return path


@pytest.fixture(scope="module")
def continued(saved, planted_store, tmp_path_factory):
    """The metrics of its next 100 steps, on the same mesh in one process."""
    workdir = tmp_path_factory.mktemp("continued") / "run"
    shutil.copytree(saved, workdir)
    train(planted_store, workdir, (2, 4), 124)
    return read_metrics(workdir)


@pytest.mark.parametrize("shape", [(1, 8), (4, 1), (1, 1)])
def test_a_run_goes_on_on_another_mesh(
    shape, saved, continued, planted_store, tmp_path
):
    shutil.copytree(saved, tmp_path / "run")
    train(planted_store, tmp_path / "run", shape, 124)
    assert_alike(read_metrics(tmp_path / "run"), continued)


def test_a_run_goes_on_in_more_processes(saved, continued, planted_store, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(saved, workdir)
    mesh = ("--config.mesh.data=4", "--config.mesh.latent=1")
    with pods.Pod(workdir, planted_store, 4, 1, *mesh, rows=124 * 64) as pod:
        assert pod.wait() == [0] * 4, pod.tell(0)
    assert_alike(read_metrics(workdir), continued)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "n_kills, n_steps", [(2, 20), pytest.param(20, 60, marks=pytest.mark.slow)]
)
def test_kills_while_saving_lose_and_mix_nothing(
    n_kills, n_steps, planted_store, tmp_path
):
    workdir, whole, rng = tmp_path / "run", tmp_path / "whole", random.Random(n_kills)

    def start(workdir, kept):
        saves = (*SAVES, f"--config.checkpoints_kept={kept}")
        return pods.Pod(workdir, planted_store, 2, 1, *saves, rows=n_steps * 64)

    with start(whole, n_steps) as pod:
        assert pod.wait() == [0, 0], pod.tell(0)
    assert find_steps(whole) == list(range(EVERY, n_steps + 1, EVERY))
    torn = last = n_done = 0
    while n_done < n_kills or not torn:  # a kill may come when all is written
        stale = find_unfinished(workdir)
        with start(workdir, 1 + n_done % 2) as pod:  # older steps are deleted meanwhile
            wait_for_save(pod, stale, rng)
            victims = [0, 1] if n_done % 2 else [rng.randrange(2)]
            for victim in victims:
                pod.send(victim, signal.SIGKILL)
            codes = pod.wait()
            told = pod.tell(0) + pod.tell(1)
            assert set(codes) <= {-signal.SIGKILL, 76}, (codes, told)
        torn += bool(find_unfinished(workdir))
        steps = find_steps(workdir)
        for step in [step for step in steps if step > last]:
            assert_same(read_all(workdir, step), read_all(whole, step))
        assert max(steps, default=0) >= last
        last = max(steps, default=0)
        n_done += 1
    with start(workdir, 1) as pod:
        assert pod.wait() == [0, 0], pod.tell(0)
    assert find_steps(workdir) == [n_steps]
    assert_same(read_all(workdir, n_steps), read_all(whole, n_steps))
    assert not find_unfinished(workdir)


def wait_for_save(pod, stale, rng):
    """Until a checkpoint is being written, and a moment more."""
    end = time.monotonic() + 280
    while not find_unfinished(pod.workdir) - stale:
        assert time.monotonic() < end, pod.tell(0)
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.03))


def find_unfinished(workdir):
    """Checkpoints that are being written, or were when they were torn."""
    paths = (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")
    found = set()
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def test_a_disk_that_fills_up_loses_nothing(planted_store, tmp_path, monkeypatch):
    config = synthetic.make_config(planted_store, mesh=ONE)
    make = os.mkdir

    def refuse(path, *arguments, **named):
        if "16.orbax" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return make(path, *arguments, **named)

    with monkeypatch.context() as full:
        full.setattr(os, "mkdir", refuse)
        with pytest.raises(OSError, match="make room, and run the same") as caught:
            loop.train(config, tmp_path / "run")
    assert str(caught.value).endswith("it goes on from step 8, which is whole")
    assert "\n" not in str(caught.value)
    loop.train(config, tmp_path / "run")
    loop.train(config, tmp_path / "other")
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "other")


@pytest.mark.parametrize(
    "what, message",
    [
        ("checkpoints", "checkpoints: a checkpoint could not be .*from step 8, which"),
        ("metrics", "metrics.jsonl could not be written .*the last whole checkpoint"),
    ],
)
def test_a_disk_that_is_really_full(what, message, planted_store, tmp_path):
    config = synthetic.make_config(planted_store, mesh=ONE)
    config = dataclasses.replace(config, sae=SaeConfig(n_latents=256, k=3, k_aux=8))
    workdir = tmp_path / "run"
    loop.train(dataclasses.replace(config, rows=8 * 64), workdir)
    pods.write_config(tmp_path / "config.py", config)
    metrics = (workdir / "metrics.jsonl").stat().st_size
    # No matrix can be written, not even alone, as Orbax does with some; all else can.
    matrix = 4 * 256 * synthetic.D_MODEL
    limit = {"checkpoints": matrix - 1, "metrics": metrics + 100}[what]
    command = ["train", f"--config={tmp_path / 'config.py'}", f"--workdir={workdir}"]
    child = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *command],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    *others, last = child.stderr.splitlines()
    assert child.returncode == 1 and len(others) < 40, child.stderr
    assert re.match(f"sae-jax train: {workdir}/{message}", last), child.stderr
    assert "(the disk is full): make room, and run the same command again; " in last
    state = loop.train(config, workdir)
    expected = loop.train(config, tmp_path / "other")
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((state, expected)))
    assert read_metrics(workdir) == read_metrics(tmp_path / "other")


def test_a_damaged_step_is_refused_until_it_is_deleted(planted_store, tmp_path):
    config = synthetic.make_config(planted_store, mesh=ONE, checkpoints_kept=2)
    state = jax.device_get(loop.train(config, tmp_path / "run"))
    step = tmp_path / "run" / "checkpoints" / "24"
    flip_bit(step, "optimizer", state.optimizer.nu["w_dec_ld"][0])
    with pytest.raises(ValueError, match=f"delete {step} to go on from step 16"):
        loop.train(config, tmp_path / "run")
    shutil.rmtree(step)
    assert_same(jax.device_get(loop.train(config, tmp_path / "run")), state)


def test_a_folder_without_rights_is_told_before_training(planted_store, tmp_path):
    config = synthetic.make_config(planted_store, mesh=ONE)
    (tmp_path / "run").mkdir()
    # Not even an administrator makes files there.
    (tmp_path / "run" / "checkpoints").symlink_to("/sys/kernel")
    with pytest.raises(OSError, match="checkpoints': .*get the right to write there"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("weights, item", [("ema", "ema"), ("raw", "params")])
def test_inference_reads_one_item_alone(weights, item, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    expected = run.load(saved, weights=weights).w_dec_ld[...]
    for path in (tmp_path / "run" / "checkpoints" / "24").iterdir():
        if path.is_dir() and path.name not in (item, "meta"):
            shutil.rmtree(path)
    found = run.load(tmp_path / "run", weights=weights).w_dec_ld[...]
    np.testing.assert_array_equal(found, expected)
    assert found.devices() == {jax.devices()[0]}


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_loading_holds_little_more_than_the_parameters(weights, sizes):
    """On a CPU Orbax's copy on the host lies beside that of the device: of both large
    matrices at once, or of one after the other, as its threads run. Compiling takes
    some tens of MiB; a third copy of a matrix would take 128."""
    child = subprocess.run(
        [sys.executable, "-c", LOADING, str(sizes), weights],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    held, size = map(int, child.stdout.split())
    assert size > 256 * 2**20
    assert held <= 2 * size + 96 * 2**20, held / size


def find_steps(workdir):
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def read_all(workdir, step):
    state = read_state(workdir, step)
    return {name: leaves(state, name) for name in state._fields}


def assert_same(state, expected):
    jax.tree.map(np.testing.assert_array_equal, state, expected)


def assert_alike(rows, expected):
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for name in ("loss", "nmse", "aux_loss"):
        np.testing.assert_allclose(
            [row[name] for row in rows], [row[name] for row in expected], rtol=1e-5
        )
