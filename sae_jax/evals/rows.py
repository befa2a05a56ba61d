"""One pass over held-out rows: what `reconstruction` and `density` are made of.

A row gives a handful of float32 numbers, computed on the device against means that a
first pass over the rows has found; all sums over rows are float64 on the host. So
nothing cancels, however far the mean is from zero.
"""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import (
    Context,
    Sae,
    choose_row_sequences,
    iterate_rows,
)
from sae_jax.mesh import replicated

Array = NDArray[np.float64]

_OF_BATCHES = ("fvu", "varies", "error_raw_d", "variation_raw_d")


@dataclasses.dataclass(frozen=True, eq=False)
class RowMeasures:
    """Figures of each row [contexts, positions], of each batch, and firing counts.

    At positions that are no rows figures are 0. Squares are summed over D: `error` is
    |x̂ - x|^2, `variation` is |x - mean of the data|^2, both in the SAE's space, or
    with `_raw` in activation space; `power_raw` is |x|^2. `recon_variation` is
    |x̂ - m|^2 and `covariation` (x̂ - m)·(x - m) about the mean m of the data, in the
    SAE's space. `cosine` is 0 where x or x̂ is 0. `n_cut` counts active latents that
    the code has no room for. `fvu_n` has one entry a batch, but for batches whose rows
    do not vary; `error_raw_d` and `variation_raw_d` are summed over rows instead of D.
    A latent fires where its value is above 0.
    """

    is_row_st: NDArray[np.bool_]
    error_st: Array
    variation_st: Array
    error_raw_st: Array
    variation_raw_st: Array
    power_raw_st: Array
    recon_variation_st: Array
    covariation_st: Array
    cosine_st: Array
    l0_st: Array
    n_cut_st: Array
    fvu_n: Array
    error_raw_d: Array
    variation_raw_d: Array
    counts_l: NDArray[np.int64]

    @property
    def n_rows(self) -> int:
        return int(self.is_row_st.sum())


def measure_rows(context: Context, config: EvaluateConfig) -> RowMeasures:
    """The measures of `config.rows` held-out rows; done once for each context."""
    key = (config.rows, config.batch_rows)
    if key not in context.measured:
        context.measured[key] = _measure(context, config)
    return context.measured[key]


def _measure(context: Context, config: EvaluateConfig) -> RowMeasures:
    sequences = choose_row_sequences(context, config.rows)
    n_positions = context.store.context_length
    sae, everywhere = context.sae, replicated(context.mesh)
    means = _find_means(context, sequences, config.batch_rows)
    measure_batch = jax.jit(_measure_batch, out_shardings=everywhere)
    counts_l = jax.device_put(jnp.zeros(sae.n_latents, jnp.int32), everywhere)
    batches: list[dict[str, NDArray[np.float32]]] = []
    with contextlib.closing(
        iterate_rows(context, sequences, config.batch_rows, "measure")
    ) as rows:
        for rows_bd, mask_b in rows:
            measures, counts_l = measure_batch(sae, rows_bd, mask_b, means, counts_l)
            batches.append(jax.device_get(measures) | {"is_row": np.asarray(mask_b)})
    n_here = len(sequences) * n_positions  # behind it the last batch is filled up
    all_st = {
        name: _concatenate(batches, name)[:n_here].reshape(-1, n_positions)
        for name in batches[0]
        if name not in _OF_BATCHES
    }
    is_row_st = all_st.pop("is_row") > 0
    return RowMeasures(
        is_row_st=is_row_st,
        **{f"{name}_st": np.where(is_row_st, v, 0) for name, v in all_st.items()},
        fvu_n=_concatenate(batches, "fvu")[_concatenate(batches, "varies") > 0],
        error_raw_d=_sum(batches, "error_raw_d"),
        variation_raw_d=_sum(batches, "variation_raw_d"),
        counts_l=np.asarray(counts_l, np.int64),
    )


