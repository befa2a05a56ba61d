"""Examples of the tasks about Python source, drawn from documents.

Documents are cut into windows of whole lines, about as long as the default subject's
context; a token is asked about where enough of its window comes before it. Labels are
those of the whole file. One document in four is held out, by the hash of its name: of
what a store holds out, one in five, these are the ones that the default subject was not
trained on.

A document gives as many positives as negatives to a task, and documents give as evenly
as they can: so neither a document's style nor its length tells the label.
"""

import dataclasses
import itertools
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sae_jax.tasks.examples import LEAST_TASK_ROWS, TASK_HELDOUT_EVERY, Example
from sae_jax.tasks.labels import PAIRS, TASKS, Task, split_classes, split_kinds
from sae_jax.tasks.lexical import Facts
from sae_jax.tasks.source import Source, read_source
from sae_jax.tasks.tokens import find_lines
from sae_jax.text import Document, hash_name, is_heldout

WINDOW_CHARACTERS = 800
CHARACTERS_BEFORE = 300
# A task that cannot have as many is left out: (train, held-out).
_ENOUGH_ROWS = (48, 12)  # of each class
_ENOUGH_DOCUMENTS = (3, 3)

Indices = NDArray[np.int64]
Pair = tuple[int, int]


@dataclass(frozen=True)
class TaskCounts:
    """What the documents have of a task, and what was drawn: (train, held-out)."""

    task: Task
    population: int  # tokens that could be asked about
    share: float  # of them that are positive
    documents: Pair  # that have some of both classes
    rows: Pair  # drawn of each class
    # Of the held-out rows drawn, how many are guessed right from the spelling of the
    # token alone, as the train documents have it: 0.5 is chance.
    by_spelling: float


@dataclass(frozen=True)
class PythonExamples:
    """Examples in the order of their tasks, and how they came about."""

    examples: list[Example]
    pairs: list[Example]  # of two concepts, as many of each of four kinds
    tasks: list[TaskCounts]
    left_out: list[Task]  # with too few rows or documents
    n_documents: int
    n_passed_over: int  # that are no Python


@dataclass(frozen=True, eq=False)
class _Pool:
    """The tokens of one document that can be asked about; arrays are over them."""

    is_heldout: bool
    windows: list[str]
    window_n: Indices
    position_n: Indices  # of the token's last character in its window
    spelling_n: Indices  # the same number for the same text, in all documents
    facts: Facts


class _Row(NamedTuple):
    """A token of a document, as an index into its pool, and which kind it is."""

    pool: int
    token: int
    kind: int

    @property
    def label(self) -> bool:
        return bool(self.kind % 2)


def python_examples(
    documents: Sequence[Document], rows_per_task: int, seed: int
) -> PythonExamples:
    """At most `rows_per_task` examples of each task, three in four of them to train on.

    Raises:
        ValueError: the documents carry no task; too few rows are asked for.
    """
    if rows_per_task < LEAST_TASK_ROWS:
        raise ValueError(
            f"{rows_per_task} rows of a task hold out too few of each class: ask for "
            f"{LEAST_TASK_ROWS} or more"
        )
    pools = _read_pools(documents)
    examples: list[Example] = []
    kept: list[TaskCounts] = []
    left_out: list[Task] = []
    for task in TASKS:
        counts, drawn = _draw_task(task, pools, rows_per_task, seed)
        if min(counts.rows) == 0:
            left_out.append(task)
            continue
        kept.append(counts)
        examples += drawn
    if not kept:
        raise ValueError(
            f"{len(documents)} documents, {len(pools)} of them Python, carry none of "
            f"the {len(TASKS)} tasks: give more Python source, in many files"
        )
    pairs = [
        example
        for pair in PAIRS
        for example in _draw_pair(pair, pools, rows_per_task, seed)
    ]
    n_passed_over = len(documents) - len(pools)
    return PythonExamples(
        examples, pairs, kept, left_out, len(documents), n_passed_over
    )


