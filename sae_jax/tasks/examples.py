"""Examples of binary tasks, and the files of JSON lines that hold them.

    {"task": "docstring", "text": "...", "position": 17, "label": 1, "heldout": false}

`position` is the index of a character of the text: what is asked is asked about the
token that holds it; without it, about the last. `label` is 0, 1, false or true. Without
`heldout`, one text in four is held out, by its hash. A text is on one side only.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_jax.files import write_whole
from sae_jax.text import is_heldout

# Of texts, or of documents where they are known, one in so many.
TASK_HELDOUT_EVERY = 4
MIN_ROWS = 2  # of each class, on each side: with fewer nothing is measured
# What a cap on a task's rows must leave room for.
LEAST_TASK_ROWS = 2 * MIN_ROWS * TASK_HELDOUT_EVERY
_FIELDS = ("task", "text", "position", "label", "heldout")
_SIDES = ("train", "held-out")


@dataclass(frozen=True)
class Example:
    """A question about a text with its answer."""

    task: str
    text: str
    position: int  # of the character whose token is asked about
    label: bool
    is_heldout: bool


def read_examples(path: str | Path) -> list[Example]:
    """The examples of the file, in its order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no example; a text is on both sides; a task has fewer
            than two rows of a class to train on or held out.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(path)!r}: give a file of JSON lines, as sae-jax tasks writes"
        )
    examples = []
    sides: dict[str, tuple[bool, int]] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            example = _read_example(line, where)
            side, first = sides.setdefault(example.text, (example.is_heldout, number))
            if side != example.is_heldout:
                raise ValueError(
                    f"{where}: this text is {_SIDES[example.is_heldout]} here and "
                    f"{_SIDES[side]} in line {first}: put a text on one side only"
                )
            examples.append(example)
    if not examples:
        raise ValueError(f"{path} holds no example: give one JSON object a line")
    _check_rows(examples, path)
    return examples


def write_examples(path: str | Path, examples: Sequence[Example]) -> None:
    """Writes the file that `read_examples` reads."""
    lines = [
        json.dumps(
            {
                "task": example.task,
                "text": example.text,
                "position": example.position,
                "label": int(example.label),
                "heldout": example.is_heldout,
            }
        )
        for example in examples
    ]
    write_whole(path, "".join(line + "\n" for line in lines))


def _read_example(line: bytes, where: str) -> Example:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"{where} is not JSON ({error}): give one JSON object a line"
        ) from None
    if not isinstance(fields, dict):
        raise ValueError(f"{where} holds {_show(fields)}, not a JSON object")
    for name in fields:
        if name not in _FIELDS:
            raise ValueError(
                f"{where}: unknown field {name!r}; known: {', '.join(_FIELDS)}"
            )
    task, text = (_read_string(fields, name, where) for name in ("task", "text"))
    heldout = fields.get("heldout")
    if heldout is None:
        heldout = is_heldout(text, TASK_HELDOUT_EVERY)
    return Example(
        task=task,
        text=text,
        position=_read_position(fields, text, where),
        label=_read_bool(fields, "label", where),
        is_heldout=_read_bool({"heldout": heldout}, "heldout", where),
    )


def _read_string(fields: dict[str, Any], name: str, where: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(
            f"{where}: {name} is {_show(value)}: give a text that is not empty"
        )
    return value


def _read_bool(fields: dict[str, Any], name: str, where: str) -> bool:
    value = fields.get(name)
    if not isinstance(value, int) or value not in (0, 1):
        raise ValueError(f"{where}: {name} is {_show(value)}: give 0, 1, false or true")
    return bool(value)


def _read_position(fields: dict[str, Any], text: str, where: str) -> int:
    value = fields.get("position")
    value = len(text) - 1 if value is None else value
    if type(value) is not int or not 0 <= value < len(text):
        raise ValueError(
            f"{where}: position is {_show(value)}, and the text has {len(text)} "
            f"characters: give the index of one, 0 to {len(text) - 1}"
        )
    return value


def _check_rows(examples: Sequence[Example], path: Path) -> None:
    counts = Counter(
        (example.task, example.is_heldout, example.label) for example in examples
    )
    for task in dict.fromkeys(task for task, _, _ in counts):
        for side, name in enumerate(_SIDES):
            n_negative = counts[task, bool(side), False]
            n_positive = counts[task, bool(side), True]
            if min(n_negative, n_positive) < MIN_ROWS:
                raise ValueError(
                    f"{path}: task {task!r} has {n_positive} {name} rows of label 1 "
                    f"and {n_negative} of label 0: give at least {MIN_ROWS} of each"
                )


def _show(value: Any) -> str:
    """The value as JSON, cut where it is long; a field that is missing is None."""
    if value is None:
        return "missing"
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
