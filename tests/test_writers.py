"""Metric writers."""

import errno
import json
from pathlib import Path

import pytest

from sae_jax import writers


def test_json_lines_resume_drops_later_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = writers.JsonLinesWriter(path)
    for step in (1, 2, 3):
        first.write(step, {"loss": step / 2})
    first.close()
    second = writers.JsonLinesWriter(path, start_step=2)
    second.write(3, {"loss": 9.0})
    second.close()
    rows = writers.read_json_lines(path)
    assert rows == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 9.0},
    ]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 1.0}) + '\n{"step": 2, "lo')
    assert [row["step"] for row in writers.read_json_lines(path)] == [1]
    writers.JsonLinesWriter(path, start_step=1).close()
    assert path.read_text().endswith("}\n")


def test_several_writers_get_the_same(tmp_path):
    one, two = writers.MemoryWriter(), writers.MemoryWriter()
    both = writers.Writers([one, two])
    both.write(4, {"loss": 1.0})
    both.close()
    assert one.rows == two.rows == [{"step": 4, "loss": 1.0}]


def test_a_full_disk_is_told_with_file_and_cure():
    writer = writers.JsonLinesWriter.__new__(writers.JsonLinesWriter)
    writer._path, writer._file = Path("run/metrics.jsonl"), open("/dev/full", "w")
    message = "run/metrics.jsonl could not be written .the disk is full.: make room, "
    memory = writers.MemoryWriter()
    memory.close = lambda: memory.rows.append("closed")
    both = writers.Writers([memory, writer])
    for action in (lambda: writer.write(1, {"loss": 1.0}), both.close):
        with pytest.raises(OSError, match=message) as caught:
            action()
        assert caught.value.errno == errno.ENOSPC
    assert memory.rows == ["closed"]


def test_tensorboard_writes_an_event_file(tmp_path):
    writer = writers.TensorBoardWriter(tmp_path)
    writer.write(1, {"loss": 1.0})
    writer.close()
    (events,) = tmp_path.iterdir()
    assert b"loss" in events.read_bytes()
