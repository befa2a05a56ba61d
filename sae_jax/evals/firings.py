"""On which rows of some contexts latents fire, and how strongly.

A latent fires on a row where its value in the row's code is above 0. Rows are numbered
in the order of the contexts given: position t of context s is row s T + t. Positions
that are no rows of the store have a number too, and nothing fires there.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from sae_jax.evals.context import Context, Sae, iterate_rows
from sae_jax.mesh import replicated

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Firings:
    """Rows and values of all latents of a list, latent after latent, rows ascending."""

    starts_n: Ints  # of each latent, and behind them the end of the last
    rows_f: Ints
    values_f: Floats

    def of(self, index: int) -> tuple[Ints, Floats]:
        """The rows on which the latent at this place of the list fires, and values."""
        part = slice(self.starts_n[index], self.starts_n[index + 1])
        return self.rows_f[part], self.values_f[part]

    def at(self, is_wanted_r: NDArray[np.bool_]) -> "Firings":
        """Those on rows that are wanted."""
        is_kept_f = is_wanted_r[self.rows_f]
        before_f = np.concatenate([[0], np.cumsum(is_kept_f)])
        return Firings(
            before_f[self.starts_n], self.rows_f[is_kept_f], self.values_f[is_kept_f]
        )

    @property
    def counts_n(self) -> Ints:
        """On how many rows each latent fires."""
        return np.diff(self.starts_n)


def join_firings(of_latents: Iterable[tuple[Ints, Floats]]) -> Firings:
    """Of rows, ascending, and values of one latent after the other."""
    rows, values = zip(*of_latents, strict=True)
    starts_n = np.cumsum([0, *map(len, rows)])
    return Firings(starts_n, np.concatenate(rows), np.concatenate(values))


def count_firings(
    context: Context, sequences: Ints, batch_rows: int, task: str | None = None
) -> Ints:
    """On how many rows of the contexts each latent fires, [L]."""
    counts_l = np.zeros(context.sae.n_latents, np.int64)
    for _, fired, _ in _iterate_fired(context, sequences, batch_rows, task):
        latents, counts = np.unique(fired, return_counts=True)
        counts_l[latents] += counts
    return counts_l


def find_firings(
    context: Context,
    sequences: Ints,
    latents_n: Ints,
    batch_rows: int,
    task: str | None = None,
) -> Firings:
    """The firings of these latents, in their order."""
    place_l = np.full(context.sae.n_latents, -1, np.int32)
    place_l[latents_n] = np.arange(len(latents_n))
    parts = []
    for rows, fired, values in _iterate_fired(context, sequences, batch_rows, task):
        places = place_l[fired]
        is_wanted = places >= 0
        parts.append((places[is_wanted], rows[is_wanted], values[is_wanted]))
    places_f, rows_f, values_f = map(np.concatenate, zip(*parts, strict=True))
    order_f = np.argsort(places_f, kind="stable")
    starts_n = np.searchsorted(places_f[order_f], np.arange(len(latents_n) + 1))
    return Firings(starts_n, rows_f[order_f], values_f[order_f])


def _iterate_fired(
    context: Context, sequences: Ints, batch_rows: int, task: str | None
) -> Iterator[tuple[Ints, Ints, Floats]]:
    """Rows, latents and values of all that fires, batch after batch."""
    encode_batch = jax.jit(_encode, out_shardings=replicated(context.mesh))
    n_rows = 0
    with contextlib.closing(
        iterate_rows(context, sequences, batch_rows, task)
    ) as batches:
        for rows_bd, mask_b in batches:
            values_bk, indices_bk = jax.device_get(encode_batch(context.sae, rows_bd))
            is_fired_bk = (values_bk > 0) & np.asarray(mask_b)[:, None]
            rows = n_rows + np.nonzero(is_fired_bk)[0]
            yield rows, indices_bk[is_fired_bk], values_bk[is_fired_bk]
            n_rows += len(rows_bd)


def _encode(sae: Sae, rows_bd: jax.Array) -> tuple[jax.Array, jax.Array]:
    code = sae.encode(rows_bd.astype(jnp.float32))
    return code.values, code.indices
