"""Where metrics go: JSON lines, TensorBoard, or a list in memory for notebooks.

A writer has `write(step, scalars)` and `close()`. A run that resumes at step s first
drops what an earlier life wrote after s, so every step stands in the file once.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from sae_jax.files import is_full_disk, write_whole

Scalars = Mapping[str, float]


class Writer(Protocol):
    """Takes named scalars of one step."""

    def write(self, step: int, scalars: Scalars) -> None: ...

    def close(self) -> None: ...


class JsonLinesWriter:
    """One JSON object a line, flushed at once: {"step": …, name: value, …}."""

    def __init__(self, path: str | Path, start_step: int = 0):
        self._path = Path(path)
        with self._failure_in_one_line():
            _drop_lines_after(self._path, start_step)
            self._file = open(self._path, "a", encoding="utf-8")

    def write(self, step: int, scalars: Scalars) -> None:
        with self._failure_in_one_line():
            self._file.write(json.dumps({"step": step, **scalars}) + "\n")
            self._file.flush()

    def close(self) -> None:
        with self._failure_in_one_line():  # what could not be written is tried again
            self._file.close()

    @contextlib.contextmanager
    def _failure_in_one_line(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            is_full = is_full_disk(error)
            cause = "the disk is full" if is_full else error.strerror
            raise OSError(
                error.errno,
                f"{self._path} could not be written ({cause}): "
                f"{'make room' if is_full else 'see to that'}, and run the same "
                "command again; it goes on from the last whole checkpoint",
            ) from error


class TensorBoardWriter:
    """Event files that `tensorboard --logdir` shows."""

    def __init__(self, directory: str | Path, start_step: int = 0):
        import tensorboardX  # takes seconds: it brings every cloud's client

        # The queue has no end: when the disk is full its reader dies, and a run that
        # waits for room in it would wait for ever.
        self._writer = tensorboardX.SummaryWriter(
            str(directory), purge_step=start_step + 1, max_queue=0
        )

    def write(self, step: int, scalars: Scalars) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        # A full disk must not hide the error that ended the run: the JSON lines are
        # the record, these events a view of it. Nor is it to be tried again at exit.
        events = self._writer.file_writer.event_writer
        try:
            self._writer.close()
        except OSError:
            events._closed = True


class MemoryWriter:
    """Keeps every row in `rows`, for notebooks and tests."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def write(self, step: int, scalars: Scalars) -> None:
        self.rows.append({"step": step, **scalars})

    def close(self) -> None:
        pass


class Writers:
    """Several writers as one."""

    def __init__(self, writers: Sequence[Writer]):
        self._writers = writers

    def write(self, step: int, scalars: Scalars) -> None:
        for writer in self._writers:
            writer.write(step, scalars)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # all of them, also if one fails
            for writer in self._writers:
                stack.callback(writer.close)


def read_json_lines(path: str | Path) -> list[dict[str, float]]:
    """All complete lines of a metrics file; none where there is no file yet.

    A line cut off by a kill is left out.
    """
    path, rows = Path(path), []
    if not path.exists():
        return []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _drop_lines_after(path: Path, step: int) -> None:
    kept = [row for row in read_json_lines(path) if row["step"] <= step]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
