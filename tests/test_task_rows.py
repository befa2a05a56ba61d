"""Rows of tasks against a subject run on one example at a time."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_subjects import CONFIG, make_tokenizer, make_weights

from sae_jax.config import MeshConfig
from sae_jax.evals import EvaluateConfig
from sae_jax.evals.context import Context
from sae_jax.evals.task_rows import measure_pair_rows, measure_task_rows
from sae_jax.mesh import make_mesh, replicated
from sae_jax.subjects import Subject
from sae_jax.tasks import Example, list_kinds, write_examples
from sae_jax.text import Document, is_heldout

SITE, T = "resid_post.1", CONFIG.context_length
# One token a byte. Longer than a context of 12 tokens, and shorter; two of several
# bytes a character.
TEXTS = [
    "a short one",
    "one that is longer than a context of the subject",
    "naïve café — 漢字 in it",
    *(f"text {i} " + "." * i for i in range(9)),
]


@pytest.fixture(scope="module")
def subject():
    return Subject(make_weights(CONFIG, 0), CONFIG, make_tokenizer(), "tiny", "0", 0)


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    return [
        Example(task, text, int(rng.integers(len(text))), bool(row % 2), i % 4 == 0)
        for task in ("first", "second")
        for i, text in enumerate(TEXTS)
        for row in range(8)
    ]


def _make_context(subject, mesh_shape=(1, 1), seed=0, bos="document", **changed):
    mesh = make_mesh(MeshConfig(*mesh_shape))
    manifest = SimpleNamespace(
        heldout_every=5, context_length=T, bos=bos, bos_id=None if bos == "none" else 7
    )
    return Context(
        **{
            "sae": SimpleNamespace(d_model=CONFIG.d_model, site=SITE, mesh=mesh),
            "subject": jax.device_put(subject, replicated(mesh)),
            "store": SimpleNamespace(manifest=manifest),
            "site": SITE,
            "mesh": mesh,
            "seed": seed,
            "progress": False,
        }
        | changed
    )


def _measure(context, path, task_rows=1000, batch_sequences=3):
    config = EvaluateConfig(
        tasks=str(path), task_rows=task_rows, batch_sequences=batch_sequences
    )
    return measure_task_rows(context, config)


@pytest.fixture(scope="module")
def path(examples, tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    write_examples(path, examples)
    return path


def _run_alone(subject, example, first=()):
    """The row of the example, its context cut as the module says, behind `first`."""
    token = len(example.text[: example.position + 1].encode()) - 1
    room = T - len(first)
    start = 0 if token < room else -(-(token + 1 - room) // (room // 4)) * (room // 4)
    assert token - start < room and (start == 0 or token - start >= 3 * room // 4 - 1)
    # What comes behind does not matter.
    tokens_1t = np.full((1, T), 77, np.int32)
    known = [*first, *subject.encode(example.text)[start : token + 1]]
    tokens_1t[0, : len(known)] = known
    return np.asarray(_forward(subject, tokens_1t)[0, len(known) - 1])


@jax.jit
def _forward(subject, tokens_1t):
    return subject.forward(tokens_1t, capture=[SITE])[1][SITE]


@pytest.mark.parametrize(
    ("bos", "first"), [("document", ()), ("context", (7,)), ("none", ())]
)
def test_rows_are_those_of_each_example_alone(subject, examples, path, bos, first):
    measured = _measure(_make_context(subject, bos=bos), path)
    assert [rows.name for rows in measured] == ["first", "second"]
    for rows in measured:
        its = [example for example in examples if example.task == rows.name]
        assert len(its) == len(rows.labels_n)
        assert rows.acts_nd.dtype == np.float32
        np.testing.assert_array_equal(rows.labels_n, [e.label for e in its])
        np.testing.assert_array_equal(rows.heldout_n, [e.is_heldout for e in its])
        texts = [TEXTS[i] for i in rows.texts_n]
        assert texts == [example.text for example in its]
        want_nd = [_run_alone(subject, example, first) for example in its]
        np.testing.assert_allclose(rows.acts_nd, want_nd, rtol=1e-4, atol=1e-5)


def test_meshes_agree_and_a_context_is_measured_once(subject, path):
    context = _make_context(subject, (2, 4))
    sharded = _measure(context, path)
    again = _measure(context, path)
    assert all(a is b for a, b in zip(again, sharded, strict=True))
    alone = _measure(_make_context(subject), path)
    for ours, other in zip(alone, sharded, strict=True):
        np.testing.assert_allclose(ours.acts_nd, other.acts_nd, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(ours.texts_n, other.texts_n)


def test_a_cap_leaves_halves_of_each_side_drawn_by_the_seed(subject, path):
    capped, again, other = (
        _measure(_make_context(subject, seed=seed), path, 20) for seed in (1, 1, 2)
    )
    for rows in capped:
        sides = {
            (side, label): np.sum((rows.heldout_n == side) & (rows.labels_n == label))
            for side in (False, True)
            for label in (False, True)
        }
        train = {(False, False): 8, (False, True): 8}
        assert sides == train | {(True, False): 2, (True, True): 2}
    assert all(
        np.array_equal(a.acts_nd, b.acts_nd) for a, b in zip(capped, again, strict=True)
    )
    assert not np.array_equal(capped[0].acts_nd, other[0].acts_nd)


def test_a_pair_has_as_many_rows_of_each_kind_and_is_no_task(subject, tmp_path):
    rng = np.random.default_rng(0)
    kinds = list_kinds(is_pair=True)
    pair = [
        Example("pair", text, int(rng.integers(len(text))), label, i % 4 == 0, other)
        for i, text in enumerate(TEXTS)
        for other, label in (*kinds, *kinds, *kinds, kinds[1])
    ]
    task = [dataclasses.replace(e, task="task", spurious=None) for e in pair]
    write_examples(tmp_path / "t.jsonl", pair + task)
    context, config = _make_context(subject), EvaluateConfig(
        tasks=str(tmp_path / "t.jsonl"), task_rows=32
    )
    assert [rows.name for rows in measure_task_rows(context, config)] == ["task"]
    [rows] = measure_pair_rows(context, config)
    assert rows.name == "pair"
    for side, n_each in ((False, 6), (True, 2)):
        drawn = zip(rows.spurious_n, rows.labels_n, rows.heldout_n, strict=True)
        found = Counter((a, b) for a, b, is_in in drawn if is_in == side)
        assert found == dict.fromkeys(kinds, n_each)


def test_an_unbalanced_task_is_balanced(subject, examples, tmp_path):
    kept = [e for i, e in enumerate(examples) if e.label or i % 3 == 0]
    write_examples(tmp_path / "t.jsonl", kept)
    for rows in _measure(_make_context(subject), tmp_path / "t.jsonl"):
        for side in (False, True):
            labels = rows.labels_n[rows.heldout_n == side]
            assert labels.sum() * 2 == len(labels) > 4


def test_tasks_are_made_of_what_the_store_holds_out(subject, monkeypatch):
    block = "def f{0}(a):\n    b = a.c(a, {0})\n    for d in b:\n        print(d, b)\n"
    library = [
        Document(f"m{i}.py", "\n".join(block.format(f"1{i}{j}") for j in range(40)))
        for i in range(90)
    ]
    seen = []
    monkeypatch.setattr(
        "sae_jax.evals.task_rows.read_standard_library", lambda: library
    )
    from sae_jax.evals import task_rows

    def generate(documents, *rest):
        seen.extend(document.name for document in documents)
        return make(documents, *rest)

    make = task_rows.python_examples
    monkeypatch.setattr(task_rows, "python_examples", generate)
    measured = _measure(_make_context(subject), "", task_rows=16)
    assert seen == [each.name for each in library if is_heldout(each.name, 5)]
    names = [rows.name for rows in measured]
    assert {"loop_body", "argument", "parameter", "seen_before"} <= set(names)
    for rows in measured:
        assert rows.acts_nd.shape == (16, CONFIG.d_model)
        assert (rows.labels_n.sum(), rows.heldout_n.sum()) == (8, 4)


def test_refusals(subject, examples, path, tmp_path):
    context = _make_context(subject)
    with pytest.raises(ValueError, match="task_rows = 15 holds out 1 rows .* least 16"):
        _measure(context, path, 15)
    with pytest.raises(FileNotFoundError, match="no file .*none"):
        _measure(context, tmp_path / "none")
    wide = SimpleNamespace(**vars(context.sae) | {"d_model": 99})
    with pytest.raises(ValueError, match="of width 16 at resid_post.1, .* of width 99"):
        _measure(dataclasses.replace(context, sae=wide, measured={}), path)
    one = [dataclasses.replace(example, label=True) for example in examples]
    write_examples(tmp_path / "one.jsonl", one)
    with pytest.raises(ValueError, match="72 train rows of label 1 and 0 of label 0"):
        _measure(context, tmp_path / "one.jsonl")
