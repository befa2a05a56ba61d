"""The local launcher: processes that find each other, and start again when one dies."""

import os
import signal
import subprocess
import sys
import time

import pytest
from launching import LAUNCH, ROOT, Stage, calls_of, flag_of, train, wait_until
from s3_server import bucket, server  # noqa: F401

from sae_jax.store import folder

PAIR = "--n_processes=2"


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def test_processes_are_told_of_each_other(stage):
    workdir = stage.plan({})
    flags = ("--n_processes=3", "--env=A=b c")
    done = stage.run("local", *flags, *train(workdir, "--x= y"))
    assert (done.returncode, done.stderr) == (0, "")
    ports = set()
    for process in range(3):
        ((arguments, environment),) = calls_of(workdir, process)
        assert arguments[:3] == ["--config=c.py", f"--workdir={workdir}", "--x= y"]
        assert "--multihost" in arguments and environment["A"] == "b c"
        assert flag_of(arguments, "n_processes") == "3"
        assert flag_of(arguments, "process") == str(process)
        assert flag_of(arguments, "peer_timeout_secs") == "10"
        ports.add(flag_of(arguments, "coordinator"))
    assert len(ports) == 1 and ports.pop().startswith("127.0.0.1:")


def test_how_long_to_wait_for_a_peer_may_be_said(stage):
    workdir = stage.plan({})
    done = stage.run("local", PAIR, *train(workdir, "--peer_timeout_secs", "30"))
    assert (done.returncode, done.stderr) == (0, "")
    ((arguments, _),) = calls_of(workdir)
    assert "30" in arguments and "--peer_timeout_secs=10" not in arguments


def test_one_process_is_left_alone(stage):
    workdir = stage.plan({0: "say=hello"})
    done = stage.run("local", *train(workdir))
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\n", "")
    assert calls_of(workdir)[0][0] == ["--config=c.py", f"--workdir={workdir}"]


def test_lines_are_told_apart(stage):
    workdir = stage.plan({0: "say=step1|step2 say=end", 1: "say=hello"})
    done = stage.run("local", PAIR, *train(workdir))
    lines = done.stdout.splitlines()
    assert [line for line in lines if line[1] == "0"] == [
        "[0] step1",
        "[0] step2",
        "[0] end",
    ]
    assert "[1] hello" in lines


def test_lines_that_tell_nothing_are_left_out(stage):
    workdir = stage.plan({0: "say=[Gloo]_Rank_0_is_connected say=about_[Gloo]_Rank"})
    done = stage.run("local", PAIR, *train(workdir))
    assert done.stdout == "[0] about [Gloo] Rank\n"


@pytest.mark.parametrize("death", ["kill=9", "exit=75", "exit=137"])
def test_all_start_again_when_one_dies(stage, death):
    workdir = stage.plan({0: "after=1 checkpoint=7 exit=76", 1: death}, {})
    done = stage.run("local", PAIR, "--name=mine", *train(workdir))
    assert done.returncode == 0
    told = {
        "kill=9": "died of SIGKILL (137)",
        "exit=75": "was preempted (75)",
        "exit=137": "died of SIGKILL (137)",
    }[death]
    assert done.stderr == (
        f"mine: process 1 {told}; restarted from checkpoint 7, newly saved\n"
    )
    ports = [
        [flag_of(arguments, "coordinator") for arguments, _ in calls]
        for calls in (calls_of(workdir, 0), calls_of(workdir, 1))
    ]
    assert ports[0] == ports[1] and len(set(ports[0])) == 2  # one for each attempt


@pytest.mark.parametrize("status", [1, 2, 130])
def test_what_failed_is_not_started_again(stage, status):
    """Nor if another process died first."""
    workdir = stage.plan({0: "kill=9", 1: f"after=0 exit={status}"})
    done = stage.run("local", PAIR, *train(workdir))
    assert done.returncode == status
    told = {130: "was stopped by Ctrl-C (130)"}.get(
        status, f"ended with exit code {status}"
    )
    assert done.stderr == f"sae-jax: process 1 {told}; not started again\n"
    assert len(calls_of(workdir)) == 1


def test_restarts_without_progress_are_counted(stage):
    workdir = stage.plan(
        {0: "checkpoint=5 kill=9"}, {0: "checkpoint=6 kill=9"}, {0: "kill=11"}
    )
    done = stage.run("local", "--max_restarts=1", *train(workdir))
    assert done.returncode == 128 + signal.SIGSEGV
    first, second, third, last = done.stderr.splitlines()
    assert first.endswith("; restarted from checkpoint 5, newly saved")
    assert second.endswith("; restarted from checkpoint 6, newly saved")
    assert third.endswith("restart 1 of 1 without a new checkpoint, from checkpoint 6")
    assert last.endswith("SIGSEGV (139); given up: 1 restarts and no new checkpoint")


def test_no_restarts_are_none(stage):
    workdir = stage.plan({0: "checkpoint=5 kill=9"})
    done = stage.run("local", "--max_restarts=0", *train(workdir))
    assert done.returncode == 137
    assert done.stderr.endswith("SIGKILL (137); not restarted (--max_restarts=0)\n")
    assert len(calls_of(workdir)) == 1


def test_half_written_checkpoints_are_no_progress(stage):
    workdir = stage.plan({0: "checkpoint=5.orbax-checkpoint-tmp kill=9"}, {})
    done = stage.run("local", *train(workdir))
    assert done.stderr.endswith("from the beginning\n")