def format_counts(generated: PythonExamples) -> str:
    """The tasks as a table of at most 80 columns, each with its meaning."""
    lines = [
        f"{len(generated.tasks)} tasks, {len(generated.examples):,} examples, from "
        f"{generated.n_documents:,} documents; {generated.n_passed_over} are no Python",
        "Rows of each class and documents are train + held-out; by spelling is what",
        "the token's spelling alone gets right of the held-out rows.",
        "",
        f"{'task':<20}{'population':>12}{'positive':>10}{'rows':>13}{'documents':>11}"
        f"{'by spelling':>13}",
    ]
    for counts in generated.tasks:
        rows, documents = (f"{a} + {b}" for a, b in (counts.rows, counts.documents))
        lines += [
            f"{counts.task.name:<20}{counts.population:>12,}{counts.share:>10.1%}"
            f"{rows:>13}{documents:>11}{counts.by_spelling:>13.2f}",
            f"    {counts.task.among}: {counts.task.meaning}",
        ]
    if generated.left_out:
        names = ", ".join(task.name for task in generated.left_out)
        left_out = f"left out, with too few rows or documents: {names}"
        lines += ["", *textwrap.wrap(left_out, 80)]
    return "\n".join(lines)


def cut_windows(text: str) -> list[Pair]:
    """(start, end) of runs of whole lines, one behind the other, as long as may be.

    A line that is longer than a window is in none.
    """
    windows, start = [], 0
    edges = [min(edge, len(text)) for edge in find_lines(text)]
    for line, following in itertools.pairwise(edges):
        if following - start > WINDOW_CHARACTERS:
            windows.append((start, line))
            start = line
        if following - start > WINDOW_CHARACTERS:
            start = following
    return [(a, b) for a, b in [*windows, (start, len(text))] if a < b]


def _read_pools(documents: Sequence[Document]) -> list[_Pool]:
    """The documents that are Python, in the order of their names."""
    pools = []
    spellings: dict[str, int] = {}
    taken: set[str] = set()
    for document in sorted(documents, key=lambda each: (each.name, each.text)):
        source = read_source(document.text)
        if source is None:
            continue
        windows = []
        for start, end in cut_windows(source.text):
            # The first document that has a text takes it: none is on both sides.
            if source.text[start:end] not in taken:
                taken.add(source.text[start:end])
                windows.append((start, end))
        heldout = is_heldout(document.name, TASK_HELDOUT_EVERY)
        pools.append(_read_pool(source, windows, heldout, spellings))
    return pools


def _read_pool(
    source: Source, windows: list[Pair], heldout: bool, spellings: dict[str, int]
) -> _Pool:
    texts = [source.text[start:end] for start, end in windows]
    firsts = [_find_first_places(text) for text in texts]
    asked: list[tuple[int, int, int, int, bool]] = []
    window = 0
    for index, token in enumerate(source.tokens):
        while window < len(windows) and windows[window][1] < token.end:
            window += 1
        if window == len(windows):
            break
        start = token.start - windows[window][0]
        last = token.end - 1 - windows[window][0]
        # A token that begins before its window has its start below 0.
        if start >= 0 and last >= CHARACTERS_BEFORE:
            spelling = spellings.setdefault(token.text, len(spellings))
            is_seen = firsts[window].get(token.text, start) < start
            asked.append((index, window, last, spelling, is_seen))
    columns = np.array(asked, np.int64).reshape(-1, 5).T
    facts = {name: fact_n[columns[0]] for name, fact_n in source.facts.items()}
    facts["seen_before"] = columns[4].astype(bool)
    return _Pool(heldout, texts, columns[1], columns[2], columns[3], facts)


def _find_first_places(text: str) -> dict[str, int]:
    """Where each word of the text occurs first."""
    places: dict[str, int] = {}
    for word in re.finditer(r"\w+", text):
        places.setdefault(word[0], word.start())
    return places


