"""The held-out contexts on which a latent fires most strongly.

A first pass keeps, for every latent, the n contexts with the largest activation in
them, and its firing count. Latents to show are then drawn one from each of equal
groups of the living, ordered by density, so that what is shown is typical and not the
best. A second pass, over their contexts alone, reads each token's activation.
"""

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import (
    Context,
    Sae,
    choose_row_sequences,
    iterate_rows,
    open_context,
)
from sae_jax.evals.positions import read_positions
from sae_jax.mesh import LATENT, replicated
from sae_jax.store import Store
from sae_jax.subjects import Subject

# Tokens shown around the one with the largest activation.
TOKENS_BEFORE = 24
TOKENS_AFTER = 8

_NO_SEQUENCE = -1


@dataclass(frozen=True)
class TopContext:
    """Tokens around a latent's largest activation in one context."""

    document: str
    sequence: int
    position: int  # of the peak, in its sequence
    peak: int  # the same, in `tokens`
    tokens: tuple[str, ...]
    activations: tuple[float, ...]

    @property
    def activation(self) -> float:
        return self.activations[self.peak]


@dataclass(frozen=True)
class LatentView:
    """One latent: on what share of rows it fires, and its top contexts, best first."""

    latent: int
    density: float
    contexts: tuple[TopContext, ...]

    @property
    def max_activation(self) -> float:
        return self.contexts[0].activation


def top_contexts(
    sae: Sae,
    subject: Subject,
    store: Store,
    n_latents: int = 40,
    n_contexts: int = 8,
    seed: int = 0,
    config: EvaluateConfig | None = None,
    progress: bool = False,
) -> list[LatentView]:
    """A sample of living latents, from dense to rare, with their top contexts.

    Activations are code values, in the SAE's normalised space. `config.rows` says how
    many held-out rows are searched.
    """
    config = config or EvaluateConfig()
    context = open_context(sae, subject, store, seed, progress)
    sequences = choose_row_sequences(context, config.rows)
    found = _search(context, sequences, config.batch_rows, n_contexts)
    latents = _sample_latents(np.asarray(found["counts_l"]), n_latents, seed)
    best_ln = np.asarray(found["sequences_ln"][latents])
    shown = np.unique(best_ln[best_ln != _NO_SEQUENCE])
    codes = _encode_sequences(context, sequences[shown], config.batch_rows)
    n_rows = int(read_positions(store, sequences).is_row_st.sum())
    views = []
    for latent, best_n in zip(latents, best_ln, strict=True):
        contexts = []
        for index in best_n[best_n != _NO_SEQUENCE]:
            code = codes[int(sequences[index])]
            contexts.append(_cut_context(context, int(sequences[index]), code, latent))
        density = int(found["counts_l"][latent]) / n_rows
        views.append(LatentView(int(latent), density, tuple(contexts)))
    return views


def _search(
    context: Context,
    sequences: NDArray[np.int64],
    batch_rows: int,
    n_contexts: int,
) -> dict[str, jax.Array]:
    """Each latent's best contexts, as indices into `sequences`, and firing count."""
    n_latents, n_positions = context.sae.n_latents, context.store.context_length
    by_latent = NamedSharding(context.mesh, PartitionSpec(LATENT))
    found = {
        "counts_l": jnp.zeros(n_latents, jnp.int32),
        "values_ln": jnp.zeros((n_latents, n_contexts)),
        "sequences_ln": jnp.full((n_latents, n_contexts), _NO_SEQUENCE, jnp.int32),
    }
    found = jax.device_put(found, by_latent)
    merge = jax.jit(
        functools.partial(_merge_batch, n_positions=n_positions),
        out_shardings=by_latent,
    )
    first = 0
    with contextlib.closing(
        iterate_rows(context, sequences, batch_rows, "search")
    ) as rows:
        for rows_bd, mask_b in rows:
            found = merge(context.sae, found, rows_bd, mask_b, first)
            jax.block_until_ready(found)  # one step in flight
            first += len(rows_bd) // n_positions
    return jax.device_put(found, replicated(context.mesh))


