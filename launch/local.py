"""Trains on this machine, by one process or several, and goes on when one dies.

    python launch/local.py -- --config=F --workdir=W
    python launch/local.py --n_processes=2 -- --config=F --workdir=W --cpu_devices=4

When a process dies of a signal, or ends with 75 (preempted) or 76 (lost another), all
are ended and started again, from the last checkpoint: for ever if there is a newer one
each time, else --max_restarts times. A run that failed (1, 2), or whose one process was
stopped by a Ctrl-C of its own (130), is not started again; a Ctrl-C to one of several
ends all with 75. SIGTERM, SIGINT and SIGHUP to the launcher reach the processes as one
SIGTERM, and their save is waited for, for --grace_secs; a second one kills. SIGUSR1 to
the launcher has nothing started again. Several processes have --peer_timeout_secs=10,
unless another is given behind --.
Exit code: 0 done, 75 stopped and saved, else that of the process that ended the run.
"""

import shlex
import shutil
import socket
import sys
from pathlib import Path

import settings
from absl import flags
from processes import PEER_LOST, PREEMPTED, End, Wish, run_together, stop_wish

_N_PROCESSES = flags.DEFINE_integer(
    "n_processes", 1, "processes, which find each other over loopback", lower_bound=1
)
_PROGRAM = flags.DEFINE_string(
    "program", None, "what is run instead of `sae-jax train`, with the same arguments"
)
_RESTART_PREEMPTED = flags.DEFINE_bool(
    "restart_preempted",
    True,
    "start again after 75 too; without it something else does, such as a queue",
)
_LONGEST_PAUSE_SECS = 60
# Shorter than train's own: here no network lies between them.
_PEER_TIMEOUT_SECS = 10


def main(words: list[str], arguments: list[str]) -> int:
    """Runs to the end, or to what a restart does not cure."""
    if words:
        raise ValueError(f"unexpected {words[0]!r}: give arguments of train behind --")
    is_several = _N_PROCESSES.value > 1
    if is_several and settings.value_of(arguments, settings.PEER_TIMEOUT) is None:
        arguments = [*arguments, f"--{settings.PEER_TIMEOUT}={_PEER_TIMEOUT_SECS}"]
    workdir = settings.check_training(arguments, is_several, sets_processes=is_several)
    program = shlex.split(_PROGRAM.value or "") or settings.train_program()
    if settings.DRY_RUN.value:
        for command in _commands(program, arguments, "PORT"):
            print(settings.show([*_assignments(), *command]))
        return 0
    if shutil.which(program[0]) is None:
        raise FileNotFoundError(
            f"there is no program {program[0]!r}: use the Python of the environment "
            "that sae_jax is installed in, or give --program"
        )
    with stop_wish() as wish:
        return _run(program, arguments, workdir, wish)


def _run(program: list[str], arguments: list[str], workdir: str, wish: Wish) -> int:
    n_allowed = settings.MAX_RESTARTS.value
    n_restarts = 0  # in a row, each after an attempt that saved no checkpoint
    newest = _newest_checkpoint(workdir)  # that is known of
    while True:
        ends = run_together(
            _commands(program, arguments, str(_find_port())),
            settings.variables(),
            settings.GRACE_SECS.value,
            wish,
        )
        cause = _cause(ends)
        if cause is None:
            return 0
        found = _newest_checkpoint(workdir)
        is_newer = found is not None and newest is not None and found > newest
        newest = newest if found is None else found
        start = _tell_start(found)
        stopped = f"stopped; the same command goes on from {start}"
        if wish and cause.is_preempted:
            _tell(stopped)
            return PREEMPTED
        if wish or not _is_restarted(cause):
            _tell(f"{cause}; not started again")
            return PREEMPTED if cause.is_preempted else cause.status
        n_restarts = 0 if is_newer else n_restarts + 1
        if n_allowed == 0 or n_restarts > n_allowed:
            _tell(f"{cause}; {_tell_end(n_allowed)}")
            return cause.status
        _tell(f"{cause}; {_tell_restart(n_restarts, n_allowed, start)}")
        if wish.sleep(min(2**n_restarts / 2, _LONGEST_PAUSE_SECS)):
            _tell(stopped)
            return PREEMPTED


def _commands(program: list[str], arguments: list[str], port: str) -> list[list[str]]:
    n_processes = _N_PROCESSES.value
    if n_processes == 1:
        return [[*program, *arguments]]
    shared = ["--multihost", f"--coordinator=127.0.0.1:{port}"]
    shared.append(f"--n_processes={n_processes}")
    return [
        [*program, *arguments, *shared, f"--process={process}"]
        for process in range(n_processes)
    ]


def _assignments() -> list[str]:
    pairs = [f"{name}={value}" for name, value in settings.variables().items()]
    return ["env", *pairs] if pairs else []


def _find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _cause(ends: list[End]) -> End | None:
    """What no restart cures, else who was first, and not just lost the others."""
    failed = [end for end in ends if end.status]
    lasting = [end for end in failed if not end.is_retryable]
    first = [end for end in failed if end.status != PEER_LOST]
    return next(iter(lasting + first + failed), None)


def _is_restarted(cause: End) -> bool:
    if cause.is_preempted and not _RESTART_PREEMPTED.value:
        return False
    return cause.is_retryable


def _newest_checkpoint(workdir: str) -> int | None:
    """The step of the newest checkpoint of the run, 0 if it has none, None if that
    cannot be told."""
    try:
        names = _list_checkpoints(workdir)
    except (OSError, ValueError) as error:  # the run itself goes on, or says more
        _tell(f"its checkpoints cannot be listed: {error}")
        return None
    return max((int(name) for name in names if name.isdigit()), default=0)


def _list_checkpoints(workdir: str) -> list[str]:
    if not settings.REMOTE.match(workdir):
        folder = Path(workdir) / "checkpoints"
        return [path.name for path in folder.iterdir()] if folder.is_dir() else []
    from sae_jax.store.folder import Folder  # takes seconds, and not all have buckets

    files = Folder(workdir).list("checkpoints/")
    # What is written last of a checkpoint.
    return [name.split("/")[1] for name in files if name.endswith("/meta.json")]


def _tell_start(step: int | None) -> str:
    if step is None:
        return "the last checkpoint"
    return f"checkpoint {step}" if step else "the beginning"


def _tell_end(n_allowed: int) -> str:
    if n_allowed == 0:
        return "not restarted (--max_restarts=0)"
    return f"given up: {n_allowed} restarts and no new checkpoint"


def _tell_restart(n_restarts: int, n_allowed: int, start: str) -> str:
    if n_restarts == 0:
        return f"restarted from {start}, newly saved"
    return f"restart {n_restarts} of {n_allowed} without a new checkpoint, from {start}"


def _tell(line: str) -> None:
    print(f"{settings.NAME.value}: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    settings.run(main)
