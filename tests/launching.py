"""Launchers run for real, with stand-ins for what they start.

`sae-jax` is a program that does, attempt by attempt, what a plan in its workdir says,
and writes down how it was called. gcloud, kubectl and Slurm's commands write down how
they were called too, and gcloud and srun run what they are given, here.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
GKE = ("gke", "--accelerator=v5p-128", "--image=registry/sae:1")
SLURM = ("slurm", "--nodes=2")
_IGNORED = shutil.ignore_patterns("__pycache__")

# What it does is a list of words: say=TEXT (| is a carriage return, _ a space),
# checkpoint=STEP, kill=SIGNAL, exit=STATUS, child (leaves one that sleeps),
# after=PROCESS (has begun as many attempts), wait or wait=STATUS (for SIGTERM, then
# ends: 75), hang (deaf to it).
_TRAIN = f"""#!{sys.executable} -SE
import json, os, signal, subprocess, sys, time
value = lambda name, default: next(
    (a.split("=", 1)[1] for a in sys.argv if a.startswith("--" + name + "=")), default)
workdir = value("workdir", ".")
process = int(value("process", os.environ.get("SLURM_PROCID", "0")))
calls = os.path.join(workdir, f"calls-{{process}}.jsonl")
attempt = len(open(calls).readlines()) if os.path.exists(calls) else 0
terms = []
def note(number, frame):
    terms.append(number)
    with open(os.path.join(workdir, f"terms-{{process}}"), "a") as log:
        log.write(str(attempt) + "\\n")
signal.signal(signal.SIGTERM, note)
with open(calls, "a") as log:
    assert sys.argv[1] == "train"
    log.write(json.dumps([sys.argv[2:], dict(os.environ)]) + "\\n")
plan = json.load(open(os.path.join(workdir, "plan.json")))
for word in plan[min(attempt, len(plan) - 1)].get(str(process), "exit=0").split():
    name, _, what = word.partition("=")
    if name == "say":
        print(what.replace("|", "\\r").replace("_", " "), flush=True)
    elif name == "checkpoint":
        os.makedirs(os.path.join(workdir, "checkpoints", what), exist_ok=True)
    elif name == "kill":
        os.kill(os.getpid(), int(what))
    elif name == "exit":
        sys.exit(int(what))
    elif name == "child":
        subprocess.Popen(["sleep", "600"], process_group=0)
    elif name == "after":
        other = os.path.join(workdir, f"calls-{{what}}.jsonl")
        while not os.path.exists(other) or len(open(other).readlines()) <= attempt:
            time.sleep(0.01)
    elif name == "wait":
        while not terms:
            time.sleep(0.01)
        time.sleep(0.2)
        sys.exit(int(what or 75))
    elif name == "hang":
        time.sleep(600)
"""
_RECORD = f"""#!{sys.executable} -SE
import json, os, signal, subprocess, sys
name = os.path.basename(sys.argv[0])
text = "" if sys.stdin.isatty() else sys.stdin.read()
with open(os.environ["STUB_LOG"], "a") as log:
    log.write(json.dumps([name, sys.argv[1:], text]) + "\\n")
"""
# As gcloud does: apart at spaces, and together again by ssh, for the account's shell.
# A host has a number, as a Slurm task has.
_GCLOUD = _RECORD + """
homes = sorted(os.listdir(os.environ["HOSTS"])) if "tpu-vm" in sys.argv else []
flags = dict(a[2:].partition("=")[::2] for a in sys.argv if a.startswith("--"))
if "worker" in flags and flags["worker"] != "all":
    homes = [homes[int(flags["worker"])]]
for number, home in enumerate(homes):
    home = os.path.join(os.environ["HOSTS"], home)
    if "scp" in sys.argv:
        subprocess.run(["cp", sys.argv[5], home], check=True)
    else:
        command = " ".join(flags["command"].split(" "))
        shell = subprocess.Popen(["sh", "-c", command], cwd=home,
                                 stdin=subprocess.DEVNULL, start_new_session=True,
                                 env={**os.environ, "SLURM_PROCID": str(number)})
        status = shell.wait()
        try:
            os.killpg(shell.pid, signal.SIGHUP)  # the connection ends
        except ProcessLookupError:
            pass
        if status:
            sys.exit(status)
