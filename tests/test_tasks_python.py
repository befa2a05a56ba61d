"""The tasks about Python source: every label by hand, then what examples promise."""

import re
from collections import Counter, defaultdict

import pytest
from task_cases import CASES

from sae_jax.tasks import TASKS, format_counts, python_examples
from sae_jax.tasks.labels import split_classes
from sae_jax.tasks.python import CHARACTERS_BEFORE, WINDOW_CHARACTERS, cut_windows
from sae_jax.tasks.source import read_source
from sae_jax.text import Document, is_heldout, read_standard_library

# The one task whose label is not of the whole file, but of a window.
OF_WINDOWS = {"seen_before"}


def _ask(name, source):
    """The population's tokens, by answer."""
    (task,) = (task for task in TASKS if task.name == name)
    read = read_source(source)
    assert read is not None
    negatives, positives = split_classes(task, read.facts)
    answers = positives, negatives
    return tuple(" ".join(read.tokens[i].text for i in answer) for answer in answers)


@pytest.mark.parametrize(
    "name, source, yes, no", CASES, ids=[name for name, *_ in CASES]
)
def test_labels_are_those_given_by_hand(name, source, yes, no):
    assert _ask(name, source) == (yes, no)


def test_every_task_has_a_case():
    assert {case[0] for case in CASES} | OF_WINDOWS == {task.name for task in TASKS}
    assert len(TASKS) == len({task.name for task in TASKS})


@pytest.fixture(scope="module")
def library():
    return [each for each in read_standard_library() if is_heldout(each.name, 10)]


@pytest.fixture(scope="module")
def generated(library):
    return python_examples(library, 200, seed=3)


def _word(example):
    """The word of the text that ends at the position."""
    return re.search(r"\w*$", example.text[: example.position + 1])[0]


def test_classes_and_sides_are_as_stated(generated):
    assert len(generated.tasks) >= 40
    rows = defaultdict(Counter)
    for example in generated.examples:
        rows[example.task][example.is_heldout, example.label] += 1
    assert list(rows) == [counts.task.name for counts in generated.tasks]
    for counts in generated.tasks:
        train, heldout = counts.rows
        found = rows[counts.task.name]
        assert found == {
            (False, False): train,
            (False, True): train,
            (True, False): heldout,
            (True, True): heldout,
        }
        assert (48 <= train <= 75) and (12 <= heldout <= 25), counts
        assert 0 < counts.share < 1 and counts.population >= 2 * (train + heldout)
    assert sum(counts.rows == (75, 25) for counts in generated.tasks) > 35
    kept = {counts.task for counts in generated.tasks}
    assert kept.isdisjoint(generated.left_out)
    assert kept.union(generated.left_out) == set(TASKS)


def test_sides_are_of_documents_that_give_both_classes_alike(library, generated):
    sides = defaultdict(set)
    labels = defaultdict(Counter)
    for example in generated.examples:
        sides[example.text].add(example.is_heldout)
    assert all(len(both) == 1 for both in sides.values())
    owners = {
        text: document.name
        for document in reversed(library)
        for text in (document.text[a:b] for a, b in cut_windows(document.text))
    }
    for example in generated.examples:
        name = owners[example.text]
        assert example.is_heldout == is_heldout(name, 4)
        labels[example.task, name][example.label] += 1
    assert all(counts[True] == counts[False] for counts in labels.values())
    assert len({name for _, name in labels}) > 40


def test_a_text_that_two_documents_have_is_on_one_side(library):
    some = library[:20]
    copies = [Document(f"copy of {each.name}", each.text) for each in some]
    both = zip(some, copies, strict=True)
    moved = [is_heldout(a.name, 4) != is_heldout(b.name, 4) for a, b in both]
    assert any(moved)
    sides = defaultdict(set)
    for example in python_examples([*some, *copies], 40, seed=3).examples:
        sides[example.text].add(example.is_heldout)
    assert sides and all(len(both) == 1 for both in sides.values())


def test_examples_hold_by_their_text_alone(generated):
    """What the characters themselves tell, read in another way than the labels were."""
    behind = {
        "then_closing": r"[)\]}]",
        "then_newline": r"\n",
        "then_call": r"\(",
        "then_dot": r"\.",
        "then_comma": r",",
        "then_colon": r":",
        "then_equals": r" ?=(?!=)",
    }
    checked = Counter()
    for example in generated.examples:
        text, position = example.text, example.position
        assert CHARACTERS_BEFORE <= position < len(text) <= WINDOW_CHARACTERS
        label = None
        if example.task in behind:
            label = bool(re.match(behind[example.task], text[position + 1 :]))
        elif example.task == "seen_before":
            word = _word(example)
            before = text[: position + 1 - len(word)]
            label = re.search(rf"\b{word}\b", before) is not None
        elif example.task == "own_line_comment":
            label = text[: position].rpartition("\n")[2].lstrip().startswith("#")
        elif example.task == "of_self":
            label = re.search(r"\bself\s*\.\s*\w+$", text[: position + 1]) is not None
        if label is not None:
            assert label == example.label, (example.task, text, position)
            checked[example.task] += 1
    assert len(checked) == len(behind) + 3 and min(checked.values()) >= 100


