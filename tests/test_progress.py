"""The progress line, on a terminal and in a log."""

import io

import pytest

from sae_jax import progress
from sae_jax.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set: seconds = clock[0]."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_log_lines_come_every_ten_seconds(clock):
    stream = io.StringIO()
    line = Progress(10_000, "rows", "harvest", stream)
    for second in range(26):
        clock[0] = 100.0 + second
        line.update(second * 100)
    line.close()
    assert stream.getvalue().splitlines() == [
        "harvest: 0 of 10,000 rows",
        "harvest: 1,000 of 10,000 rows, 100 rows/s, 1:30 left",
        "harvest: 2,000 of 10,000 rows, 100 rows/s, 1:20 left",
        "harvest: 2,500 of 10,000 rows, 100 rows/s, 1:15 left",
    ]


def test_the_rate_counts_from_the_first_update(clock):
    stream = io.StringIO()
    line = Progress(20_000_000, "rows", "train", stream)
    clock[0] = 200.0
    line.update(1_000_000)
    clock[0] = 210.0
    line.update(1_020_000, loss=0.123456, l0=32.0)
    assert stream.getvalue().splitlines()[-1] == (
        "train: 1,020,000 of 20,000,000 rows, 2,000 rows/s, 2:38:10 left, "
        "loss 0.1235, l0 32"
    )


def test_a_terminal_has_one_line(clock):
    stream = Terminal()
    line = Progress(100, "steps", "train", stream)
    for tick in range(6):
        clock[0] = 100.0 + tick * 0.1
        line.update(tick)
    line.close()
    text = stream.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n")
    assert text.split("\r")[-1].startswith("train: 5 of 100 steps")
    assert text.count("\r") == 4  # at 0, 0.2 and 0.4 seconds, and when closed


def test_an_error_ends_the_line_before_it_is_told(clock):
    stream = Terminal()
    with pytest.raises(ValueError), Progress(9, "rows", "harvest", stream) as line:
        line.update(3)
        raise ValueError
    assert stream.getvalue().endswith("harvest: 3 of 9 rows\x1b[K\n")
    line.close()
    assert stream.getvalue().count("\n") == 1


def test_what_is_not_shown_writes_nothing(clock):
    stream = Terminal()
    with Progress(9, "rows", "harvest", stream, is_shown=False) as line:
        line.update(3)
    assert stream.getvalue() == ""


def test_no_update_writes_nothing():
    stream = Terminal()
    Progress(0, "rows", "harvest", stream).close()
    assert stream.getvalue() == ""
