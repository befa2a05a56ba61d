"""A command as one process of several: this one starts it anew, and waits for it.

Where processes do not meet, or process 0 is lost, jax aborts the others on the spot,
and leaves nobody there to say what that means.
"""

import json
import os
import signal
import subprocess
import sys
from types import FrameType

from sae_jax.exits import AGAIN, MET_PIPE, PEER_LOST, SUPERVISOR


def is_supervised() -> bool:
    return SUPERVISOR in os.environ


def run(start_timeout_secs: int) -> int:
    """Runs this process's command in a child; returns the child's exit code.

    Signals go to the child. Where one ends it, it ends this process too.
    """
    told, tell = os.pipe()
    child: subprocess.Popen | None = None
    early: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        del frame
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env=os.environ | {SUPERVISOR: str(os.getpid()), MET_PIPE: str(tell)},
        pass_fds=[tell],
        process_group=0,  # else a terminal's Ctrl-C would come twice
    )
    os.close(tell)
    for each in early:
        child.send_signal(each)
    code = child.wait()
    with os.fdopen(told, "rb") as pipe:
        met = json.loads(pipe.read() or b"{}")
    if code == -signal.SIGABRT:
        print(f"sae-jax: {_tell_abort(met, start_timeout_secs)}", file=sys.stderr)
        return PEER_LOST
    if code < 0:
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _tell_abort(met: dict, start_timeout_secs: int) -> str:
    if not met:
        return (
            f"not all processes met within {start_timeout_secs} s: see that every one "
            "is started, with the same number of processes and a number of its own, "
            "and reaches the coordinator (the lines above are jax's)"
        )
    if met["process"] == 0:
        return f"process 0: another process is lost, see the lines above; {AGAIN}"
    return (
        f"process {met['process']}: process 0, at {met['coordinator']}, died or cannot "
        f"be reached; {AGAIN}"
    )
