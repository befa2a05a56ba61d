"""Several processes on one mesh: the same run, and nobody waits for ever."""

import errno
import signal
import socket
import time
import types

import jax
import numpy as np
import pods
import pytest
import synthetic
import test_stream
from jax.errors import JaxRuntimeError

from sae_jax import files, loop, processes, run
from sae_jax.config import Cluster, MeshConfig
from sae_jax.exits import FAILED, PEER_LOST, PREEMPTED, PeerLost
from sae_jax.store import open_store

text_file = test_stream.text_file

QUICK = ("--peer_timeout_secs=5", "--config.mesh.data=2")
# Process 0 has more to do at the end than another may be silent for.
LATE = """
import time
from sae_jax import processes
from sae_jax.mirror import Mirror
leave = Mirror.__exit__
def leave_late(*arguments):
    if processes.is_first():
        time.sleep(9)
    leave(*arguments)
Mirror.__exit__ = leave_late
"""
BROKEN = """
import jax, sys
if "--process=1" in sys.argv:
    from sae_jax import processes
    meet = processes._meet_all
    def break_after(cluster):
        meet(cluster)
        jax.config.update("jax_platforms", "none_such")
    processes._meet_all = break_after
"""


@pytest.fixture(scope="module")
def alone(planted_store, tmp_path_factory):
    """The metrics of the run in one process, by the shape of its mesh."""
    found = {}

    def run(shape):
        if shape not in found:
            workdir = tmp_path_factory.mktemp("alone") / "run"
            config = synthetic.make_config(planted_store, mesh=MeshConfig(*shape))
            loop.train(config, workdir)
            found[shape] = pods.read_metrics(workdir)
        return found[shape]

    return run


@pytest.fixture(scope="module")
def pair(planted_store, tmp_path_factory):
    """A whole run of two processes, (2, 4)."""
    workdir = tmp_path_factory.mktemp("pair") / "run"
    with pods.Pod(workdir, planted_store, 2, 4, *QUICK) as pod:
        assert pod.wait() == [0, 0], pod.tell(0) + pod.tell(1)
        yield pod


def test_two_processes_train_as_one_does(pair, alone):
    assert_close(pods.read_metrics(pair.workdir), alone((2, 4)))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("n_processes, shape", [(2, (2, 4)), (4, (1, 8))])
def test_long_runs_of_several_processes_end_as_one_does(
    n_processes, shape, planted_store, tmp_path
):
    """Their first 100 steps are alike; then choosing, which jumps, takes them apart."""
    rows, n_each = 400 * 64, 8 // n_processes
    config = synthetic.make_config(
        planted_store, mesh=MeshConfig(*shape), rows=rows, checkpoint_every_steps=200
    )
    loop.train(config, tmp_path / "alone")
    flags = (f"--config.mesh.data={shape[0]}", "--config.checkpoint_every_steps=200")
    with pods.Pod(
        tmp_path / "run", planted_store, n_processes, n_each, *flags, rows=rows
    ) as pod:
        assert pod.wait() == [0] * n_processes, pod.tell(0)
    folders = tmp_path / "run", tmp_path / "alone"
    several, alone = (pods.read_metrics(folder)[:100] for folder in folders)
    assert_close(several, alone, 100)
    store = open_store(planted_store)
    saes = [run.load(folder, weights="raw") for folder in folders]
    ends = [synthetic.heldout_nmse(store, sae) for sae in saes]
    assert ends[0] == pytest.approx(ends[1], rel=5e-3)


def test_process_0_alone_writes_and_tells(pair):
    assert "train: topk, 128 latents" in pair.tell(0) and "trained:" in pair.tell(0)
    assert "train:" not in pair.tell(1) and "trained" not in pair.tell(1)


def test_the_latent_axis_may_cross_processes(planted_store, tmp_path, alone):
    with pods.Pod(tmp_path / "run", planted_store, 4, 2, "--config.mesh.data=1") as pod:
        assert pod.wait() == [0] * 4, pod.tell(0)
    assert_close(pods.read_metrics(tmp_path / "run"), alone((1, 8)))


