"""The processes of one attempt of a run: started together, ended together.

On a signal all are told to save and end. From then on, or once one has failed, they
have a grace to end by themselves; then they are killed, with all that they started.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

PREEMPTED, PEER_LOST = 75, 76  # of the exit codes of `sae-jax`, in BUILD.md
_STOPPED = 130
_BY_SIGNAL = 128  # a status above it is that of a death by signal, as in a shell
_BY_SIGTERM = _BY_SIGNAL + signal.SIGTERM
_TOLD = {
    PREEMPTED: "was preempted (75)",
    PEER_LOST: "lost another process or its bucket (76)",
    _STOPPED: "was stopped by Ctrl-C (130)",
}
_POLL_SECS = 0.05
# How XLA begins dozens of lines a run, which say only that processes have met.
_NOISE = "[Gloo] Rank"


@dataclasses.dataclass(frozen=True)
class End:
    """How a process ended."""

    process: int
    status: int  # as a shell gives it

    @property
    def is_retryable(self) -> bool:
        """Whether the same command goes on from there, or from the last checkpoint."""
        died = self.status > _BY_SIGNAL and self.status != _STOPPED
        return died or self.status in (PREEMPTED, PEER_LOST)

    @property
    def is_preempted(self) -> bool:
        """Whether SIGTERM ended it: saved, or before it had anything to save."""
        return self.status in (PREEMPTED, _BY_SIGTERM)

    def __str__(self) -> str:
        told = _TOLD.get(self.status, f"ended with exit code {self.status}")
        if self.status > _BY_SIGNAL and self.status not in _TOLD:
            with contextlib.suppress(ValueError):
                name = signal.Signals(self.status - _BY_SIGNAL).name
                told = f"died of {name} ({self.status})"
        return f"process {self.process} {told}"


class Wish:
    """Counts the SIGTERM, SIGINT and SIGHUP that ask the launcher to stop.

    SIGUSR1 asks to start nothing more; what runs is told by somebody else.
    """

    def __init__(self) -> None:
        self.count = 0
        self.starts_no_more = False

    def __bool__(self) -> bool:
        return self.count > 0

    def sleep(self, seconds: float) -> bool:
        """For so long, or until nothing is to be started; whether that is so."""
        end = time.monotonic() + seconds
        while not (self or self.starts_no_more) and time.monotonic() < end:
            time.sleep(_POLL_SECS)
        return bool(self) or self.starts_no_more


@contextlib.contextmanager
def stop_wish() -> Iterator[Wish]:
    """Within it, signals only count; one that was ignored before stays so (nohup)."""
    wish = Wish()

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGUSR1:
            wish.starts_no_more = True
        else:
            wish.count += 1

    before = {
        number: signal.signal(number, note)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_together(
    commands: Sequence[Sequence[str]],
    variables: Mapping[str, str],
    grace_secs: float,
    wish: Wish,
) -> list[End]:
    """Runs one process a command; how each ended, in the order in which they did.

    The first wish becomes one SIGTERM to each, the second SIGKILL. Of several processes
    each line has the number of its process before it, and noise is left out.

    Raises:
        OSError: one cannot be started; none is left.
    """
    running = _start(commands, variables)
    printers = [
        threading.Thread(target=_print_lines, args=(number, process), daemon=True)
        for number, process in running.items()
        if process.stdout is not None
    ]
    for printer in printers:
        printer.start()
    ends = _wait(running, grace_secs, wish)
    for printer in printers:
        printer.join()
    return ends


def _start(
    commands: Sequence[Sequence[str]], variables: Mapping[str, str]
) -> dict[int, subprocess.Popen]:
    # In sessions of their own: a terminal's Ctrl-C would reach them beside our signal,
    # and a second one cuts a save off.
    pipe = None if len(commands) == 1 else subprocess.PIPE
    running: dict[int, subprocess.Popen] = {}
    for number, command in enumerate(commands):
        try:
            running[number] = subprocess.Popen(
                command,
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=pipe,
                stderr=pipe and subprocess.STDOUT,
                start_new_session=True,
                text=True,
                errors="replace",
            )
        except OSError as error:
            for process in running.values():
                _kill(process)
                process.wait()
            raise OSError(f"process {number} cannot be started: {error}") from error
    return running


def _wait(
    running: dict[int, subprocess.Popen], grace_secs: float, wish: Wish
) -> list[End]:
    ends: list[End] = []
    is_told = False
    deadline = float("inf")
    while running:
        for number, process in list(running.items()):
            if (status := process.poll()) is None:
                continue
            _kill(process)  # what it left behind
            del running[number]
            ends.append(End(number, status if status >= 0 else _BY_SIGNAL - status))
            if status:
                deadline = min(deadline, time.monotonic() + grace_secs)
        if wish and not is_told:
            is_told = True
            deadline = min(deadline, time.monotonic() + grace_secs)
            for process in running.values():
                process.terminate()
        if wish.count > 1 or time.monotonic() > deadline:
            for process in running.values():
                _kill(process)
        time.sleep(_POLL_SECS)
    return ends


def _kill(process: subprocess.Popen) -> None:
    """It, if it is there, and all of its session, in whatever process groups."""
    process.kill()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # Behind the name, which may hold anything: state, parent, group, session.
            session = path.read_text(errors="replace").rpartition(")")[2].split()[3]
            if int(session) == process.pid:
                os.kill(int(path.parent.name), signal.SIGKILL)


def _print_lines(number: int, process: subprocess.Popen) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(_NOISE):
            continue
        # Nobody may be reading ours any more; theirs is read on, or they would block.
        with contextlib.suppress(OSError):
            print(f"[{number}] {line.rstrip()}", flush=True)