def _merge_batch(
    sae: Sae,
    found: dict[str, jax.Array],
    rows_bd: jax.Array,
    mask_b: jax.Array,
    first: jax.Array,
    n_positions: int,
) -> dict[str, jax.Array]:
    code = sae.encode(rows_bd.astype(jnp.float32))
    values_bk = jnp.where(mask_b[:, None], code.values, 0)
    n_latents, n_contexts = found["values_ln"].shape
    new_c = jnp.arange(len(rows_bd) // n_positions, dtype=jnp.int32)
    context_b1 = jnp.repeat(new_c, n_positions)[:, None]
    peak_lc = jnp.zeros((n_latents, len(new_c)), jnp.float32)
    peak_lc = peak_lc.at[code.indices, context_b1].max(values_bk.astype(jnp.float32))
    new_lc = jnp.where(peak_lc > 0, first + new_c, _NO_SEQUENCE)
    # The earlier of equals wins, so the order of the store breaks ties.
    values_ln, chosen_ln = jax.lax.top_k(
        jnp.concatenate([found["values_ln"], peak_lc], axis=1), n_contexts
    )
    candidates = jnp.concatenate([found["sequences_ln"], new_lc], axis=1)
    return {
        "counts_l": found["counts_l"].at[code.indices].add(
            (values_bk > 0).astype(jnp.int32)
        ),
        "values_ln": values_ln,
        "sequences_ln": jnp.take_along_axis(candidates, chosen_ln, axis=1),
    }


def _sample_latents(
    counts_l: NDArray[np.int32], n_latents: int, seed: int
) -> NDArray[np.int64]:
    """One latent from each of `n_latents` equal groups of the living, by density."""
    falling = np.argsort(-counts_l, kind="stable")[: np.count_nonzero(counts_l)]
    rng = np.random.default_rng(seed)
    groups = np.array_split(falling, min(n_latents, len(falling)) or 1)
    return np.array([rng.choice(group) for group in groups if len(group)], np.int64)


def _encode_sequences(
    context: Context, sequences: NDArray[np.int64], batch_rows: int
) -> dict[int, Any]:
    """(values, indices) [T, K] of each sequence; values are 0 where there is no row."""

    def encode(sae: Sae, rows_bd: jax.Array) -> tuple[jax.Array, jax.Array]:
        code = sae.encode(rows_bd.astype(jnp.float32))
        return code.values, code.indices

    encode_batch = jax.jit(encode, out_shardings=replicated(context.mesh))
    n_positions, codes = context.store.context_length, {}
    remaining = iter(sequences)
    for rows_bd, mask_b in iterate_rows(context, sequences, batch_rows):
        values_bk, indices_bk = jax.device_get(encode_batch(context.sae, rows_bd))
        values_bk = np.where(np.asarray(mask_b)[:, None], values_bk, 0)
        for first, sequence in zip(range(0, len(rows_bd), n_positions), remaining):
            rows = slice(first, first + n_positions)
            codes[int(sequence)] = values_bk[rows], indices_bk[rows]
    return codes


def _cut_context(
    context: Context, sequence: int, code: Any, latent: int
) -> TopContext:
    values_tk, indices_tk = code
    acts_t = np.sum(values_tk, axis=1, where=indices_tk == latent)
    position = int(np.argmax(acts_t))
    positions = read_positions(context.store, np.array([sequence]))
    n_real = np.flatnonzero(positions.is_real_st[0])[-1] + 1
    start = max(0, position - TOKENS_BEFORE)
    stop = min(position + TOKENS_AFTER + 1, n_real)
    tokens = positions.tokens_st[0, start:stop]
    document = context.store.read_documents(np.array([sequence]))[0, position]
    return TopContext(
        document=context.store.document_name(int(document)),
        sequence=sequence,
        position=position,
        peak=position - start,
        tokens=tuple(context.subject.decode_tokens(tokens)),
        activations=tuple(float(value) for value in acts_t[start:stop]),
    )