"""
# Two tasks, to which signals are passed on, and the highest of their statuses.
_SRUN = _RECORD + """
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
tasks = [subprocess.Popen(command, env={**os.environ, "SLURM_PROCID": str(p)},
                          start_new_session=True) for p in range(2)]
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
with open("tasks", "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
statuses = [task.wait() for task in tasks]
sys.exit(max(s if s >= 0 else 128 - s for s in statuses))
"""
# The tasks, not the shell.
_SCANCEL = _RECORD + """
for pid in open("tasks").read().split():
    try:
        os.kill(int(pid), signal.SIGTERM)
    except ProcessLookupError:
        pass
"""
# A job that is running, unless its folder says otherwise.
_SQUEUE = _RECORD + """
print(open("state").read() if os.path.exists("state") else "RUNNING")
"""
# As Python on a new host, which makes the .venv and installs into it.
_PYTHON3 = _RECORD + """
if sys.argv[1:4] == ["-m", "uv", "venv"]:
    bin = os.path.join(sys.argv[-1], "bin")
    os.makedirs(bin)
    for name in ("python", "sae-jax"):
        os.symlink(os.path.join(os.path.dirname(sys.argv[0]), name),
                   os.path.join(bin, name))
"""


class Stage:
    """A folder with stand-ins first on the path, and a repository of little more than
    the launchers, with a space in its path."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.bin = folder / "bin"
        self.log = folder / "stubs.jsonl"
        self.hosts = folder / "hosts"
        self.root = folder / "a repository"
        shutil.copytree(LAUNCH, self.root / "launch", ignore=_IGNORED)
        for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.root)
        for name in ("sae_jax/__init__.py", "experiments/c.py"):
            (self.root / name).parent.mkdir()
            (self.root / name).touch()
        self.bin.mkdir()
        (self.bin / "python").symlink_to(sys.executable)
        stubs = {"sae-jax": _TRAIN, "gcloud": _GCLOUD, "srun": _SRUN}
        stubs |= {"python3": _PYTHON3, "squeue": _SQUEUE, "scancel": _SCANCEL}
        stubs |= dict.fromkeys(("kubectl", "sbatch", "scontrol"), _RECORD)
        for name, text in stubs.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)

    @property
    def environment(self) -> dict[str, str]:
        # The Python is found without its environment, so it is told where to import.
        return os.environ | {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "STUB_LOG": str(self.log),
            "HOSTS": str(self.hosts),
            "SLURM_JOB_ID": "77",
        }

    def start(
        self, launcher: str, *arguments: object, under: tuple[str, ...] = ()
    ) -> subprocess.Popen:
        script = self.root / "launch" / f"{launcher}.py"
        # Where tests run in the background, or under nohup, these are ignored, and
        # launchers heed that.
        numbers = (signal.SIGINT, signal.SIGHUP)
        before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
        try:
            return subprocess.Popen(
                [*under, self.bin / "python", script, *map(str, arguments)],
                env=self.environment,
                cwd=self.folder,
                text=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def run(self, launcher: str, *arguments: object) -> subprocess.CompletedProcess:
        process = self.start(launcher, *arguments)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(launcher, process.returncode, out, err)

    def plan(self, *attempts: dict[int, str], folder: str = "run") -> Path:
        """What each process does in each attempt, the last one's for ever."""
        workdir = self.folder / folder
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "plan.json").write_text(json.dumps(attempts))
        return workdir

    def calls(self, name: str) -> list[tuple[list[str], str]]:
        """Arguments and standard input of each call of a stand-in."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        records = map(json.loads, lines)
        return [(words, text) for called, words, text in records if called == name]


def train(workdir: object, *arguments: str) -> tuple[str, ...]:
    """The end of a launcher's command line."""
    return ("--", "--config=c.py", f"--workdir={workdir}", *arguments)


def calls_of(workdir: Path, process: int = 0) -> list[tuple[list[str], dict[str, str]]]:
    """Arguments and environment of each attempt of a process."""
    path = workdir / f"calls-{process}.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [tuple(json.loads(line)) for line in lines]


def flag_of(arguments: list[str], name: str) -> str:
    found = [a for a in arguments if a.startswith(f"--{name}=")]
    assert len(found) == 1, arguments
    return found[0].split("=", 1)[1]


def find_port() -> int:
    """One of loopback that nobody has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until(is_so: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