def test_one_spelling_where_uses_of_it_are_told_apart(generated):
    spellings = defaultdict(set)
    for example in generated.examples:
        spellings[example.task].add(_word(example) or example.text[example.position])
    by_spelling = {counts.task.name: counts.by_spelling for counts in generated.tasks}
    assert spellings["argument_comma"] == {","}
    assert by_spelling["argument_comma"] == 0.5
    # Which of these there are rows enough for depends on the Python version.
    assert spellings["in_of_for"] <= {"in"} and spellings["none_default"] <= {"None"}
    assert by_spelling["builtin"] > 0.7
    assert sum(share < 0.75 for share in by_spelling.values()) > 40


def test_the_seed_draws_and_the_order_of_documents_does_not(library):
    some = library[:20]
    first, again, other = (
        python_examples(documents, 40, seed)
        for documents, seed in ((some, 3), (some[::-1], 3), (some, 4))
    )
    assert len(first.tasks) > 10
    assert again == first
    assert other.examples != first.examples
    assert [counts.share for counts in other.tasks] == [
        counts.share for counts in first.tasks
    ]


def test_the_table_states_balance_and_split(generated):
    table = format_counts(generated)
    assert max(map(len, table.splitlines())) <= 88
    for counts in generated.tasks:
        start = counts.task.name + " "
        line = next(line for line in table.splitlines() if line.startswith(start))
        assert f"{counts.share:.1%}" in line
        assert "{} + {}".format(*counts.rows) in line
        assert f"{counts.task.among}: {counts.task.meaning}" in table


def test_windows_are_whole_lines_one_behind_the_other():
    long = "x" * 801 + "\n"
    text = "".join(f"line {i}\n" for i in range(300)) + long + "last\x0c\nline"
    windows = cut_windows(text)
    assert [text[a:b] for a, b in windows][-1] == "last\x0c\nline"
    covered = "".join(text[a:b] for a, b in windows)
    assert covered == text.replace(long, "")
    assert all(b - a <= WINDOW_CHARACTERS for a, b in windows)
    assert all(text[b - 1] == "\n" for _, b in windows[:-1])
    assert all(b - a > WINDOW_CHARACTERS - 10 for a, b in windows[:-2])
    assert cut_windows("") == []


def test_places_count_characters_and_not_bytes():
    source = "é = 'ünï'; naïve = é.b(c)  # ö\n"
    read = read_source(source)
    for fact, found in (("stored", "é naïve"), ("loaded", "é c"), ("attribute", "b")):
        texts = [read.tokens[i].text for i in read.facts[fact].nonzero()[0]]
        assert " ".join(texts) == found
    assert all(source[t.start : t.end] == t.text for t in read.tokens)


def test_what_is_no_python_is_passed_over(library):
    texts = ["def f(:\n", "x = 1\r\n", "  x\n y\n", "x = '''\n", "(" * 500 + ")" * 500]
    assert [read_source(text) for text in texts] == [None] * 5
    broken = [Document(f"broken{i}.py", text) for i, text in enumerate(texts)]
    generated = python_examples([*library[:40], *broken], 16, seed=0)
    assert (generated.n_documents, generated.n_passed_over) == (45, 5)
    assert "45 documents; 5 are no Python" in format_counts(generated)


def test_refusals():
    documents = [Document("a.py", "x = 1\n"), Document("b.txt", "no python here")]
    with pytest.raises(ValueError, match="2 documents, 1 of them Python, carry none"):
        python_examples(documents, 1000, seed=0)
    with pytest.raises(ValueError, match="15 rows of a task .*ask for 16 or more"):
        python_examples(documents, 15, seed=0)


def test_pairs_have_as_many_rows_of_each_of_four_kinds(generated):
    assert len({example.task for example in generated.pairs}) >= 5
    for task in {example.task for example in generated.pairs}:
        of_task = [example for example in generated.pairs if example.task == task]
        for side in (False, True):
            kinds = Counter(e.kind for e in of_task if e.is_heldout == side)
            assert len(kinds) == 4 and len(set(kinds.values())) == 1, task


def test_both_labels_of_a_pair_are_those_of_its_tasks(generated):
    """Tokens that a task and a pair both ask about have the same answers."""
    asked = {(e.task, e.text, e.position): e.label for e in generated.examples}
    n_shared = 0
    for example in generated.pairs:
        wanted, other = example.task.split(", not ")
        for task, label in ((wanted, example.label), (other, example.spurious)):
            known = asked.get((task, example.text, example.position))
            n_shared += known is not None
            assert known in (None, label)
    assert n_shared > 5