def _find_means(
    context: Context, sequences: NDArray[np.int64], batch_rows: int
) -> tuple[jax.Array, jax.Array]:
    """The mean row [D] in the SAE's space and in activation space."""
    sum_batch = jax.jit(_sum_batch, out_shardings=replicated(context.mesh))
    total: Any = 0
    n_rows = 0
    for rows_bd, mask_b in iterate_rows(context, sequences, batch_rows):
        sums = jax.device_get(sum_batch(context.sae, rows_bd, mask_b))
        total = total + np.asarray(sums, np.float64)
        n_rows += int(np.sum(mask_b))
    mean_d, mean_raw_d = (total / n_rows).astype(np.float32)
    return jnp.asarray(mean_d), jnp.asarray(mean_raw_d)


def _sum_batch(sae: Sae, rows_bd: jax.Array, mask_b: jax.Array) -> jax.Array:
    raw_bd = rows_bd.astype(jnp.float32)
    normed_bd, _, _ = sae.normalize(raw_bd)
    both_2bd = jnp.stack([normed_bd.astype(jnp.float32), raw_bd])
    return jnp.sum(both_2bd, axis=1, where=mask_b[:, None])


def _measure_batch(
    sae: Sae,
    rows_bd: jax.Array,
    mask_b: jax.Array,
    means: tuple[jax.Array, jax.Array],
    counts_l: jax.Array,
) -> tuple[dict[str, jax.Array], jax.Array]:
    mean_d, mean_raw_d = means
    raw_bd = rows_bd.astype(jnp.float32)
    code = sae.encode(raw_bd)
    recon_bd = sae.decode(code)
    normed_bd, shift_b1, scale_b1 = sae.normalize(raw_bd)
    centred_bd = normed_bd - mean_d
    recon_centred_bd = (recon_bd - shift_b1) / scale_b1 - mean_d
    is_real_b1 = mask_b[:, None]
    fired_bk = (code.values > 0) & is_real_b1
    error_raw_b = _sum_squares(recon_bd - raw_bd)
    power_raw_b = _sum_squares(raw_bd)
    norms_b = jnp.sqrt(power_raw_b) * jnp.sqrt(_sum_squares(recon_bd))
    batch_mean_d = jnp.mean(raw_bd, axis=0, where=mask_b[:, None])
    variation_b = _sum_squares(raw_bd - batch_mean_d)
    variation = jnp.sum(variation_b, where=mask_b)
    return {
        "error": _sum_squares((recon_bd - raw_bd) / scale_b1),
        "variation": _sum_squares(centred_bd),
        "recon_variation": _sum_squares(recon_centred_bd),
        "covariation": jnp.sum(recon_centred_bd * centred_bd, axis=1),
        "error_raw": error_raw_b,
        "variation_raw": _sum_squares(raw_bd - mean_raw_d),
        "power_raw": power_raw_b,
        "cosine": jnp.sum(recon_bd * raw_bd, axis=1) / jnp.where(norms_b, norms_b, 1),
        "l0": jnp.sum(fired_bk, axis=1),
        "n_cut": code.n_cut[:, 0],
        "fvu": jnp.sum(error_raw_b, where=mask_b, keepdims=True) / variation,
        "varies": (variation != 0)[None],
        "error_raw_d": _sum_rows((recon_bd - raw_bd) ** 2, is_real_b1),
        "variation_raw_d": _sum_rows((raw_bd - mean_raw_d) ** 2, is_real_b1),
    }, counts_l.at[code.indices].add(fired_bk.astype(jnp.int32))


def _sum_squares(rows_bd: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(rows_bd.astype(jnp.float32)), axis=1)


def _sum_rows(squares_bd: jax.Array, is_real_b1: jax.Array) -> jax.Array:
    return jnp.sum(squares_bd, axis=0, where=is_real_b1)


def _concatenate(batches: list[dict[str, Any]], name: str) -> Array:
    return np.concatenate([batch[name] for batch in batches]).astype(np.float64)


def _sum(batches: list[dict[str, Any]], name: str) -> Array:
    return np.sum([batch[name] for batch in batches], axis=0, dtype=np.float64)