def test_a_stream_is_the_same_rows_in_two_processes(text_file, tmp_path):
    config = test_stream.make_config(text_file, mesh=MeshConfig(2, 2))
    loop.train(config, tmp_path / "alone")
    module = dict(module="test_stream", rows=config.rows)
    workdir = tmp_path / "run"
    with pods.Pod(workdir, text_file, 2, 2, *QUICK, **module) as pod:
        assert pod.wait() == [0, 0], pod.tell(0) + pod.tell(1)
    assert_close(pods.read_metrics(workdir), pods.read_metrics(tmp_path / "alone"), 10)


def test_a_killed_process_ends_the_others_and_is_named(planted_store, tmp_path):
    """That the run goes on to the same bits: tests/test_launch_run.py."""
    with pods.Pod(tmp_path / "run", planted_store, 2, 1, *QUICK, rows=9999 * 64) as pod:
        pod.wait_for_step(3)
        pod.send(1, signal.SIGKILL)
        assert pod.wait() == [PEER_LOST, -signal.SIGKILL], pod.tell(0)
        assert "process 0: process 1 (" in pod.last_line(0), pod.tell(0)
        assert "it was killed, or its machine hangs" in pod.last_line(0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_loss_of_process_0_is_told(number, planted_store, tmp_path):
    with pods.Pod(tmp_path / "run", planted_store, 2, 1, *QUICK, rows=9999 * 64) as pod:
        pod.wait_for_step(3)
        pod.send(0, number)
        assert pod._processes[1].wait(60) == PEER_LOST
        assert "process 1: process 0, at 127.0.0.1:" in pod.last_line(1)
        assert "died or cannot be reached; run the same command" in pod.last_line(1)


def test_sigterm_to_one_saves_the_step_of_all(planted_store, tmp_path):
    workdir = tmp_path / "run"
    with pods.Pod(workdir, planted_store, 2, 1, *QUICK, rows=9999 * 64) as pod:
        pod.wait_for_step(3)
        pod.send(1, signal.SIGTERM)
        assert pod.wait() == [PREEMPTED, PREEMPTED], pod.tell(0) + pod.tell(1)
        assert "is saved: the same command goes on" in pod.last_line(0)
    step = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert f"stopped after step {step} of 9999" in pod.last_line(1)
    assert pods.read_metrics(workdir)[-1]["step"] == step


def test_one_may_end_long_after_another(planted_store, tmp_path):
    rows, workdir = 9999 * 64, tmp_path / "run"
    with pods.Pod(
        workdir, planted_store, 2, 1, *QUICK, rows=rows, code=LATE
    ) as pod:
        pod.wait_for_step(3)
        pod.send(0, signal.SIGTERM)
        assert pod.wait() == [PREEMPTED, PREEMPTED], pod.tell(0) + pod.tell(1)
        for i in range(2):
            assert "is saved: the same command goes on" in pod.last_line(i)


def test_one_without_devices_is_named_by_all(planted_store, tmp_path):
    with pods.Pod(
        tmp_path / "run", planted_store, 2, 1, *QUICK, code=BROKEN
    ) as pod:
        assert pod.wait() == [FAILED, FAILED], pod.tell(0) + pod.tell(1)
        for i in range(2):
            assert "process 1 cannot open its devices (" in pod.last_line(i)
            assert "none_such" in pod.last_line(i)
            assert "Traceback" not in pod.tell(i)


def test_a_port_that_is_taken_is_told(planted_store, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        own = (f"--coordinator={address}",)
        with pods.Pod(
            tmp_path / "run", planted_store, 1, 1, own_arguments=own
        ) as pod:
            assert pod.wait() == [PEER_LOST], pod.tell(0)
            assert f"process 0: the processes cannot meet at {address} (" in (
                pod.last_line(0)
            )
            assert "see that no other program has this port" in pod.last_line(0)


def test_processes_that_do_not_meet_are_told(planted_store, tmp_path):
    arguments = (*QUICK, "--start_timeout_secs=3")
    with pods.Pod(
        tmp_path / "run", planted_store, 2, 1, *arguments, missing=(1,)
    ) as pod:
        assert pod.wait() == [PEER_LOST]
        assert "not all processes met within 3 s: see that every" in pod.last_line(0)
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_ends_all(planted_store, tmp_path):
    with pods.Pod(
        tmp_path / "run",
        planted_store,
        2,
        1,
        *QUICK,
        own_arguments=("--config.seed=5",),
    ) as pod:
        assert pod.wait() == [1, 1], pod.tell(0)
        for i in range(2):
            assert "process 1 has another config than process 0" in pod.tell(i)


def test_a_folder_that_is_not_shared_is_told(planted_store, tmp_path):
    with pods.Pod(
        tmp_path / "run",
        planted_store,
        2,
        1,
        *QUICK,
        own_arguments=(f"--workdir={tmp_path / 'other'}",),
    ) as pod:
        assert pod.wait() == [1, 1], pod.tell(0)
        assert "give a folder that all processes share, or gs://" in pod.tell(1)


def test_a_folder_has_one_run(planted_store, tmp_path):
    (tmp_path / "run").mkdir()
    with (
        files.lock_folder(tmp_path / "run"),
        pods.Pod(tmp_path / "run", planted_store, 2, 1, *QUICK) as pod,
    ):
        assert pod.wait() == [1, 1], pod.tell(0)
        assert "in use by another process" in pod.last_line(0)
        assert "in use by another process" in pod.last_line(1)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(coordinator="a:1"), "give all three, or none"),
        (dict(coordinator="a", n_processes=2, process=0), "give HOST:PORT"),
        (dict(coordinator="a:1", n_processes=2, process=2), "the last 1"),
        (dict(peer_timeout_secs=0), "peer_timeout_secs = 0: must be above 0"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Cluster(**fields)


def test_without_a_cluster_nothing_is_started(planted_store, tmp_path):
    nobody = ("--nomultihost", "--multihost", "--coordinator=", "--process=0")
    with pods.Pod(
        tmp_path / "run", planted_store, 1, 1, own_arguments=nobody
    ) as pod:
        assert pod.wait() == [1]
        assert "give all three, or none of them to have them found" in pod.last_line(0)


@pytest.mark.parametrize(
    "error, cause, code, is_patient",
    [
        (ValueError("bad"), None, FAILED, False),
        (OSError("no checkpoint"), OSError("disk full"), FAILED, False),
        (OSError(errno.EHOSTUNREACH, "no bucket"), None, PEER_LOST, False),
        (OSError("no checkpoint"), JaxRuntimeError("UNAVAILABLE"), FAILED, True),
        (OSError("no checkpoint"), ValueError("UNKNOWN: Gloo"), FAILED, True),
        (ValueError("UNKNOWN: Gloo AllGather failed"), None, PEER_LOST, True),
        (JaxRuntimeError("Gloo: closed"), None, PEER_LOST, True),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: x"), None, FAILED, False),
    ],
)
def test_what_a_lost_peer_may_have_caused_waits_for_the_watch(
    error, cause, code, is_patient, monkeypatch
):
    """To name it. A save that fails is one that a peer does not finish, or a disk."""
    slept, left = [], []
    monkeypatch.setattr(time, "sleep", slept.append)
    watch = types.SimpleNamespace(beat_secs=1, leave=lambda *said: left.append(said))
    error.__cause__ = cause
    if code == PEER_LOST and is_patient:
        with pytest.raises(PeerLost, match="what all processes do together broke"):
            processes._leave(watch, error, 7)
    else:
        processes._leave(watch, error, 7)
    assert slept == [14] * is_patient and left == [(code, str(error))]


def test_what_jax_meets_with_where_processes_meet_is_told(monkeypatch):
    def fail(**settings):
        raise JaxRuntimeError("UNKNOWN: Failed to start RPC server\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    message = r"cannot meet at 10\.0\.0\.2:9 \(UNKNOWN: Failed .* server\): see that no"
    with pytest.raises(PeerLost, match=message):
        with processes.join(Cluster("10.0.0.2:9", 2, 1)):
            raise AssertionError


def test_processes_meet_before_any_device_is_asked_for():
    jax.devices()
    with pytest.raises(ValueError, match="before.*devices"):
        with processes.join(Cluster("127.0.0.1:1", 1, 0)):
            raise AssertionError


def assert_close(rows, expected, n_steps=24):
    assert len(rows) == len(expected) == n_steps
    for name in ("loss", "nmse", "aux_loss", "grad_norm"):
        np.testing.assert_allclose(
            [row[name] for row in rows], [row[name] for row in expected], rtol=1e-5
        )