def _draw_task(
    task: Task, pools: Sequence[_Pool], n_rows: int, seed: int
) -> tuple[TaskCounts, list[Example]]:
    """The task's counts and its examples: no rows where a side has too little."""
    rng = np.random.default_rng([seed, hash_name(task.name)])
    classes = [split_classes(task, pool.facts) for pool in pools]
    n_heldout = n_rows // 2 // TASK_HELDOUT_EVERY
    sides = [
        _draw_side(side, pools, classes, n, rng)
        for side, n in enumerate((n_rows // 2 - n_heldout, n_heldout))
    ]
    sizes_2 = np.sum([[*map(len, both)] for both in classes], axis=0, initial=0)
    counts = TaskCounts(
        task=task,
        population=int(sizes_2.sum()),
        share=float(sizes_2[1] / max(1, sizes_2.sum())),
        documents=(sides[0][1], sides[1][1]),
        rows=(len(sides[0][0]) // 2, len(sides[1][0]) // 2),
        by_spelling=_guess_by_spelling(pools, classes, sides[1][0]),
    )
    examples = [
        _make_example(task, pools[row.pool], row) for rows, _ in sides for row in rows
    ]
    return counts, examples


def _draw_pair(
    pair: tuple[Task, Task], pools: Sequence[_Pool], n_rows: int, seed: int
) -> list[Example]:
    """Rows with neither of two concepts, with either, and with both, equally many."""
    name = f"{pair[0].name}, not {pair[1].name}"
    rng = np.random.default_rng([seed, hash_name(name)])
    kinds = [split_kinds(pair, pool.facts) for pool in pools]
    n_heldout = n_rows // 4 // TASK_HELDOUT_EVERY
    sides = [
        _draw_side(side, pools, kinds, n, rng)[0]
        for side, n in enumerate((n_rows // 4 - n_heldout, n_heldout))
    ]
    if not all(sides):
        return []
    return [
        dataclasses.replace(
            _make_example(pair[0], pools[row.pool], row),
            task=name,
            spurious=row.kind >= 2,
        )
        for side in sides
        for row in side
    ]


def _draw_side(
    side: int,
    pools: Sequence[_Pool],
    classes: Sequence[tuple[Indices, ...]],
    wanted: int,
    rng: np.random.Generator,
) -> tuple[list[_Row], int]:
    """Rows of a side, `wanted` of each class at most, and how many documents can give.

    None where all that there are would be too few.
    """
    available = {
        index: min(map(len, classes[index]))
        for index, pool in enumerate(pools)
        if pool.is_heldout == bool(side) and min(map(len, classes[index]))
    }
    rows: list[_Row] = []
    n_rows, n_documents = sum(available.values()), len(available)
    if n_rows < _ENOUGH_ROWS[side] or n_documents < _ENOUGH_DOCUMENTS[side]:
        return rows, n_documents
    order = [int(index) for index in rng.permutation(list(available))]
    shares = _share([available[index] for index in order], wanted)
    for index, share in sorted(zip(order, shares, strict=True)):
        for kind, tokens in enumerate(classes[index]):
            drawn = np.sort(rng.permutation(tokens)[:share])
            rows += [_Row(index, int(token), kind) for token in drawn]
    return rows, n_documents


def _share(available: Sequence[int], wanted: int) -> list[int]:
    """What each gives to `wanted` in all: as evenly as may be, the first one more."""
    shares = [0] * len(available)
    while wanted and shares != list(available):
        for index, most in enumerate(available):
            if wanted and shares[index] < most:
                shares[index] += 1
                wanted -= 1
    return shares


def _guess_by_spelling(
    pools: Sequence[_Pool],
    classes: Sequence[tuple[Indices, Indices]],
    rows: Sequence[_Row],
) -> float:
    """How many of the rows are guessed from how often, in the train documents, their
    spelling is that of a token of each class; an unknown one is half guessed."""
    if not rows:
        return 0.5
    n_spellings = 1 + max(int(np.max(pool.spelling_n, initial=0)) for pool in pools)
    frequencies = []
    for label in (0, 1):
        spellings = [
            pool.spelling_n[both[label]]
            for pool, both in zip(pools, classes, strict=True)
            if not pool.is_heldout
        ]
        counts = np.bincount(np.concatenate(spellings), minlength=n_spellings)
        frequencies.append(counts / max(1, int(np.sum(counts))))
    lean = frequencies[1] - frequencies[0]
    guesses = [np.sign(lean[pools[row.pool].spelling_n[row.token]]) for row in rows]
    signs = [1 if row.label else -1 for row in rows]
    return float(0.5 + 0.5 * np.mean(np.multiply(guesses, signs)))


def _make_example(task: Task, pool: _Pool, row: _Row) -> Example:
    text = pool.windows[pool.window_n[row.token]]
    position = int(pool.position_n[row.token])
    return Example(task.name, text, position, row.label, pool.is_heldout)
