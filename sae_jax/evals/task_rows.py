"""Rows of binary tasks: the activations at the tokens that are asked about.

Examples come from the file `config.tasks`, or are made of the standard library's
documents that the store holds out. A text is run through the subject as a context of
the store is: behind a beginning-of-sequence token where each of the store's contexts
begins with one, and where it is longer than these in pieces, so that at least three
quarters of a context, or all that there is, lies before what is asked about.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray
from tokenizers import Tokenizer

from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import Context
from sae_jax.mesh import DATA, LATENT, replicated
from sae_jax.progress import Progress
from sae_jax.store import Manifest
from sae_jax.subjects import Subject
from sae_jax.tasks import (
    LEAST_TASK_ROWS,
    TASK_HELDOUT_EVERY,
    Example,
    list_kinds,
    python_examples,
    read_examples,
)
from sae_jax.text import hash_name, is_heldout, read_standard_library

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TaskRows:
    """A task's rows in activation space, as many of each class on each side."""

    name: str
    acts_nd: NDArray[np.float32]
    labels_n: NDArray[np.bool_]
    heldout_n: NDArray[np.bool_]
    texts_n: Ids  # which text a row is of: rows of one text resemble each other
    spurious_n: NDArray[np.bool_] | None = None  # of a pair, who has the other concept


@dataclass(frozen=True, eq=False)
class _Plan:
    """Contexts to run, and the rows to keep of them, in the order of the contexts."""

    tokens_bt: NDArray[np.int32]
    contexts_r: Ids
    positions_r: Ids
    rows_n: Ids  # by example, its row: several tasks may ask about one token


def measure_task_rows(context: Context, config: EvaluateConfig) -> list[TaskRows]:
    """The rows of every task but pairs, done once for each context.

    Raises:
        FileNotFoundError: `config.tasks` is not there.
        ValueError: it is no file of tasks; a task has too few rows; the subject's
            activations are not as wide as the SAE.
    """
    return [task for task in _measure_once(context, config) if task.spurious_n is None]


def measure_pair_rows(context: Context, config: EvaluateConfig) -> list[TaskRows]:
    """The rows of every pair of concepts, as many of each of four kinds."""
    every = _measure_once(context, config)
    return [task for task in every if task.spurious_n is not None]


def _measure_once(context: Context, config: EvaluateConfig) -> list[TaskRows]:
    key = ("task_rows", config.tasks, config.task_rows, config.batch_sequences)
    if key not in context.measured:
        context.measured[key] = _measure(context, config)
    return context.measured[key]


def _measure(context: Context, config: EvaluateConfig) -> list[TaskRows]:
    by_task = _draw_examples(context, config)
    examples = [example for drawn in by_task.values() for example in drawn]
    texts: dict[str, int] = {}
    texts_n = np.array([texts.setdefault(e.text, len(texts)) for e in examples])
    manifest = context.store.manifest
    plan = _plan(
        context.subject.tokenizer,
        list(texts),
        texts_n,
        np.array([example.position for example in examples]),
        manifest.context_length,
        _list_first(manifest),
    )
    acts_rd = _read_rows(context, plan, config.batch_sequences)
    task_rows, start = [], 0
    for name, drawn in by_task.items():
        its = slice(start, start + len(drawn))
        task_rows.append(
            TaskRows(
                name,
                acts_rd[plan.rows_n[its]],
                np.array([example.label for example in drawn]),
                np.array([example.is_heldout for example in drawn]),
                texts_n[its],
                _list_spurious(drawn),
            )
        )
        start += len(drawn)
    return task_rows


def _list_spurious(examples: Sequence[Example]) -> NDArray[np.bool_] | None:
    if examples[0].spurious is None:
        return None
    return np.array([bool(example.spurious) for example in examples])


