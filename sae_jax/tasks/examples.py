"""Examples of binary tasks, and the files of JSON lines that hold them.

    {"task": "docstring", "text": "...", "position": 17, "label": 1, "heldout": false}

`position` is the index of a character of the text: what is asked is asked about the
token that holds it; without it, about the last. `label` is 0, 1, false or true. Without
`heldout`, one text in four is held out, by its hash. A text is on one side only.

An example of a pair of concepts also has `spurious`: whether the token has the other
concept, which should not matter to the label.
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
_FIELDS = ("task", "text", "position", "label", "heldout", "spurious")
_SIDES = ("train", "held-out")


@dataclass(frozen=True)
class Example:
    """A question about a text with its answer."""

    task: str
    text: str
    position: int  # of the character whose token is asked about
    label: bool
    is_heldout: bool
    spurious: bool | None = None  # of a pair, whether it has the other concept

    @property
    def kind(self) -> tuple[bool | None, bool]:
        """Of these, a task has two, or of a pair four."""
        return self.spurious, self.label


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
    lines = [json.dumps(_to_json(example)) for example in examples]
    write_whole(path, "".join(line + "\n" for line in lines))


def list_kinds(is_pair: bool) -> list[tuple[bool | None, bool]]:
    """All kinds that a task's examples have."""
    others = (False, True) if is_pair else (None,)
    return [(other, label) for other in others for label in (False, True)]


def _to_json(example: Example) -> dict[str, Any]:
    fields = {
        "task": example.task,
        "text": example.text,
        "position": example.position,
        "label": int(example.label),
        "heldout": example.is_heldout,
    }
    if example.spurious is not None:
        fields["spurious"] = int(example.spurious)
    return fields


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
        spurious=(
            _read_bool(fields, "spurious", where) if "spurious" in fields else None
        ),
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
        (example.task, example.is_heldout, example.kind) for example in examples
    )
    for task in dict.fromkeys(task for task, _, _ in counts):
        kinds = {kind for name, _, kind in counts if name == task}
        is_pair = any(spurious is not None for spurious, _ in kinds)
        if is_pair and any(spurious is None for spurious, _ in kinds):
            raise ValueError(
                f"{path}: task {task!r} has rows with `spurious` and rows without: "
                "give it to all of them, or to none"
            )
        for side, name in enumerate(_SIDES):
            kinds_there_are = list_kinds(is_pair)[::-1]
            n_rows = [counts[task, bool(side), kind] for kind in kinds_there_are]
            if min(n_rows) < MIN_ROWS:
                has = [
                    f"{n} of {_name_kind(kind)}"
                    for n, kind in zip(n_rows, kinds_there_are, strict=True)
                ]
                has[0] = has[0].replace(" of", f" {name} rows of")
                raise ValueError(
                    f"{path}: task {task!r} has {' and '.join(has)}: give at least "
                    f"{MIN_ROWS} of each"
                )


def _name_kind(kind: tuple[bool | None, bool]) -> str:
    spurious, label = kind
    named = f"label {int(label)}"
    return named if spurious is None else f"{named}, spurious {int(spurious)}"


def _show(value: Any) -> str:
    """The value as JSON, cut where it is long; a field that is missing is None."""
    if value is None:
        return "missing"
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
