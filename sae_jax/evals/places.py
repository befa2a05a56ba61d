"""Places in held-out contexts, with their rows and codes.

A place is a row of a held-out context, drawn by the seed: at most one of a context
while there are contexts left. The context is cut to the 64 tokens before the place, and
the tokens from the place on whose predictions are looked at, none of which is padding;
the row is that of the cut context.

Axes: P places, B of them in a batch, W tokens of the cut context, K latents of a code.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import Context, Sae, choose_until
from sae_jax.evals.figures import Array
from sae_jax.evals.positions import Positions, read_positions
from sae_jax.mesh import DATA, LATENT, replicated
from sae_jax.subjects import Subject

_TOKENS_BEFORE = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """A position of a context, cut; its row, and what is to be taken out of it."""

    sequence: int
    tokens_w: NDArray[np.int32]
    position: int  # in the context
    inside: int  # the same, in tokens_w
    row_d: Array
    latents_k: NDArray[np.int32]  # the active ones
    parts_kd: NDArray[np.float32]  # what each adds to the reconstruction


def read_places(context: Context, config: EvaluateConfig) -> Iterator[Place]:
    """The places with their rows and codes, read in batches of one shape."""
    sequences_p, positions_p = _draw_places(context, config)
    n_window = min(
        _TOKENS_BEFORE + config.ablation_horizon, context.store.context_length
    )
    starts_p = np.maximum(positions_p - (n_window - config.ablation_horizon), 0)
    n_batch = -(-config.batch_sequences // context.mesh.size) * context.mesh.size
    read = jax.jit(
        _read_rows, static_argnames="site", out_shardings=replicated(context.mesh)
    )
    for first in range(0, len(sequences_p), n_batch):
        chosen = slice(first, first + n_batch)
        starts_b = starts_p[chosen]
        inside_b = positions_p[chosen] - starts_b
        tokens_bt = context.store.read_tokens(sequences_p[chosen])
        window_bw = starts_b[:, None] + np.arange(n_window)
        tokens_bw = np.take_along_axis(tokens_bt, window_bw, axis=1)
        missing = n_batch - len(inside_b)
        batch = (
            np.pad(tokens_bw, ((0, missing), (0, 0)), mode="edge"),
            np.pad(inside_b, (0, missing), mode="edge"),
        )
        batch = jax.device_put(batch, over_devices(context))
        read_rows = read(context.sae, context.subject, *batch, site=context.site)
        rows_bd, values_bk, indices_bk, parts_bkd = jax.device_get(read_rows)
        for i, inside in enumerate(inside_b):
            is_active_k = values_bk[i] > 0
            yield Place(
                sequence=int(sequences_p[first + i]),
                tokens_w=tokens_bw[i],
                position=int(starts_b[i] + inside),
                inside=int(inside),
                row_d=rows_bd[i].astype(np.float64),
                latents_k=indices_bk[i, is_active_k],
                parts_kd=parts_bkd[i, is_active_k],
            )


def _draw_places(
    context: Context, config: EvaluateConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sequences and positions; `ablation_horizon` tokens begin at each position."""
    horizon, wanted = config.ablation_horizon, config.ablated_tokens

    def has_place(positions: Positions) -> NDArray[np.bool_]:
        return np.any(_find_places(positions, horizon), axis=1, keepdims=True)

    sequences = choose_until(context, wanted, 1, has_place)
    is_place_sn = _find_places(read_positions(context.store, sequences), horizon)
    ranked = []
    for sequence, is_place_n in zip(sequences, is_place_sn, strict=True):
        drawn = make_rng(context, sequence).permutation(len(is_place_n))
        ranked += [(i, sequence, n) for i, n in enumerate(drawn[is_place_n[drawn]])]
    # The first of every context, then the second of each, and so on.
    ranked.sort(key=lambda place: place[0])
    _, sequences_p, positions_p = np.array(ranked[:wanted], np.int64).reshape(-1, 3).T
    return sequences_p, positions_p


def _find_places(positions: Positions, horizon: int) -> NDArray[np.bool_]:
    """Which positions are rows, and begin `horizon` tokens, [S, T - horizon + 1]."""
    is_whole_sn = sliding_window_view(positions.is_real_st, horizon, axis=1).all(-1)
    return is_whole_sn & positions.is_row_st[:, : is_whole_sn.shape[1]]


def _read_rows(
    sae: Sae, subject: Subject, tokens_bw: jax.Array, inside_b: jax.Array, site: str
) -> tuple[jax.Array, ...]:
    """The rows [B, D], their codes, and what each latent adds to x̂, [B, K, D]."""
    _, acts = subject.forward(tokens_bw, capture=[site], logits=False)
    rows_bd = acts[site][jnp.arange(len(inside_b)), inside_b].astype(jnp.float32)
    code = sae.encode(rows_bd)
    # x̂ is affine in the values, so a latent adds to b_dec alone what it adds to x̂.
    alone = dataclasses.replace(
        code,
        values=code.values[..., None],
        indices=code.indices[..., None],
        shift=code.shift[:, None],
        scale=code.scale[:, None],
    )
    nothing = dataclasses.replace(code, values=jnp.zeros_like(code.values))
    parts_bkd = sae.decode(alone) - sae.decode(nothing)[:, None]
    return rows_bd, code.values, code.indices, parts_bkd


def over_devices(context: Context) -> NamedSharding:
    return NamedSharding(context.mesh, PartitionSpec((DATA, LATENT)))


def make_rng(context: Context, *place: int) -> np.random.Generator:
    return np.random.default_rng((context.seed, *map(int, place)))
