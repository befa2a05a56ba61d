"""Launchers for TPU VMs, GKE and Slurm: what they start, and that quoting survives."""

import contextlib
import os
import signal
import subprocess

import pytest
import yaml
from launching import GKE, SLURM, Stage, calls_of, train, wait_until

AWKWARD = ["--x=it's", '--y="a"  $HOME', "--z=`b`\n*", "--empty="]


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


@pytest.fixture
def tpu(stage):
    """Two hosts; what is left running on them is ended."""
    for name in ("host-0", "host-1"):
        (stage.hosts / name).mkdir(parents=True)
    yield stage
    for path in stage.hosts.glob("*/sae_jax/run.pid"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.read_text()), signal.SIGKILL)


def test_tpu_vm_is_installed_run_and_stopped_on_all_hosts(tpu):
    workdir = tpu.plan(
        {0: "kill=9", 1: "after=0 exit=76"}, {0: "say=hi wait", 1: "wait"}
    )
    flags = ("--name=pod", "--project=p", "--zone=z", "--accelerator=v5p-16")
    assert tpu.run("tpu_vm", "install", *flags).returncode == 0
    for host in (0, 1):
        there = tpu.hosts / f"host-{host}" / "sae_jax"
        for name in ("sae_jax/__init__.py", "experiments/c.py", "launch/local.py"):
            assert (there / name).is_file()
    assert [words[:3] for words, _ in tpu.calls("python3")][:3] == [
        ["-m", "pip", "install"],
        ["-m", "uv", "venv"],
        ["-m", "uv", "pip"],
    ]
    start = ("tpu_vm", "start", *flags, "--env=A=b  c", *train(workdir, *AWKWARD))
    assert tpu.run(*start).returncode == 0
    wait_until(lambda: calls_of(workdir))
    again = tpu.run(*start)
    assert again.returncode == 1 and "a run is under way" in again.stderr
    wait_until(lambda: all(len(calls_of(workdir, host)) == 2 for host in (0, 1)))
    for host in (0, 1):
        for arguments, environment in calls_of(workdir, host):
            assert arguments == [
                "--config=c.py",
                f"--workdir={workdir}",
                *AWKWARD,
                "--multihost",
            ]
            assert environment["A"] == "b  c"
    stopped = tpu.run("tpu_vm", "stop", *flags)
    assert stopped.returncode == 0
    assert stopped.stdout.count("pod: stopped; the same command goes on from") == 2
    followed = tpu.run("tpu_vm", "follow", *flags)
    assert "restart 1 of 3" in followed.stdout and "hi\n" in followed.stdout
    for words, _ in tpu.calls("gcloud"):
        assert words[:3] == ["compute", "tpus", "tpu-vm"] and "--zone=z" in words
        assert "pod" in words or "pod:" in words


def test_tpu_vm_leaves_alone_who_has_the_number_of_an_ended_run(tpu):
    """As after a reboot of the host."""
    tpu.run("tpu_vm", "install")
    others = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
    for host, other in enumerate(others):
        there = tpu.hosts / f"host-{host}" / "sae_jax"
        (there / "run.pid").write_text(str(other.pid))
        (there / "run.log").write_text("the end\n")
    stopped = tpu.run("tpu_vm", "stop")
    assert (stopped.returncode, stopped.stdout) == (0, "the end\n" * 2)
    assert [other.poll() for other in others] == [None, None]
    started = tpu.run("tpu_vm", "start", "--accelerator=v5p-16", *train(tpu.plan({})))
    assert started.returncode == 0, started.stderr
    for other in others:
        other.kill()
        other.wait()


@pytest.mark.parametrize("action", ["create", "install", "start", "follow", "stop"])
def test_tpu_vm_dry_run_is_what_would_run(tpu, action):
    for host in ("host-0", "host-1"):  # so that following and stopping end
        (tpu.hosts / host / "sae_jax").mkdir()
        (tpu.hosts / host / "sae_jax" / "run.pid").write_text("999999999")
        (tpu.hosts / host / "sae_jax" / "run.log").write_text("end\n")
    behind = train(tpu.plan({}), *AWKWARD) if action == "start" else ()
    arguments = ("tpu_vm", action, "--accelerator=v6e-8", "--spot", "--dry_run")
    done = tpu.run(*arguments, *behind)
    assert (done.returncode, done.stderr) == (0, "")
    assert not tpu.calls("gcloud") and not (tpu.root / "build").exists()
    shell = ["bash", "-c", done.stdout]
    subprocess.run(shell, env=tpu.environment, check=True, capture_output=True)
    printed = tpu.calls("gcloud")
    tpu.log.unlink()
    tpu.run(*arguments[:-1], *behind)
    assert printed == tpu.calls("gcloud") != []


