"""Watches over the other processes of a run: none waits for a lost one for ever.

All processes compute together, so that one that is gone leaves the others waiting in a
collective. A thread of each says where its main thread is, every few seconds, and reads
what the others say:

    silent for `peer_timeout_secs`        killed, or its machine hangs
    all stand for `stall_timeout_secs`    one gets no rows, or a device hangs
    left                                  it met an error, which is everybody's

Each ends this process, with one line that names the other and what it did last.

What is said goes through the key-value store of `jax.distributed`, which process 0
holds. When that is gone jax aborts every other process within seconds, or, if it only
hangs, after four times `peer_timeout_secs`: see `sae_jax.cli.supervise`.
"""

import json
import os
import socket
import sys
import threading
import time
from typing import Any

import jax

from sae_jax.exits import AGAIN, PEER_LOST, SUPERVISOR

_FOLDER = "sae_jax/processes"
_MOST_BEAT_SECS = 5.0


class Watch:
    """The thread, from `start` to `stop`; `store` is the client of jax's store."""

    def __init__(
        self,
        store: Any,
        process: int,
        peer_timeout_secs: float,
        stall_timeout_secs: float,
    ):
        self._store, self._process = store, process
        self._peer_secs, self._stall_secs = peer_timeout_secs, stall_timeout_secs
        self.beat_secs = min(_MOST_BEAT_SECS, peer_timeout_secs / 10)
        self._me = {"host": socket.gethostname(), "pid": os.getpid()}
        self._where: dict[str, Any] = {"where": "the start", "n_done": 0}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._say(0)
        self._thread.start()

    def note(self, where: str, n_done: int) -> None:
        """Where the main thread is, and how many steps it has done."""
        self._where = {"where": where, "n_done": n_done}

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def leave(self, code: int, message: str) -> None:
        """Stops, and tells all others with what they should end."""
        self.stop()
        self._where = {"left": code, "message": message}
        self._say(-1)
        self._let_others_read()

    def _run(self) -> None:
        heard: dict[int, tuple[str, float]] = {}  # and when it was new
        places: list[Any] = []
        moved, n_beats = time.monotonic(), 0
        while not self._is_over.wait(self.beat_secs):
            n_beats += 1
            _die_with_supervisor()
            try:
                self._say(n_beats)
                said = self._hear()
            except jax.errors.JaxRuntimeError:
                heard.clear()  # nobody else's fault
                continue  # where the store is gone for good, jax ends this process
            now = time.monotonic()
            for process, value in said.items():
                if heard.get(process, ("", 0.0))[0] != value:
                    heard[process] = (value, now)
            states = {i: json.loads(value) for i, (value, _) in heard.items()}
            for process, state in states.items():
                self._judge(process, state, now - heard[process][1])
            if places != (places := [state.get("where") for state in states.values()]):
                moved = now
            if now - moved > self._stall_secs:
                self._end(_tell_stall(states, now - moved), PEER_LOST)

    def _judge(self, process: int, state: dict[str, Any], silent_secs: float) -> None:
        who = f"process {process} ({state['host']}, pid {state['pid']})"
        if "left" in state:
            self._end(f"{who} stopped: {state['message']}", state["left"])
        if silent_secs > self._peer_secs:
            self._end(
                f"{who} has been silent for {silent_secs:.0f} s, since "
                f"{state['where']}: it was killed, or its machine hangs; {AGAIN}",
                PEER_LOST,
            )

    def _end(self, message: str, code: int) -> None:
        print(f"sae-jax: process {self._process}: {message}", file=sys.stderr)
        sys.stderr.flush()
        self._let_others_read()
        os._exit(code)

    def _let_others_read(self) -> None:
        if self._process == 0:  # which takes the store with it
            time.sleep(3 * self.beat_secs)

    def _say(self, beat: int) -> None:
        value = json.dumps({"beat": beat} | self._me | self._where)
        name = f"{_FOLDER}/{self._process}"
        self._store.key_value_set(name, value, allow_overwrite=True)

    def _hear(self) -> dict[int, str]:
        said = self._store.key_value_dir_get(_FOLDER)
        return {int(name.rpartition("/")[2]): value for name, value in said}


def _tell_stall(states: dict[int, dict[str, Any]], secs: float) -> str:
    """Who is behind; where nobody is, that all wait for a device or the network."""
    least = min(state["n_done"] for state in states.values())
    last = [process for process, state in states.items() if state["n_done"] == least]
    where = states[last[0]]["where"]
    if len(last) == len(states):
        return (
            f"all {len(states)} processes have been at {where} for {secs:.0f} s: a "
            f"device hangs, the disk, or the network between them; {AGAIN}"
        )
    names = ", ".join(f"{p} ({states[p]['host']})" for p in last)
    return (
        f"nothing moved for {secs:.0f} s, and process {names} is behind the others, at "
        f"{where}; {AGAIN}"
    )


def _die_with_supervisor() -> None:
    if os.environ.get(SUPERVISOR, str(os.getppid())) != str(os.getppid()):
        os._exit(PEER_LOST)  # killed alone: nobody would hear of this process
