"""Input normalisation: the space an SAE works in.

Every kind maps a row x to (x - shift) / scale, and is undone by y * scale + shift:

    none              shift 0         scale 1
    center_unit_norm  shift mean(x)   scale |x - mean(x)|         (Gao et al. 2024, A)
    layer_norm        shift mean(x)   scale std(x, ddof=1) + 1e-5 (OpenAI's model.py)
    scale_to_sqrt_d   shift 0         scale E|x| / sqrt(D)        (Anthropic 2024)
    unit_mean_square  shift 0         scale sqrt(E|x|^2)          (Gemma Scope, 2.3)

where mean and std are over the D elements of one row and E is over the training rows.
The kind belongs to the SAE and is saved with it.
"""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp

_LAYER_NORM_EPS = 1e-5  # added to the standard deviation, not to the variance
_TINY = 1e-12  # a row without any variation is mapped to zero, not to NaN


class RowStatistics(Protocol):
    """What the scalar kinds need to know of the training rows."""

    @property
    def mean_norm(self) -> float: ...

    @property
    def mean_square_norm(self) -> float: ...


@dataclasses.dataclass(frozen=True)
class Normalization:
    """A kind and, for the scalar kinds, the one number fitted on the data."""

    kind: str = "none"
    scale: float = 1.0


def fit(kind: str, statistics: RowStatistics, d_model: int) -> Normalization:
    """The normalisation of this kind for rows with these statistics."""
    if kind == "scale_to_sqrt_d":
        return Normalization(kind, statistics.mean_norm / math.sqrt(d_model))
    if kind == "unit_mean_square":
        return Normalization(kind, math.sqrt(statistics.mean_square_norm))
    return Normalization(kind)


def apply(
    normalization: Normalization, acts_bd: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalised rows [..., D], and the shift and scale [..., 1] that undo it."""
    shift_b1, scale_b1 = _shift_and_scale(normalization, acts_bd)
    return (acts_bd - shift_b1) / scale_b1, shift_b1, scale_b1


def undo(normed_bd: jax.Array, shift_b1: jax.Array, scale_b1: jax.Array) -> jax.Array:
    """Rows back in activation space."""
    return normed_bd * scale_b1 + shift_b1


def _shift_and_scale(
    normalization: Normalization, acts_bd: jax.Array
) -> tuple[jax.Array, jax.Array]:
    column = (*acts_bd.shape[:-1], 1)
    if normalization.kind not in ("center_unit_norm", "layer_norm"):
        scale = jnp.asarray(normalization.scale, acts_bd.dtype)
        return jnp.zeros(column, acts_bd.dtype), jnp.broadcast_to(scale, column)
    shift_b1 = acts_bd.mean(-1, keepdims=True)
    centered_bd = acts_bd - shift_b1
    if normalization.kind == "center_unit_norm":
        norm_b1 = jnp.linalg.norm(centered_bd, axis=-1, keepdims=True)
        return shift_b1, jnp.maximum(norm_b1, _TINY)
    return shift_b1, centered_bd.std(-1, keepdims=True, ddof=1) + _LAYER_NORM_EPS
