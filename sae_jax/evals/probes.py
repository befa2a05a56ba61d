"""How well the best single latent tells each task, and what would do as well.

For a task of rows x with labels y, and a unit vector v,

    loss_v = min over w and b of mean( ln(1 + e^t) - y t ),    t = w x·v + b

in nats. The v that is best on the task's train rows is chosen, with its w and b, and
their loss on the task's held-out rows is what counts. x is the row as the SAE
normalises it. Over all tasks,

    probe_loss             v is the encoder row of any latent: x·v is its pre-activation
                           but for shift and scale, which a probe makes up for
    probe_loss_channels    v is any of the D channels
    probe_loss_random      v is any of as many random directions as there are latents
    probe_loss_full        v is any vector at all: one probe of all D channels, with the
                           ridge that a quarter of the train texts is told best by
    probe_gain_channels    probe_loss_channels - probe_loss, task by task
    probe_gain_random      probe_loss_random - probe_loss, task by task

and `probe_accuracy`, with the same endings, is the share of held-out rows that the same
probes tell right. Labels are balanced, so what knows nothing has a loss of ln 2 = 0.693
and an accuracy of 0.5. Intervals are over tasks.

Source: Gao et al. 2024 (arXiv:2406.04093), section 4.2, which does not tell of rows
held out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from sae_jax import logistic
from sae_jax.directions import (
    Channels,
    Directions,
    RandomDirections,
    Rows,
    find_best,
    look_up,
)
from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import Context
from sae_jax.evals.figures import Array, Figure, average_figure, make_table
from sae_jax.evals.task_rows import TaskRows, measure_task_rows
from sae_jax.mesh import DATA, replicated
from sae_jax.progress import Progress

_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # for the full probe to choose from
_CHECKED_EVERY = 4  # one train text in so many decides on the ridge

_ENDINGS = {
    "": "the best single latent",
    "_channels": "the best channel",
    "_random": "the best of as many random directions as latents",
    "_full": "a probe of the whole row",
}
READS = ("tasks", "task_rows")
MEANINGS = {
    **{
        f"probe_loss{ending}": f"held-out nats of {name}; chance is ln 2 = 0.693"
        for ending, name in _ENDINGS.items()
    },
    **{
        f"probe_accuracy{ending}": f"held-out rows told right by {name}; chance is 0.5"
        for ending, name in _ENDINGS.items()
    },
    "probe_gain_channels": "nats that the best latent saves against the best channel",
    "probe_gain_random": "nats that it saves against the best random direction",
}


@dataclass(frozen=True, eq=False)
class _Task:
    """A task's rows as the SAE normalises them, less the mean of train rows."""

    name: str
    train_nd: NDArray[np.float32]
    train_labels_n: NDArray[np.bool_]
    train_texts_n: NDArray[np.int64]
    heldout_nd: NDArray[np.float32]
    heldout_labels_n: NDArray[np.bool_]


@dataclass(frozen=True)
class _Result:
    """How well a task's held-out rows are told, and the number of the direction."""

    loss: float
    accuracy: float
    number: int = -1


def compute(context: Context, config: EvaluateConfig) -> dict[str, Any]:
    """The figures above, and a table of tasks."""
    tasks = _prepare(context, measure_task_rows(context, config))
    n_latents, d_model = context.sae.n_latents, context.sae.d_model
    encoder = Rows(context.sae.weights()[0]["w_enc_ld"])
    random = RandomDirections(jax.random.key(context.seed), (n_latents, d_model))
    fits = {
        "": _tell_by_one(context, tasks, encoder),
        "_channels": _tell_by_one(context, tasks, Channels(d_model)),
        "_random": _tell_by_one(context, tasks, random),
        "_full": _tell_by_all(tasks),
    }
    results: dict[str, list[_Result]] = {ending: [] for ending in fits}
    n_fits = len(fits) * len(tasks)
    with Progress(n_fits, "fits", "probes", is_shown=context.progress) as progress:
        for ending, fit in fits.items():
            for result in fit:
                results[ending].append(result)
                progress.update(sum(map(len, results.values())))
    return _make_figures(results) | {"tasks": _make_tasks_table(tasks, results)}


def _prepare(context: Context, tasks: Sequence[TaskRows]) -> list[_Task]:
    normalize = jax.jit(
        lambda sae, acts_nd: sae.normalize(acts_nd)[0].astype(jnp.float32),
        out_shardings=replicated(context.mesh),
    )
    n_most = max(len(task.acts_nd) for task in tasks)
    prepared = []
    for task in tasks:
        n, is_train_n = len(task.acts_nd), ~task.heldout_n
        padded_nd = np.pad(task.acts_nd, ((0, n_most - n), (0, 0)), mode="edge")
        rows_nd = jax.device_get(normalize(context.sae, padded_nd))[:n]
        rows_nd = rows_nd - rows_nd[is_train_n].mean(axis=0)
        prepared.append(
            _Task(
                name=task.name,
                train_nd=rows_nd[is_train_n],
                train_labels_n=task.labels_n[is_train_n],
                train_texts_n=task.texts_n[is_train_n],
                heldout_nd=rows_nd[task.heldout_n],
                heldout_labels_n=task.labels_n[task.heldout_n],
            )
        )
    return prepared