def test_preempted_ends_where_a_queue_restarts(stage):
    workdir = stage.plan({0: "exit=75", 1: "exit=76"})
    done = stage.run("local", PAIR, "--norestart_preempted", *train(workdir))
    assert done.returncode == 75
    assert "not started again" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_passed_on_once_and_the_save_awaited(stage, number):
    workdir = stage.plan({0: "wait", 1: "checkpoint=3 wait"})
    process = stage.start("local", PAIR, *train(workdir))
    wait_until(lambda: calls_of(workdir) and (workdir / "checkpoints").exists())
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 75
    assert err == "sae-jax: stopped; the same command goes on from checkpoint 3\n"
    for i in (0, 1):
        assert (workdir / f"terms-{i}").read_text() == "0\n"


@pytest.mark.parametrize("other, status", [("wait", 75), ("wait=1", 1)])
def test_a_stop_is_saved_if_no_process_failed(stage, other, status):
    """Whoever ends a moment after another has lost it."""
    workdir = stage.plan({0: "wait=76", 1: f"after=0 {other}"})
    process = stage.start("local", PAIR, *train(workdir))
    wait_until(lambda: calls_of(workdir, 0) and calls_of(workdir, 1))
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == status


def test_a_second_signal_kills(stage):
    workdir = stage.plan({0: "hang"})
    process = stage.start("local", *train(workdir))
    wait_until(lambda: calls_of(workdir))
    process.terminate()
    wait_until((workdir / "terms-0").exists)
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 137
    assert "SIGKILL" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_between_attempts_starts_nothing(stage, number):
    workdir = stage.plan({0: "kill=9"})
    process = stage.start("local", *train(workdir))
    assert "restart 1 of 3" in process.stderr.readline()
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 75
    assert len(calls_of(workdir)) == 1


def test_those_that_are_deaf_to_a_stop_are_killed_after_the_grace(stage):
    workdir = stage.plan({0: "hang", 1: "hang"})
    behind = train(workdir, "--peer_timeout_secs=0.4")
    process = stage.start("local", PAIR, "--grace_secs=1", *behind)
    wait_until(lambda: calls_of(workdir, 0) and calls_of(workdir, 1))
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 137
    assert (workdir / "terms-0").exists() and "not started again" in err


def test_nohup_is_heeded(stage):
    workdir = stage.plan({0: "wait"})
    process = stage.start("local", *train(workdir), under=("nohup",))
    wait_until(lambda: calls_of(workdir))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 75


def test_those_that_do_not_notice_are_killed_after_the_grace(stage):
    """With all that they started, which else would hold the launcher's pipes."""
    workdir = stage.plan({0: "child hang", 1: "after=0 child kill=9"}, {})
    start = time.monotonic()
    behind = train(workdir, "--peer_timeout_secs=0.4")
    done = stage.run("local", PAIR, "--grace_secs=1", *behind)
    assert done.returncode == 0
    assert 2 < time.monotonic() - start < 20
    assert "process 1 died of SIGKILL" in done.stderr


def test_dry_run_only_prints(stage):
    workdir = stage.plan({})
    flags = (PAIR, "--dry_run", "--env=A=1")
    done = stage.run("local", *flags, *train(workdir, "--x=a b"))
    assert done.returncode == 0
    first, second = done.stdout.splitlines()
    assert first == (
        f"env A=1 {stage.bin}/sae-jax train --config=c.py --workdir={workdir} "
        "'--x=a b' --peer_timeout_secs=10 --multihost --coordinator=127.0.0.1:PORT "
        "--n_processes=2 --process=0"
    )
    assert second == first[:-1] + "1"
    assert not calls_of(workdir)


def test_none_is_left_where_one_cannot_be_started(tmp_path):
    code = """
import sys
from processes import Wish, run_together
run_together([["sh", "-c", "echo $$ >pid; sleep 600"], ["no-such"]], {}, 1, Wish())
"""
    done = run_code(code, cwd=tmp_path)
    assert "OSError: process 1 cannot be started: " in done.stderr
    if (tmp_path / "pid").exists():
        pid = (tmp_path / "pid").read_text().strip()
        assert not pid or not os.path.exists(f"/proc/{pid}")


def test_checkpoints_in_a_bucket_are_progress(bucket):  # noqa: F811
    files = folder.Folder(bucket)
    for name in ("7/0a/meta.json", "12/0a/meta.json", "12/0a/ema/c", "13/0a/ema/c"):
        files.write(f"checkpoints/{name}", b"")
    done = run_code(f"import local; print(local._newest_checkpoint({bucket!r}))")
    assert (done.stdout, done.stderr) == ("12\n", "")


def test_checkpoints_that_cannot_be_listed_are_neither_none_nor_new():
    """The listings of a run whose every attempt dies."""
    code = """
import local
from processes import End, Wish

listings = iter([["4"], OSError("no network"), ["4"], ValueError("HTTP 5"), ["9"], []])

def list_checkpoints(workdir):
    listing = next(listings)
    if isinstance(listing, Exception):
        raise listing
    return listing

local._list_checkpoints = list_checkpoints
attempts = iter([137, 137, 137, 137, 1])
local.run_together = lambda *_: [End(0, next(attempts))]
local._LONGEST_PAUSE_SECS = 0
local.settings.flags.FLAGS(["local"])
local._run(["x"], [], "w", Wish())
"""
    lines = [line.split("; ")[-1] for line in run_code(code).stderr.splitlines()]
    assert lines == [
        "sae-jax: its checkpoints cannot be listed: no network",
        "restart 1 of 3 without a new checkpoint, from the last checkpoint",
        "restart 2 of 3 without a new checkpoint, from checkpoint 4",
        "sae-jax: its checkpoints cannot be listed: HTTP 5",
        "restart 3 of 3 without a new checkpoint, from the last checkpoint",
        "restarted from checkpoint 9, newly saved",
        "not started again",
    ]


def run_code(code, cwd=None):
    """Python that imports the launchers' modules."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": f"{LAUNCH}:{ROOT}"},
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=60,
    )
