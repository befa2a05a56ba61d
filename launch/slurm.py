"""Trains on nodes of a Slurm cluster, as a batch job.

    python launch/slurm.py --nodes=4 --gpus_per_node=8 --time=24:00:00 -- \\
        --config=F --workdir=W

Hands a script to sbatch; with --dry_run it is printed. One process a GPU, or one a node
where there is none, all found by JAX from Slurm's variables; the repository, its Python
and the workdir lie where all nodes see them. --grace_secs before the time limit the
processes are told to save, and the job is queued again under its number; so it is where
Slurm takes its nodes away. Within its time a job starts dead processes again itself, by
launch/local.py. `scancel` ends it for good, after the save if KillWait leaves the time.
"""

import re
import shlex
import sys

import settings
from absl import flags
from processes import PREEMPTED

_NODES = flags.DEFINE_integer("nodes", 1, "nodes", lower_bound=1)
_GPUS = flags.DEFINE_integer(
    "gpus_per_node", 0, "GPUs and processes of a node; 0: one process, no GPU", 0
)
_CPUS = flags.DEFINE_integer("cpus_per_task", None, "cores of a process", lower_bound=1)
_TIME = flags.DEFINE_string(
    "time", None, "limit of one stay in the queue, D-HH:MM:SS; more than --grace_secs"
)
_PARTITION = flags.DEFINE_string("partition", None, "where the job is queued")
_ACCOUNT = flags.DEFINE_string("account", None, "who pays")
_SETUP = flags.DEFINE_multi_string(
    "setup", [], "a shell line that is run first, as 'module load cuda'; repeatable"
)
_TIME_FORM = re.compile(r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}")
# The signal of the time limit goes to this shell, for there may be no tasks: a launcher
# pauses before it starts them again. They are told by scancel, as srun would kill them
# at a SIGTERM of its own. A job that is cancelled, or whose nodes are taken, is not
# RUNNING when its tasks have saved: then Slurm has decided already whether it goes back
# into the queue.
_SCRIPT = """#!/usr/bin/env bash
# By launch/slurm.py, for sbatch.
{options}

trap : TERM  # outlives it, to wait for the save
{setup}{command} &
launcher=$!
trap 'kill -USR1 "$launcher"; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher"; done
wait "$launcher"
status=$?
state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
if [ "$status" = {preempted} ] && [ "$state" = RUNNING ]; then
  echo "saved; job $SLURM_JOB_ID is queued again" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def main(words: list[str], arguments: list[str]) -> int:
    """Submits the job."""
    if words:
        raise ValueError(f"unexpected {words[0]!r}: give arguments of train behind --")
    return settings.execute(["sbatch"], text=_script(arguments))


def _script(arguments: list[str]) -> str:
    n_tasks = max(_GPUS.value, 1)
    is_several = _NODES.value * n_tasks > 1
    settings.check_training(arguments, is_several)
    step = [
        *("srun", "--kill-on-bad-exit=0", f"--wait={settings.GRACE_SECS.value}"),
        # Since Slurm 22.05 srun does not take them over from sbatch.
        *([f"--cpus-per-task={_CPUS.value}"] if _CPUS.value else []),
        *settings.train_program(),
    ]
    command = settings.show([
        *(sys.executable, str(settings.ROOT / "launch/local.py")),
        *settings.forwarded(),
        *("--norestart_preempted", f"--program={shlex.join(step)}"),
        *("--", *arguments),
        *(["--multihost"] if is_several else []),
    ])
    options = "\n".join(f"#SBATCH --{line}" for line in _options(n_tasks))
    return _SCRIPT.format(
        options=options,
        setup="".join(f"{line}\n" for line in _SETUP.value),
        command=command,
        preempted=PREEMPTED,
    )


def _options(n_tasks: int) -> list[str]:
    if _TIME.value is not None:
        _check_time(_TIME.value, settings.GRACE_SECS.value)
    for name, value in (("partition", _PARTITION.value), ("account", _ACCOUNT.value)):
        if value is not None and not re.fullmatch(r"[\w.,@-]+", value):
            raise ValueError(f"--{name}={value}: that is no name of Slurm's")
    chosen = {
        "cpus-per-task": _CPUS.value,
        "time": _TIME.value,
        "partition": _PARTITION.value,
        "account": _ACCOUNT.value,
    }
    return [
        f"job-name={settings.NAME.value}",
        f"nodes={_NODES.value}",
        f"ntasks-per-node={n_tasks}",
        *([f"gpus-per-node={_GPUS.value}"] if _GPUS.value else []),
        *(f"{name}={value}" for name, value in chosen.items() if value is not None),
        "output=%x-%j.log",
        "open-mode=append",
        "requeue",
        f"signal=B:USR1@{settings.GRACE_SECS.value}",
    ]


def _check_time(limit: str, grace_secs: int) -> None:
    if not _TIME_FORM.fullmatch(limit):
        raise ValueError(f"--time={limit}: give minutes, HH:MM:SS or D-HH:MM:SS")
    secs = _read_secs(limit)
    if 0 < secs <= grace_secs:  # 0 is no limit
        raise ValueError(
            f"--time={limit} is {secs} s, and not more than --grace_secs={grace_secs}: "
            "the job would save at its start and be queued again for ever; give more "
            "time, or less grace"
        )


def _read_secs(limit: str) -> int:
    """As Slurm reads it: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    days, dash, clock = limit.rpartition("-")
    numbers = [int(word) for word in clock.split(":")]
    if not dash and len(numbers) < 3:
        numbers.insert(0, 0)
    hours, minutes, secs = [*numbers, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs


if __name__ == "__main__":
    settings.run(main)
