"""Files of binary tasks: what is written is read, and what is wrong is named."""

import json
import os
import subprocess
import sys

import pytest

from sae_jax.tasks import Example, list_kinds, read_examples, write_examples
from sae_jax.text import is_heldout

# Two rows of each class on each side.
ROWS = [
    {"task": "t", "text": f"text {i}", "label": i % 2, "heldout": i < 4}
    for i in range(8)
]


def _write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def _dump(rows):
    return [json.dumps(row) for row in rows]


def test_examples_round_trip(tmp_path):
    examples = [
        Example("é", f"línea {i}\n\u2028\t\"'", i % 3, bool(i % 2), i >= 4)
        for i in range(8)
    ]
    path = tmp_path / "tasks.jsonl"
    write_examples(path, examples)
    assert read_examples(path) == examples
    fields = json.loads(path.read_text().splitlines()[5])
    assert fields == {
        "task": "é",
        "text": examples[5].text,
        "position": 2,
        "label": 1,
        "heldout": True,
    }


def test_fields_that_may_be_absent(tmp_path):
    lines = [
        json.dumps({"task": "t", "text": f"row {i}", "label": bool(i % 2)})
        for i in range(60)
    ]
    examples = read_examples(_write(tmp_path / "t.jsonl", *lines, "", "  "))
    assert [example.position for example in examples] == [4] * 10 + [5] * 50
    assert [example.label for example in examples] == [False, True] * 30
    sides = [is_heldout(f"row {i}", 4) for i in range(60)]
    assert [example.is_heldout for example in examples] == sides
    assert 5 < sum(sides) < 25


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 9 is not JSON .*give one JSON object a line"),
        ("[1]", r"line 9 holds \[1\], not a JSON object"),
        ('{"text": "a", "label": 1}', "line 9: task is missing"),
        ('{"task": "t", "label": 1}', "line 9: text is missing"),
        ('{"task": "t", "text": "", "label": 1}', 'line 9: text is "": give a text'),
        ('{"task": 3, "text": "a", "label": 1}', "line 9: task is 3"),
        ('{"task": "t", "text": "a"}', "line 9: label is missing: give 0, 1, false"),
        ('{"task": "t", "text": "a", "label": 2}', "line 9: label is 2: give 0, 1"),
        ('{"task": "t", "text": "a", "label": "1"}', 'line 9: label is "1"'),
        ('{"task": "t", "text": "a", "label": 1.0}', "line 9: label is 1.0"),
        (
            '{"task": "t", "text": "ab", "label": 1, "position": 2}',
            "line 9: position is 2, and the text has 2 characters: .* 0 to 1",
        ),
        ('{"task": "t", "text": "ab", "label": 1, "position": -1}', "position is -1"),
        ('{"task": "t", "text": "ab", "label": 1, "position": true}', "is true"),
        (
            '{"task": "t", "text": "ab", "label": 1, "heldout": "no"}',
            'line 9: heldout is "no": give 0, 1, false or true',
        ),
        (
            '{"task": "t", "text": "ab", "label": 1, "split": "train"}',
            "line 9: unknown field 'split'; known: task, text, position",
        ),
        (
            '{"task": "u", "text": "text 2", "label": 1, "heldout": 0}',
            "line 9: this text is train here and held-out in line 3: put a text on one",
        ),
        (
            '{"task": "u", "text": "text 5", "label": 1, "heldout": 1}',
            "line 9: this text is held-out here and train in line 6: put a text on one",
        ),
        (
            '{"task": "one", "text": "a", "label": 1, "heldout": 0}',
            "task 'one' has 1 train rows of label 1 and 0 of label 0: give at least 2",
        ),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path, line, message):
    path = _write(tmp_path / "tasks.jsonl", *_dump(ROWS), line)
    with pytest.raises(ValueError, match=message) as error:
        read_examples(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    "left_out, message",
    [
        ((0,), "task 't' has 2 held-out rows of label 1 and 1 of label 0"),
        ((1, 3), "task 't' has 0 held-out rows of label 1 and 2 of label 0"),
        ((4, 6), "task 't' has 2 train rows of label 1 and 0 of label 0"),
    ],
)
def test_a_task_needs_two_rows_of_each_class_on_each_side(tmp_path, left_out, message):
    rows = [row for i, row in enumerate(ROWS) if i not in left_out]
    with pytest.raises(ValueError, match=message):
        read_examples(_write(tmp_path / "tasks.jsonl", *_dump(rows)))


def test_a_file_without_examples_is_refused(tmp_path):
    with pytest.raises(ValueError, match="empty.jsonl holds no example: give one"):
        read_examples(_write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(FileNotFoundError, match="no file .*none.jsonl': give a file"):
        read_examples(tmp_path / "none.jsonl")


def test_the_command_writes_what_can_be_read(tmp_path):
    block = "def f{0}(a):\n    b = a.c(a, {0})\n    for d in b:\n        print(d, b)\n"
    for i in range(20):
        source = "\n".join(block.format(f"1{i}{j}") for j in range(40))
        (tmp_path / f"m{i}.py").write_text(source)
    command = "from sae_jax.cli import main; main()"
    flags = ["--out=t.jsonl", f"--text={tmp_path}", "--heldout_every=1", "--rows=16"]
    done = subprocess.run(
        [sys.executable, "-c", command, "tasks", *flags],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    examples = read_examples(tmp_path / "t.jsonl")
    tasks = {example.task for example in examples}
    assert len(examples) == 16 * len(tasks)
    first, *_, last = done.stdout.splitlines()
    assert first == (
        f"{len(tasks)} tasks, {len(examples):,} examples, from 20 documents; "
        "0 are no Python"
    )
    assert last == "t.jsonl" and all(f"\n{task} " in done.stdout for task in tasks)


def _pair(**changed):
    rows = [
        {"task": "p", "text": f"t{i}{side}", "label": label, "spurious": other}
        | {"heldout": side}
        for i in range(2)
        for side in (0, 1)
        for other in (0, 1)
        for label in (0, 1)
    ]
    return [row | changed if i == 3 else row for i, row in enumerate(rows)]


def test_a_pair_round_trips(tmp_path):
    path = _write(tmp_path / "pair.jsonl", *_dump(_pair()))
    examples = read_examples(path)
    assert [example.kind for example in examples[:4]] == list_kinds(is_pair=True)
    write_examples(tmp_path / "again.jsonl", examples)
    assert read_examples(tmp_path / "again.jsonl") == examples


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"spurious": 2}, "spurious is 2: give 0, 1"),
        (
            {"spurious": 0},
            "has 1 train rows of label 1, spurious 1 and 2 of label 0, spurious 1 "
            "and 3 of label 1, spurious 0 and 2 of label 0, spurious 0: give at least",
        ),
    ],
)
def test_a_pair_has_rows_of_four_kinds(tmp_path, changed, message):
    path = _write(tmp_path / "pair.jsonl", *_dump(_pair(**changed)))
    with pytest.raises(ValueError, match=message):
        read_examples(path)


def test_a_task_is_a_pair_or_is_not(tmp_path):
    rows = _pair()
    del rows[5]["spurious"]
    path = _write(tmp_path / "pair.jsonl", *_dump(rows))
    with pytest.raises(ValueError, match="'p' has rows with `spurious` and rows with"):
        read_examples(path)
