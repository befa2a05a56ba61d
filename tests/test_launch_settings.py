"""The launchers' settings: refused in one line, in --help, no secrets among them."""

import json
import os
import subprocess
import sys

import pytest
from launching import GKE, LAUNCH, ROOT, SLURM, Stage, train

from sae_jax import exits
from sae_jax.config import Cluster


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


POD = ("tpu_vm", "start", "--accelerator=v5p-16")
NO_CONFIG = ("--", "--workdir=gs://b/w", "--config.sae.k=4")
# Launcher and its arguments, exit code, and what the one line holds.
REFUSED = [
    (("local",), 2, "local.py: give --config=FILE of `sae-jax train` behind --"),
    (("local", "--n_processes=2"), 2, "give --config=FILE of `sae-jax train` behind"),
    (("local", *NO_CONFIG), 2, "give --config=FILE"),
    (("local", *NO_CONFIG, "--config="), 2, "give --config=FILE"),
    ((*SLURM, *NO_CONFIG), 2, "give --config=FILE"),
    ((*GKE, *NO_CONFIG), 2, "give --config=FILE"),
    ((*POD, *NO_CONFIG), 2, "give --config=FILE"),
    (("local", "--", "--config=c.py"), 2, "give --workdir=FOLDER behind --"),
    (
        ("local", "--grace_secs=20", "--n_processes=2", *train("w")),
        2,
        "--grace_secs=20 is not more than twice --peer_timeout_secs=10: ",
    ),
    *(
        (
            (*launch, *train("gs://b/w", "--peer_timeout_secs", "75")),
            2,
            "--grace_secs=150 is not more than twice --peer_timeout_secs=75: ",
        )
        for launch in (("local",), SLURM, GKE, POD)
    ),
    *(
        (
            (*launch, "--grace_secs=120", *train("gs://b/w")),
            2,
            "--grace_secs=120 is not more than twice --peer_timeout_secs=60: ",
        )
        for launch in (SLURM, GKE, POD)
    ),
    (
        ("local", "--grace_secs=120", *train("w", "--multihost")),
        2,
        "--grace_secs=120 is not more than twice --peer_timeout_secs=60: ",
    ),
    (
        ("local", *train("w", "--peer_timeout_secs=x")),
        2,
        "--peer_timeout_secs=x: give seconds",
    ),
    (("local", "--name=A", *train("w")), 2, "--name=A: give 1 to 40 lower-case"),
    (("local", "--env=A", *train("w")), 2, "--env=A: give --env=NAME=VALUE"),
    (("local", "--max_restart=1", *train("w")), 2, "Did you mean: max_restarts"),
    (("local", "--config=c.py"), 2, "'config'; flags of sae-jax train come behind --"),
    (("local", "--n_processes=0", *train("w")), 2, "--n_processes=0"),
    (("local", "run", *train("w")), 2, "unexpected 'run'"),
    (("local", "--program=no-such", *train("w")), 1, "no program 'no-such'"),
    (
        ("local", "--n_processes=2", *train("w", "--process=1")),
        2,
        "--process is set by the launcher",
    ),
    ((*SLURM, *train("w", "--multihost")), 2, "--multihost is set by the launcher"),
    ((*SLURM, "--time=soon", *train("w")), 2, "--time=soon: give minutes"),
    *(
        (
            (*SLURM, f"--time={limit}", *train("w")),
            2,
            f"--time={limit} is {secs} s, and not more than --grace_secs=150: ",
        )
        for limit, secs in [
            *(("2", 120), ("2:30", 150), ("0:02:30", 150), ("0-0:02", 120)),
            *(("0-0:02:30", 150), ("0:59", 59)),
        ]
    ),
    (
        (*SLURM, "--grace_secs=86400", "--time=0-24", *train("w")),
        2,
        "--time=0-24 is 86400 s, and not more than --grace_secs=86400: ",
    ),
    ((*SLURM, "--partition=a b", *train("w")), 2, "--partition=a b"),
    ((*GKE, *train("w")), 2, "--workdir=w would end with its pod: give gs://"),
    (("gke", "--accelerator=v5p-8", *train("gs://b/w")), 2, "give --image"),
    (("gke", *train("gs://b/w")), 2, "--accelerator=: give one of v4-N, v5litepod-N"),
    (("gke", "--accelerator=v5p-7", *train("gs://b/w")), 2, "is a power of two"),
    (("gke", "--accelerator=v6e-2", *train("gs://b/w")), 2, "is a power of two"),
    (("gke", "--accelerator=h100-8", *train("gs://b/w")), 2, "give one of v4-N"),
    (("tpu_vm",), 2, "say what to do, one of create, install, start"),
    (("tpu_vm", "stop", *train("w")), 2, "stop trains nothing: leave out --config"),
    (("tpu_vm", "create", "--accelerator=v5p-6"), 2, "two a chip, is a power of two"),
    ((*POD, *train("w")), 2, "would be another folder on each of 2 hosts: give gs://"),
]


