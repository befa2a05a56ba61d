"""What every metric is given: an SAE, its subject, and held-out contexts.

A metric reads whole held-out contexts, drawn without replacement by the seed, so that
errors can be taken over contexts and smaller draws are part of larger ones. Which of
their positions count is for `sae_jax.evals.positions` to say.
"""

import dataclasses
from collections.abc import Callable, Generator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from sae_jax.config import SaeConfig
from sae_jax.evals.positions import Positions, read_positions
from sae_jax.mesh import DATA, LATENT, batch_sharding, replicated
from sae_jax.normalize import Normalization
from sae_jax.progress import Progress
from sae_jax.store import Store
from sae_jax.subjects import Subject


class Sae(Protocol):
    """What a metric asks of an architecture; it must be a pytree."""

    config: SaeConfig
    normalization: Normalization
    mesh: Mesh
    site: str

    @property
    def n_latents(self) -> int: ...

    @property
    def d_model(self) -> int: ...

    def encode(self, acts: jax.Array) -> Any: ...

    def decode(self, code: Any) -> jax.Array: ...

    def weights(self) -> tuple[dict[str, jax.Array], Any]: ...

    def normalize(
        self, acts: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Context:
    """One evaluation: SAE, subject and store that belong together, on one mesh."""

    sae: Sae
    subject: Subject
    store: Store
    site: str
    mesh: Mesh
    seed: int
    progress: bool
    raw: Sae | None = None  # the same SAE with raw weights, where `sae` has averaged
    # What metrics share, kept by the module that made it.
    measured: dict[Any, Any] = dataclasses.field(default_factory=dict)


def open_context(
    sae: Sae,
    subject: Subject,
    store: Store,
    seed: int = 0,
    progress: bool = False,
    raw: Sae | None = None,
) -> Context:
    """The context of an evaluation, checked; the subject is placed on the mesh.

    Raises:
        ValueError: SAE, subject and store do not belong together.
    """
    site = store.site(sae.site)
    if store.width(site) != sae.d_model:
        raise ValueError(
            f"{store.path}: site {site} has rows of width {store.width(site)}, the SAE "
            f"reads rows of width {sae.d_model}: evaluate on a store of its own site"
        )
    if jax.tree_util.all_leaves([subject]):
        raise ValueError(
            f"subject {subject.name} does not run in JAX: sae-jax harvest reads it, "
            "and nothing can be evaluated on it"
        )
    stored = store.manifest.subject
    if stored["identity"] != subject.identity:
        raise ValueError(
            f"{store.path} was harvested from subject {stored['name']} "
            f"({stored['identity'][:12]}), not from {subject.name} "
            f"({subject.identity[:12]}): give the subject of the store"
        )
    if not store.rows("heldout"):
        raise ValueError(
            f"{store.path} has no held-out rows: harvest more documents, so that "
            "some of them are held out"
        )
    subject = jax.device_put(subject, replicated(sae.mesh))
    return Context(sae, subject, store, site, sae.mesh, seed, progress, raw)


def choose_sequences(context: Context, n_sequences: int) -> NDArray[np.int64]:
    """At most `n_sequences` held-out sequences, drawn by the seed, in store order."""
    return draw_sequences(context.store, context.seed, n_sequences)


def draw_sequences(store: Store, seed: int, n_sequences: int) -> NDArray[np.int64]:
    """The same where there is no SAE to evaluate."""
    return np.sort(_shuffle(store, seed)[:n_sequences])


def choose_row_sequences(context: Context, rows: int) -> NDArray[np.int64]:
    """The sequences that hold at least `rows` held-out rows, or all there are."""
    most = context.store.context_length
    return choose_until(context, rows, most, lambda positions: positions.is_row_st)


def choose_until(
    context: Context,
    wanted: int,
    most: int,
    find: Callable[[Positions], NDArray[np.bool_]],
) -> NDArray[np.int64]:
    """The sequences that have `wanted` of what is found in contexts, or all there are.

    `find` gives [S, anything]; no context has more than `most`.
    """
    store, drawn = context.store, _shuffle(context.store, context.seed)
    found_s = np.zeros(0, np.int64)
    while len(found_s) < len(drawn) and found_s.sum() < wanted:
        n_more = max(-(-wanted // most), len(found_s))
        more = drawn[len(found_s) : len(found_s) + n_more]
        order = np.argsort(more)  # files are read one after the other
        of_more = np.empty(len(more), np.int64)
        of_more[order] = find(read_positions(store, more[order])).sum(axis=1)
        found_s = np.concatenate([found_s, of_more])
    n_sequences = np.searchsorted(np.cumsum(found_s), wanted) + 1
    return np.sort(drawn[:n_sequences])


def _shuffle(store: Store, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(store.sequences("heldout"))


def iterate_rows(
    context: Context,
    sequences: NDArray[np.int64],
    batch_rows: int,
    task: str | None = None,
) -> Generator[tuple[jax.Array, jax.Array], None, None]:
    """All rows of the sequences, in batches of one shape, over the data axis.

    With a `task` to name, progress is shown: take the batches inside
    `contextlib.closing`, so that an error ends its line.

    Yields:
        Rows [B, D] and which of them count, bool [B]: a row of the batch is a
        position of a context, and positions that are no rows, as padding, do not
        count, nor do those that the last batch is filled up with. B is a whole number
        of contexts.
    """
    store, n_positions = context.store, context.store.context_length
    per_batch = _round_up(max(1, batch_rows // n_positions), context.mesh.shape[DATA])
    mask_sharding = NamedSharding(context.mesh, PartitionSpec(DATA))
    shape = (per_batch * n_positions, store.width(context.site))
    n_rows = len(sequences) * n_positions
    with _start_progress(context, task, n_rows, "rows") as progress:
        for start in range(0, len(sequences), per_batch):
            chosen = sequences[start : start + per_batch]
            acts_ntd, is_row_nt = store.read_contexts(context.site, chosen)
            # Anew for each batch: on a CPU the device array may share this buffer.
            rows_bd, mask_b = np.empty(shape, jnp.bfloat16), np.zeros(shape[0], bool)
            n_real = len(chosen) * n_positions
            rows_bd[:n_real] = acts_ntd.reshape(n_real, -1)
            mask_b[:n_real] = is_row_nt.ravel()
            # Real rows, not zeros: a row without a norm could give a NaN.
            rows_bd[~mask_b] = rows_bd[np.argmax(mask_b)] if mask_b.any() else 1
            yield (
                jax.device_put(rows_bd, batch_sharding(context.mesh)),
                jax.device_put(mask_b, mask_sharding),
            )
            progress.update(start * n_positions + n_real)


def iterate_tokens(
    context: Context,
    sequences: NDArray[np.int64],
    batch_sequences: int,
    task: str | None = None,
) -> Generator[tuple[jax.Array, int], None, None]:
    """Tokens [B, T] in batches of one shape, over all devices, and how many count."""
    n_batch = _round_up(batch_sequences, context.mesh.size)
    sharding = NamedSharding(context.mesh, PartitionSpec((DATA, LATENT), None))
    with _start_progress(context, task, len(sequences), "contexts") as progress:
        for start in range(0, len(sequences), n_batch):
            chosen = sequences[start : start + n_batch]
            tokens_bt = context.store.read_tokens(chosen)
            padding = ((0, n_batch - len(chosen)), (0, 0))
            padded_bt = np.pad(tokens_bt, padding, mode="edge")
            yield jax.device_put(padded_bt, sharding), len(chosen)
            progress.update(start + len(chosen))


def _round_up(number: int, multiple_of: int) -> int:
    return -(-number // multiple_of) * multiple_of


def _start_progress(
    context: Context, task: str | None, total: int, unit: str
) -> Progress:
    is_shown = context.progress and task is not None
    return Progress(total, unit, task or "", is_shown=is_shown)
