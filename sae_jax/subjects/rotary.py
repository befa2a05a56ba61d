"""Rotary positions, and the ways to stretch them over a longer context.

Dimension i of a head turns with dimension i + E/2 (rotate-half) by the angle

    t · f_i,    f_i = theta^(-2i/E)        (Su et al. 2021, arXiv:2104.09864)

where a scaling puts other frequencies in the place of the f_i: `linear` divides them
(Chen et al. 2023, arXiv:2306.15595), `llama3` only those of long waves (as Llama 3.1
does), `yarn` by a ramp over the dimensions (Peng et al. 2023, arXiv:2309.00071).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from sae_jax.subjects.fields import Fields

Frequencies = NDArray[np.float64]
Rotary = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class Linear:
    """All waves are `factor` times as long."""

    factor: float
    magnitude: float = 1.0

    def scale(self, frequency_e: Frequencies, theta: float) -> Frequencies:
        return frequency_e / self.factor


@dataclass(frozen=True)
class Llama3:
    """Waves longer than original_context / low_freq_factor are `factor` times as long,
    those shorter than original_context / high_freq_factor stay, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int
    magnitude: float = 1.0

    def scale(self, frequency_e: Frequencies, theta: float) -> Frequencies:
        turns_e = self.original_context * frequency_e / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept_e = np.clip((turns_e - self.low_freq_factor) / span, 0, 1)
        return frequency_e * (kept_e + (1 - kept_e) / self.factor)


@dataclass(frozen=True)
class Yarn:
    """Dimensions that turn more than `beta_fast` times over the original context keep
    their wave, those below `beta_slow` have one `factor` times as long, a ramp over the
    dimensions between; cosine and sine are multiplied by `magnitude`."""

    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float
    magnitude: float
    truncate: bool

    def scale(self, frequency_e: Frequencies, theta: float) -> Frequencies:
        half = len(frequency_e)

        def find_dimension(turns: float) -> float:
            wave = self.original_context / (turns * 2 * math.pi)
            return half * math.log(wave) / math.log(theta)

        low, high = find_dimension(self.beta_fast), find_dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        span = high - low or 0.001
        stretched_e = np.clip((np.arange(half) - low) / span, 0, 1)
        return frequency_e * (1 - stretched_e + stretched_e / self.factor)


Scaling = Linear | Llama3 | Yarn

# `dynamic` changes the frequencies of rows beyond the context, which none has.
_TYPES = ("default", "dynamic", "linear", "llama3", "yarn")


def read_rotary(fields: Fields, context_length: int) -> tuple[float, Scaling | None]:
    """Theta and the scaling that a config.json gives, in the old spelling or the new.

    Old: `rope_theta` beside `rope_scaling`; new: both in `rope_parameters`. Where there
    are both objects, the old one alone counts, as in transformers.
    """
    name = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    rope = Fields(fields.path, fields.read_object(name))
    for place in (fields, rope):
        place.refuse_other(partial_rotary_factor=1.0)
    for key, value in rope.values.items():
        if isinstance(value, dict):
            raise ValueError(
                f"{fields.path}: {name} has an object of its own for {key!r}, only one "
                "for all layers is supported"
            )
    # Some folders hold null where there is nothing to say.
    named = rope if rope.values.get("rope_theta") is not None else fields
    theta = named.read_float("rope_theta", 10000.0)
    spelling = "rope_type" if rope.values.get("rope_type") is not None else "type"
    if rope.values.get(spelling) is None:
        return theta, None
    kind = rope.read_choice(spelling, dict.fromkeys(_TYPES), "default")
    # Beside the object, where it is there, it counts.
    outer = fields.values.get("original_max_position_embeddings")
    place = rope if outer is None else fields
    original = place.read_int("original_max_position_embeddings", context_length)
    return theta, _read_scaling(kind, rope, original, context_length)


def compute_rotary(
    d_head: int, theta: float, scaling: Scaling | None, t: int
) -> Rotary:
    """Float32 cosine and sine [T, E/2] of every position's angles."""
    frequency_e = theta ** (-np.arange(0, d_head, 2) / d_head)
    magnitude = 1.0
    if scaling is not None:
        frequency_e = scaling.scale(frequency_e, theta)
        magnitude = scaling.magnitude
    angle_te = jnp.arange(t)[:, None] * jnp.asarray(frequency_e, jnp.float32)
    return magnitude * jnp.cos(angle_te), magnitude * jnp.sin(angle_te)


def rotate(x_bhte: jax.Array, rotary: Rotary) -> jax.Array:
    """Turn each position's pairs (i, i + E/2) by the angles of that position."""
    cos_te, sin_te = rotary
    left, right = jnp.split(x_bhte.astype(jnp.float32), 2, axis=-1)
    turned = (left * cos_te - right * sin_te, right * cos_te + left * sin_te)
    return jnp.concatenate(turned, axis=-1).astype(x_bhte.dtype)


def _read_scaling(
    kind: str, rope: Fields, original: int, context_length: int
) -> Scaling | None:
    if kind == "linear":
        return Linear(rope.read_float("factor"))
    if kind == "llama3":
        low = rope.read_float("low_freq_factor")
        high = rope.read_float("high_freq_factor")
        if high <= low:
            raise ValueError(
                f"{rope.path}: high_freq_factor = {high} must be above "
                f"low_freq_factor = {low}"
            )
        return Llama3(rope.read_float("factor"), low, high, original)
    if kind == "yarn":
        factor = rope.read_float("factor", context_length / original)
        return Yarn(
            factor=factor,
            original_context=original,
            beta_fast=rope.read_float("beta_fast", 32),
            beta_slow=rope.read_float("beta_slow", 1),
            magnitude=_read_magnitude(rope, factor),
            truncate=rope.read_bool("truncate", True),
        )
    return None


def _read_magnitude(rope: Fields, factor: float) -> float:
    def grow(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    default = grow(1.0)
    if rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        mscale = rope.read_float("mscale")
        default = grow(mscale) / grow(rope.read_float("mscale_all_dim"))
    return rope.read_float("attention_factor", default)