def _draw_examples(
    context: Context, config: EvaluateConfig
) -> dict[str, list[Example]]:
    """Of every task at most `config.task_rows`, as many of each kind on each side."""
    n_heldout = config.task_rows // 2 // TASK_HELDOUT_EVERY
    if config.task_rows < LEAST_TASK_ROWS:
        raise ValueError(
            f"task_rows = {config.task_rows} holds out {n_heldout} rows of each class, "
            f"too few: make it at least {LEAST_TASK_ROWS}"
        )
    wanted = {False: config.task_rows // 2 - n_heldout, True: n_heldout}
    by_task: dict[str, dict[bool, dict[Any, list[int]]]] = {}
    examples = _find_examples(context, config)
    for index, example in enumerate(examples):
        kinds = list_kinds(example.spurious is not None)
        sides = by_task.setdefault(
            example.task, {side: {kind: [] for kind in kinds} for side in wanted}
        )
        sides[example.is_heldout][example.kind].append(index)
    drawn: dict[str, list[Example]] = {}
    for name, sides in by_task.items():
        rng = np.random.default_rng([context.seed, hash_name(name)])
        chosen: list[int] = []
        for side, kinds_of_side in sides.items():
            n_kind = 2 * wanted[side] // len(kinds_of_side)
            n_rows = min(n_kind, *map(len, kinds_of_side.values()))
            for indices in kinds_of_side.values():
                chosen += rng.permutation(indices)[:n_rows].tolist()
        drawn[name] = [examples[index] for index in sorted(chosen)]
    return drawn


def _find_examples(context: Context, config: EvaluateConfig) -> list[Example]:
    if config.tasks:
        return read_examples(config.tasks)
    every = context.store.manifest.heldout_every
    documents = [
        document
        for document in read_standard_library()
        if is_heldout(document.name, every)
    ]
    generated = python_examples(documents, config.task_rows, context.seed)
    return generated.examples + generated.pairs


def _list_first(manifest: Manifest) -> list[int]:
    """The tokens that lead each of the store's contexts."""
    if manifest.bos != "context" or manifest.bos_id is None:
        return []
    return [manifest.bos_id]


def _plan(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    texts_n: Ids,
    characters_n: Ids,
    context_length: int,
    first: Sequence[int],
) -> _Plan:
    """The contexts that hold the tokens of the characters asked about, each behind the
    tokens `first`."""
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    spans = [np.reshape(encoding.offsets, (-1, 2)) for encoding in encodings]
    tokens_n = np.array(
        [
            _find_token(spans[text], texts[text], character)
            for text, character in zip(texts_n, characters_n, strict=True)
        ]
    )
    n_positions = min(context_length - len(first), int(tokens_n.max()) + 1)
    # Contexts of a long text begin at multiples of a stride, so that rows share them.
    stride = max(1, n_positions // 4)
    starts_n = -(-np.maximum(0, tokens_n + 1 - n_positions) // stride) * stride
    contexts, context_n = _number(texts_n, starts_n)
    rows, rows_n = _number(context_n, tokens_n - starts_n + len(first))
    tokens_bt = np.zeros((len(contexts), len(first) + n_positions), np.int32)
    for tokens_t, (text, start) in zip(tokens_bt, contexts, strict=True):
        ids = [*first, *encodings[text].ids[start : start + n_positions]]
        tokens_t[: len(ids)] = ids
    return _Plan(tokens_bt, rows[:, 0], rows[:, 1], rows_n)


def _number(first_n: Ids, second_n: Ids) -> tuple[Ids, Ids]:
    """The distinct pairs in order, and the number of each."""
    pairs, number_n = np.unique(
        np.stack([first_n, second_n], axis=1), axis=0, return_inverse=True
    )
    return pairs, number_n.reshape(-1)


def _find_token(spans: NDArray[np.int64], text: str, character: int) -> int:
    """The token that holds the character; of several with parts of it, the last."""
    if not len(spans):
        raise ValueError(f"the text {text[:40]!r} has no token: leave it out")
    behind = np.searchsorted(spans[:, 1], character, side="right")
    begun = np.searchsorted(spans[:, 0], character, side="right") - 1
    return int(np.clip(max(behind, begun), 0, len(spans) - 1))


def _read_rows(
    context: Context, plan: _Plan, batch_sequences: int
) -> NDArray[np.float32]:
    """The rows of the plan [R, D]."""
    mesh, width = context.mesh, context.sae.d_model
    n_batch = -(-batch_sequences // mesh.size) * mesh.size
    edges = np.arange(0, len(plan.tokens_bt) + n_batch, n_batch)
    cuts = np.searchsorted(plan.contexts_r, edges)
    n_most = int(np.diff(cuts).max())
    capture = jax.jit(
        functools.partial(_capture, site=context.site), out_shardings=replicated(mesh)
    )
    sharding = NamedSharding(mesh, PartitionSpec((DATA, LATENT), None))
    acts_rd = np.empty((len(plan.contexts_r), width), np.float32)
    total = len(plan.tokens_bt)
    with Progress(total, "texts", "tasks", is_shown=context.progress) as line:
        for edge, first, last in zip(edges, cuts, cuts[1:]):
            tokens_bt = plan.tokens_bt[edge : edge + n_batch]
            padded_bt = np.pad(tokens_bt, ((0, n_batch - len(tokens_bt)), (0, 0)))
            wanted_r2 = np.zeros((n_most, 2), np.int32)
            wanted_r2[: last - first, 0] = plan.contexts_r[first:last] - edge
            wanted_r2[: last - first, 1] = plan.positions_r[first:last]
            rows_rd = capture(
                context.subject, jax.device_put(padded_bt, sharding), wanted_r2
            )
            if rows_rd.shape[1] != width:
                raise ValueError(
                    f"subject {context.subject.name} has rows of width "
                    f"{rows_rd.shape[1]} at {context.site}, the SAE reads rows of "
                    f"width {width}: give the subject that it was trained on"
                )
            acts_rd[first:last] = jax.device_get(rows_rd)[: last - first]
            line.update(min(int(edge) + n_batch, total))
    return acts_rd


def _capture(
    subject: Subject, tokens_bt: jax.Array, wanted_r2: jax.Array, site: str
) -> jax.Array:
    _, acts = subject.forward(tokens_bt, capture=(site,), logits=False)
    rows_rd = acts[site][wanted_r2[:, 0], wanted_r2[:, 1]]
    return rows_rd.astype(jnp.float32)
