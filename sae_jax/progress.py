"""A progress line: how much is done, how fast, and how long it will take."""

import sys
import time
from typing import Self, TextIO

_TERMINAL_SECS = 0.2
_LOG_SECS = 10.0


class Progress:
    """Writes `name: done of total unit, rate, time left, scalars` to a stream.

    On a terminal one line changes in place; elsewhere a line is added every ten
    seconds. The rate leaves out what comes before the first `update`, which is where
    compilation is. Inside `with`, an error ends the line before it is told. Where it
    is not shown nothing is written.
    """

    def __init__(
        self,
        total: int | None,
        unit: str,
        name: str,
        stream: TextIO | None = None,
        is_shown: bool = True,
    ) -> None:
        self._total, self._unit, self._name = total, unit, name
        self._stream = sys.stderr if stream is None else stream
        self._is_shown = is_shown
        self._in_place = self._stream.isatty()
        self._interval = _TERMINAL_SECS if self._in_place else _LOG_SECS
        self._first: tuple[float, int] | None = None
        self._shown_at = -float("inf")
        self._line = ""
        self._is_behind = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, done: int, **scalars: float) -> None:
        """Says that `done` of the total are done; `scalars` are shown behind it."""
        if not self._is_shown:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        self._line = self._format(now, done, scalars)
        self._is_behind = True
        if now - self._shown_at >= self._interval:
            self._show(now)

    def close(self) -> None:
        """Shows the last line, if it has not been, and ends it."""
        if self._is_behind:
            self._show(time.monotonic())
        if self._in_place and self._line:
            self._stream.write("\n")
            self._line = ""

    def _format(self, now: float, done: int, scalars: dict[str, float]) -> str:
        of_total = "" if self._total is None else f" of {self._total:,}"
        parts = [f"{self._name}: {done:,}{of_total} {self._unit}"]
        assert self._first is not None
        seconds, since_first = now - self._first[0], done - self._first[1]
        if seconds > 0 and since_first > 0:
            rate = since_first / seconds
            parts.append(f"{rate:,.0f} {self._unit}/s")
            if self._total is not None:
                parts.append(f"{_format_time((self._total - done) / rate)} left")
        parts += [f"{name} {value:.4g}" for name, value in scalars.items()]
        return ", ".join(parts)

    def _show(self, now: float) -> None:
        # \x1b[K erases what is left of a longer line.
        text = f"\r{self._line}\x1b[K" if self._in_place else f"{self._line}\n"
        self._stream.write(text)
        self._stream.flush()
        self._shown_at, self._is_behind = now, False


def _format_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