def _tell_by_one(
    context: Context, tasks: Sequence[_Task], directions: Directions
) -> Iterator[_Result]:
    """Each task by its best direction; as many at a time as there are data shards."""
    mesh, n_most = context.mesh, max(len(task.train_nd) for task in tasks)
    n_group, by_task = mesh.shape[DATA], NamedSharding(mesh, PartitionSpec(DATA))
    for start in range(0, len(tasks), n_group):
        group = tasks[start : start + n_group]
        full_group = [*group, *group[-1:] * (n_group - len(group))]
        padded = [_pad(task, n_most) for task in full_group]
        queries = [jax.device_put(np.stack(q), by_task) for q in zip(*padded)]
        best = find_best(directions, mesh, _score_by_probe, n_most, *queries)
        rows_qd = look_up(directions, mesh, best.index_q)
        best, rows_qd = jax.device_get((best, rows_qd))
        slope_q, intercept_q = best.extras
        for at, task in enumerate(group):
            if not np.isfinite(best.score_q[at]):
                raise ValueError(
                    f"task {task.name!r} can be told by nothing: the SAE's weights "
                    "or its rows hold values that are not finite"
                )
            number = int(best.index_q[at])
            yield _tell(task, slope_q[at] * rows_qd[at], intercept_q[at], number)


def _tell_by_all(tasks: Sequence[_Task]) -> Iterator[_Result]:
    """Each task by a probe of whole rows."""
    n_most = max(len(task.train_nd) for task in tasks)
    for task in tasks:
        rows_nd, labels_n, weights_n = _pad(task, n_most)
        checked_n = np.zeros(n_most, np.bool_)
        checked_n[: len(task.train_nd)] = _choose_checked(task.train_texts_n)
        probe = jax.device_get(_fit_full(rows_nd, labels_n, weights_n, checked_n))
        yield _tell(task, probe.slope, probe.intercept)


def _pad(
    task: _Task, n_rows: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.float32]]:
    """A task's train rows, labels and weights, with rows of weight 0 behind them."""
    missing = n_rows - len(task.train_nd)
    return (
        np.pad(task.train_nd, ((0, missing), (0, 0))),
        np.pad(task.train_labels_n, (0, missing)),
        (np.arange(n_rows) < len(task.train_nd)).astype(np.float32),
    )


def _score_by_probe(
    unit_td: jax.Array, rows_qnd: jax.Array, labels_qn: jax.Array, weights_qn: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The loss [Q, T] of each direction's probe, negative, and its parameters."""

    def fit(task: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        rows_nd, labels_n, weights_n = task
        features_nt = jnp.matmul(rows_nd, unit_td.T, precision=lax.Precision.HIGHEST)
        probe_t = logistic.fit_each(features_nt, labels_n, weights_n)
        return -probe_t.loss, (probe_t.slope, probe_t.intercept)

    return lax.map(fit, (rows_qnd, labels_qn, weights_qn))


@jax.jit
def _fit_full(
    rows_nd: jax.Array, labels_n: jax.Array, weights_n: jax.Array, checked_n: jax.Array
) -> logistic.Probe:
    """The probe, with the ridge by which the rest tell the checked rows best."""

    def loss_of(ridge: jax.Array) -> jax.Array:
        rest_n = jnp.where(checked_n, 0, weights_n)
        probe = logistic.fit_together(rows_nd, labels_n, rest_n, ridge)
        logits_n = rows_nd @ probe.slope + probe.intercept
        wrong_n = jnp.where(labels_n, -logits_n, logits_n)
        return jnp.sum(jax.nn.softplus(wrong_n), where=checked_n)

    ridges = jnp.array(_RIDGES, rows_nd.dtype)
    best = jnp.nanargmin(lax.map(loss_of, ridges))
    return logistic.fit_together(rows_nd, labels_n, weights_n, ridges[best])


def _choose_checked(texts_n: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The rows of every fourth text, or of one text every fourth row."""
    texts = np.unique(texts_n)
    if len(texts) == 1:
        return np.arange(len(texts_n)) % _CHECKED_EVERY == 0
    return np.isin(texts_n, texts[::_CHECKED_EVERY])


def _tell(
    task: _Task, slope_d: NDArray[Any], intercept: float, number: int = -1
) -> _Result:
    labels_n = task.heldout_labels_n
    logits_n = task.heldout_nd.astype(np.float64) @ slope_d + intercept
    loss = np.logaddexp(0, np.where(labels_n, -logits_n, logits_n)).mean()
    accuracy = ((logits_n > 0) == labels_n).mean()
    return _Result(float(loss), float(accuracy), number)


def _make_figures(results: Mapping[str, Sequence[_Result]]) -> dict[str, Figure]:
    loss_t = {e: np.array([r.loss for r in of]) for e, of in results.items()}
    accuracy_t = {e: np.array([r.accuracy for r in of]) for e, of in results.items()}
    values_t: dict[str, Array] = {
        **{f"probe_loss{ending}": loss_t[ending] for ending in loss_t},
        **{f"probe_accuracy{ending}": accuracy_t[ending] for ending in loss_t},
        "probe_gain_channels": loss_t["_channels"] - loss_t[""],
        "probe_gain_random": loss_t["_random"] - loss_t[""],
    }
    return {name: average_figure(of, "tasks") for name, of in values_t.items()}


def _make_tasks_table(
    tasks: Sequence[_Task], results: Mapping[str, Sequence[_Result]]
) -> Figure:
    columns = ["task", "train rows", "held-out rows", "latent", "accuracy", "loss"]
    rows = []
    for task, *of in zip(tasks, *results.values(), strict=True):
        latent = of[0]
        sizes = [len(task.train_nd), len(task.heldout_nd)]
        losses = [result.loss for result in of]
        rows.append([task.name, *sizes, latent.number, latent.accuracy, *losses])
    others = ["channel loss", "random loss", "full loss"]
    return make_table([*columns, *others], rows)
