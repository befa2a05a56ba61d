"""Ctrl-C and SIGTERM as a wish that a loop grants when its state is whole.

Of several processes, one that hears a signal has all stop after the same step.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from sae_jax.exits import Preempted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether a loop is to stop, and as what."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def is_wanted(self, step: int) -> bool:
        """To be asked after every step; of several processes, by all."""
        if jax.process_count() == 1:
            return self.signal is not None
        if not multihost_utils.reached_preemption_sync_point(step):
            return False
        self.signal = signal.SIGTERM
        return True

    def error(self, message: str) -> BaseException:
        """What the loop is to raise."""
        is_preempted = self.signal == signal.SIGTERM
        return (Preempted if is_preempted else KeyboardInterrupt)(message)


@contextlib.contextmanager
def deferred() -> Iterator[Stop]:
    """Signals are wishes. A second Ctrl-C acts as it always does; a second SIGTERM, as
    clusters send, changes nothing.

    Only the main thread hears signals; in another one no stop is ever wanted.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        stop.signal = number
        if number == signal.SIGINT:
            signal.signal(number, before[number])
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # jax tells the other processes

    # With several processes SIGTERM is heard by jax.
    heard = _SIGNALS if jax.process_count() == 1 else (signal.SIGINT,)
    before: dict[int, Any] = {}
    for each in heard:
        before[each] = signal.signal(each, note)
    try:
        yield stop
    finally:
        for each in heard:
            signal.signal(each, before[each])