@pytest.mark.parametrize("arguments, status, message", REFUSED)
def test_bad_setting_is_one_line(stage, arguments, status, message):
    done = stage.run(*arguments)
    assert (done.returncode, done.stdout) == (status, "")
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def test_secrets_are_refused_and_not_told(stage):
    harmless = "--env=TOKENIZERS_PARALLELISM=false"
    assert stage.run("local", "--dry_run", harmless, *train("w")).returncode == 0
    for launch in (("local",), SLURM, GKE, POD):
        done = stage.run(*launch, "--env=HF_TOKEN=abc123", *train("gs://b/w"))
        assert done.returncode == 2
        assert "HF_TOKEN" in done.stderr and "abc123" not in done.stderr + done.stdout


@pytest.mark.parametrize("config", [("--config=c.py",), ("--config", "c.py")])
def test_config_is_given_as_train_reads_it(stage, config):
    flags = ("--dry_run", "--grace_secs=21", "--n_processes=2", "--")
    done = stage.run("local", *flags, *config, "--workdir=w")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("launcher", ["local", "tpu_vm", "gke", "slurm"])
def test_help_tells_of_every_setting(stage, launcher):
    done = stage.run(launcher, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Trains on ")
    defined = (LAUNCH / f"{launcher}.py").read_text().count("flags.DEFINE")
    own = done.stdout.split("\n__main__:")[1].split("\n\n")[0]
    assert own.count("\n  --") == defined
    assert "--max_restarts" in done.stdout and "--dry_run" not in own
    assert ("--accelerator" in done.stdout) == (launcher in ("tpu_vm", "gke"))


def test_what_launchers_know_of_sae_jax_is_so():
    """They are run without it, so its numbers stand in both."""
    code = """
import gke, json, processes as p, settings as s
ended = p.PREEMPTED, p.PEER_LOST, p._STOPPED, s.FAILED, s.MISUSED
print(json.dumps([ended, gke._LASTING, s.PEER_TIMEOUT_SECS]))
"""
    environment = os.environ | {"PYTHONPATH": str(LAUNCH)}
    out = subprocess.check_output([sys.executable, "-c", code], env=environment)
    ended, lasting, peer_timeout_secs = json.loads(out)
    stopped, failed, misused = exits.STOPPED, exits.FAILED, exits.MISUSED
    assert ended == [exits.PREEMPTED, exits.PEER_LOST, stopped, failed, misused]
    assert lasting == sorted([failed, misused, stopped])
    assert peer_timeout_secs == Cluster().peer_timeout_secs


def test_one_process_waits_for_no_other(stage):
    done = stage.run("local", "--dry_run", "--grace_secs=1", *train("w"))
    assert (done.returncode, done.stderr) == (0, "")


def test_image_is_made_of_what_is_there():
    for line in (LAUNCH / "Dockerfile").read_text().splitlines():
        command, *words = line.split()
        if command == "COPY":
            assert all((ROOT / word).exists() for word in words[:-1])