def test_tpu_vm_is_asked_for_as_gcloud_wants_it(tpu):
    flags = ("--name=pod", "--zone=z", "--accelerator=v5litepod-16", "--spot")
    assert tpu.run("tpu_vm", "create", *flags).returncode == 0
    ((words, _),) = tpu.calls("gcloud")
    assert words == [
        *("compute", "tpus", "queued-resources", "create", "pod", "--zone=z"),
        *("--node-id=pod", "--accelerator-type=v5litepod-16"),
        *("--runtime-version=v2-alpha-tpuv5-lite", "--spot"),
    ]


def test_one_host_is_no_multihost_run(tpu):
    flags = ("--accelerator=v5p-8", "--dry_run")
    done = tpu.run("tpu_vm", "start", *flags, *train("here"))
    assert done.returncode == 0 and "--multihost" not in done.stdout


def test_gke_manifest_field_by_field(stage):
    flags = ("--name=big", "--spot", "--max_restarts=9", "--grace_secs=300")
    flags += ("--env=A=1", "--service_account=trainer", "--dry_run")
    behind = train("gs://b/run", *AWKWARD)
    done = stage.run(*GKE, *flags, *behind)
    assert (done.returncode, done.stderr) == (0, "")
    manifest = yaml.safe_load(done.stdout)
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert (manifest["kind"], manifest["metadata"]["name"]) == ("JobSet", "big")
    spec = manifest["spec"]
    assert spec["network"]["enableDNSHostnames"] is True
    assert spec["failurePolicy"] == {
        "maxRestarts": 9,
        "rules": [
            {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
        ],
    }
    ((job,),) = [spec["replicatedJobs"]]
    assert job["replicas"] == 1
    job = job["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["backoffLimit"]) == (16, 16, 0)
    assert job["completionMode"] == "Indexed"
    ((rule,),) = [job["podFailurePolicy"]["rules"]]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["operator"] == "In"
    assert rule["onExitCodes"]["values"] == [1, 2, 130]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] == 300
    assert pod["serviceAccountName"] == "trainer"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    ((container,),) = [pod["containers"]]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert container["image"] == "registry/sae:1"
    assert container["command"] == ["sae-jax", "train", *behind[1:], "--multihost"]
    assert container["env"] == [{"name": "A", "value": "1"}]
    chips = {"google.com/tpu": 4}
    assert container["resources"] == {"requests": chips, "limits": chips}


@pytest.mark.parametrize(
    "accelerator, hosts, chips, topology",
    [
        ("v4-8", 1, 4, "2x2x1"),
        ("v5p-16", 2, 4, "2x2x2"),
        ("v5p-64", 8, 4, "2x4x4"),
        ("v5p-256", 32, 4, "4x4x8"),
        ("v5p-2048", 256, 4, "8x8x16"),
        ("v5litepod-1", 1, 1, "1x1"),
        ("v5litepod-128", 32, 4, "8x16"),
        ("v6e-8", 1, 8, "2x4"),
        ("v6e-256", 64, 4, "16x16"),
    ],
)
def test_slices_have_the_clouds_shapes(stage, accelerator, hosts, chips, topology):
    flags = (f"--accelerator={accelerator}", "--image=i", "--dry_run")
    manifest = yaml.safe_load(stage.run("gke", *flags, *train("gs://b/run")).stdout)
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == hosts
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert ("--multihost" in container["command"]) == (hosts > 1)


@pytest.mark.parametrize("launch, name", [(GKE, "kubectl"), (SLURM, "sbatch")])
def test_dry_run_is_what_would_be_handed_over(stage, launch, name):
    behind = train("gs://b/run", *AWKWARD)
    printed = stage.run(*launch, "--dry_run", *behind).stdout
    assert not stage.calls(name)
    assert stage.run(*launch, *behind).returncode == 0
    ((words, text),) = stage.calls(name)
    assert text == printed
    assert words == {"kubectl": ["create", "--filename=-"], "sbatch": []}[name]


def write_script(stage, *arguments):
    """The batch script, whose shell finds no fault with it."""
    done = stage.run(*SLURM, "--dry_run", *arguments)
    assert done.returncode == 0, done.stderr
    script = stage.folder / "job.sh"
    script.write_text(done.stdout)
    subprocess.run(["bash", "-n", script], check=True)
    return script


def start_script(stage, script):
    return subprocess.Popen(
        ["bash", script],
        env=stage.environment,
        cwd=stage.folder,
        text=True,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def test_slurm_options(stage):
    options = ("--gpus_per_node=8", "--cpus_per_task=4", "--time=1-00:00:00")
    queue = ("--partition=gpu", "--account=lab", "--grace_secs=121", "--name=big")
    lines = ("--setup=module load cuda", "--setup=ulimit -n 4096")
    flags = (*options, *queue, *lines)
    text = write_script(stage, *flags, *train("w")).read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    options = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert {line.removeprefix("#SBATCH --") for line in options} == {
        "job-name=big",
        "nodes=2",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "cpus-per-task=4",
        "time=1-00:00:00",
        "partition=gpu",
        "account=lab",
        "output=%x-%j.log",
        "open-mode=append",
        "requeue",
        "signal=B:USR1@121",
    }
    # sbatch reads no options behind the first command.
    assert text.index("#SBATCH --signal") < text.index("\ntrap")
    assert "\nmodule load cuda\nulimit -n 4096\n" in text


@pytest.mark.parametrize("cpus", [None, 4])
def test_slurm_steps_have_the_cores_of_a_process(stage, cpus):
    flags = [f"--cpus_per_task={cpus}"] if cpus else []
    script = write_script(stage, *flags, *train(stage.plan({})))
    process = start_script(stage, script)
    process.communicate(timeout=30)
    assert process.returncode == 0
    ((words, _),) = stage.calls("srun")
    asked = [word for word in words if word.startswith("--cpus-per-task")]
    assert asked == ([f"--cpus-per-task={cpus}"] if cpus else [])


@pytest.mark.parametrize(
    "limit", ["3", "2:31", "0:02:31", "1-0", "0-1", "0-0:03", "0-0:02:31", "0"]
)
def test_slurm_time_above_the_grace_is_asked_for(stage, limit):
    text = write_script(stage, f"--time={limit}", *train("w")).read_text()
    assert f"#SBATCH --time={limit}\n" in text and "signal=B:USR1@150" in text


@pytest.mark.parametrize(
    "first, status, n_attempts, is_requeued",
    [
        ("exit=0", 0, 1, False),
        ("exit=75", 75, 1, True),
        ("exit=1", 1, 1, False),
        ("kill=9", 0, 2, False),
        ("exit=76", 0, 2, False),
    ],
)
def test_slurm_job_goes_on(stage, first, status, n_attempts, is_requeued):
    workdir = stage.plan({0: first, 1: first}, {})
    script = write_script(stage, "--env=A=b  c", *train(workdir, *AWKWARD))
    process = start_script(stage, script)
    process.communicate(timeout=30)
    assert process.returncode == status
    calls = calls_of(workdir, 0) + calls_of(workdir, 1)
    assert len(calls) == 2 * n_attempts
    for arguments, environment in calls:
        assert arguments[2:] == [*AWKWARD, "--multihost"]
        assert environment["A"] == "b  c"
    requeued = [(["requeue", "77"], "")] if is_requeued else []
    assert stage.calls("scontrol") == requeued
    assert stage.calls("squeue")[0][0][1:] == ["--jobs=77", "--format=%T"]
    for words, _ in stage.calls("srun"):
        assert words[:2] == ["--kill-on-bad-exit=0", "--wait=150"]


def test_slurm_job_is_saved_and_queued_again_before_its_time_is_up(stage):
    """By tasks that are told once, and not by srun too, which would kill them."""
    workdir = stage.plan({0: "wait", 1: "wait"})
    process = start_script(stage, write_script(stage, *train(workdir)))
    wait_until(lambda: calls_of(workdir, 0) and calls_of(workdir, 1))
    os.kill(process.pid, signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert stage.calls("scancel") == [(["--signal=TERM", "77"], "")]
    assert stage.calls("scontrol") == [(["requeue", "77"], "")]
    for task in (0, 1):
        assert (workdir / f"terms-{task}").read_text() == "0\n"


def test_slurm_job_is_queued_again_where_nothing_runs_as_its_time_is_up(stage):
    workdir = stage.plan({0: "kill=9", 1: "kill=9"})
    process = start_script(stage, write_script(stage, *train(workdir)))
    while "without a new checkpoint" not in (line := process.stderr.readline()):
        assert line
    os.kill(process.pid, signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert stage.calls("scontrol") == [(["requeue", "77"], "")]


@pytest.mark.parametrize("is_all_signalled", [True, False])
def test_cancelled_slurm_job_saves_and_stays_away(stage, is_all_signalled):
    """Whether or not the shell gets what its tasks get."""
    first = "wait" if is_all_signalled else "exit=75"
    workdir = stage.plan({0: first, 1: first})
    (stage.folder / "state").write_text("COMPLETING")
    process = start_script(stage, write_script(stage, *train(workdir)))
    wait_until(lambda: calls_of(workdir, 0) and calls_of(workdir, 1))
    if is_all_signalled:
        os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert not stage.calls("scontrol")
