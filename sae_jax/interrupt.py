"""Ctrl-C and SIGTERM as a wish that a loop grants when its state is whole."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def deferred() -> Iterator[threading.Event]:
    """An event that the first signal sets; a second signal acts as it always does.

    Only the main thread hears signals; in another one the event is never set.
    """
    is_wanted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield is_wanted
        return

    def note(number: int, frame: FrameType | None) -> None:
        del number, frame
        is_wanted.set()
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield is_wanted
    finally:
        restore()
