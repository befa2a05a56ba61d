"""How the default subject and its family learn: rows, schedule, optimizer, step.

Matrices learn by Muon, the rest by AdamW; the rate warms up and falls linearly to zero.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from subject import corpus
from tokenizers import Tokenizer

from sae_jax.subjects import Subject, next_token_loss
from sae_jax.subjects.llama import LlamaConfig, Weights, list_shapes
from sae_jax.text import Document


@dataclass(frozen=True)
class Config:
    """Sizes and recipe; the rates of AdamW and Muon are those of their peak."""

    model: LlamaConfig
    library_rows: int = 12  # of a batch, from the standard library
    extra_rows: int = 4  # of a batch, from the extra text
    muon_rate: float = 0.02
    adam_rate: float = 0.004
    weight_decay: float = 0.02
    warmup: float = 0.02  # share of the minutes
    minutes: float = 95.0
    save_minutes: float = 4.0
    seed: int = 0


@dataclass(frozen=True)
class Data:
    """Token streams."""

    library: np.ndarray
    extra: np.ndarray
    heldout: np.ndarray
    heldout_bytes: int


def read_data(
    tokenizer: Tokenizer,
    library: Sequence[Document],
    heldout: Sequence[Document],
    extra_path: str | None,
) -> Data:
    """All texts in tokens; without extra text the library stands in for it."""

    def make_stream(texts: Sequence[str], seed: int) -> np.ndarray:
        return corpus.make_stream(tokenizer, texts, seed)

    library_stream = make_stream([document.text for document in library], 1)
    extra_stream = library_stream
    if extra_path is not None:
        extra_stream = make_stream(corpus.read_json_lines(Path(extra_path)), 2)
    heldout_texts = [document.text for document in heldout]
    return Data(
        library_stream,
        extra_stream,
        make_stream(heldout_texts, 3),
        sum(len(text.encode()) for text in heldout_texts),
    )


def draw_batch(config: Config, data: Data, step: int) -> np.ndarray:
    """The rows [B, T] of a step: a function of the step and the seed alone."""
    parts = [
        corpus.take_rows(
            stream, step * count, count, config.model.context_length, config.seed + part
        )
        for part, (stream, count) in enumerate(
            [(data.library, config.library_rows), (data.extra, config.extra_rows)]
        )
    ]
    return np.concatenate(parts)


def schedule(share: float, config: Config) -> float:
    """The rate, as a share of its peak, after this share of the minutes."""
    rising = (share + 1e-3) / config.warmup
    falling = (1 - share) / (1 - config.warmup)
    return max(0.0, min(1.0, rising, falling))


def make_loss(subject: Subject) -> Callable[[Weights, jax.Array], jax.Array]:
    """The mean loss of a subject with these weights in place of its own."""

    def compute_loss(weights: Weights, tokens_bt: jax.Array) -> jax.Array:
        logits_btv, _ = replace(subject, weights=weights).forward(tokens_bt)
        assert logits_btv is not None
        return next_token_loss(logits_btv, tokens_bt).mean()

    return compute_loss


def make_step(
    compute_loss: Callable[[Weights, jax.Array], jax.Array],
    optimizer: optax.GradientTransformation,
) -> Callable[..., tuple[Weights, optax.OptState, jax.Array]]:
    """A step of (weights, optimizer state, tokens, rate), with the loss before it."""

    @jax.jit
    def step(
        weights: Weights, opt_state: optax.OptState, tokens_bt: jax.Array, rate: float
    ) -> tuple[Weights, optax.OptState, jax.Array]:
        loss, grads = jax.value_and_grad(compute_loss)(weights, tokens_bt)
        updates, opt_state = optimizer.update(grads, opt_state, weights)
        updates = jax.tree.map(lambda update: rate * update, updates)
        return optax.apply_updates(weights, updates), opt_state, loss

    return step


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, AdamW for the rest, at a rate of one."""

    def choose(weights: Weights) -> Any:
        def is_matrix(path: tuple, leaf: Any) -> Any:
            is_muon = path[-1].key.startswith("w_")
            return optax.contrib.MuonDimensionNumbers(0, 1) if is_muon else None

        return jax.tree_util.tree_map_with_path(is_matrix, weights)

    return optax.contrib.muon(
        1.0,
        muon_weight_dimension_numbers=choose,
        adam_learning_rate=config.adam_rate / config.muon_rate,
        adam_b2=0.98,
        weight_decay=config.weight_decay,
    )


def init_weights(config: LlamaConfig, seed: int) -> Weights:
    """Blocks that add nothing yet: their output matrices are zero."""
    rng = np.random.default_rng(seed)

    def init(path: tuple, shape: tuple[int, ...]) -> jax.Array:
        name = path[-1].key
        if len(shape) == 1:
            return jnp.ones(shape)
        if name in ("w_o_hd", "w_down_md"):
            return jnp.zeros(shape)
        scale = 0.02 if name == "embed_vd" else 0.6 / math.sqrt(shape[0])
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(
        init, list_shapes(config), is_leaf=lambda node: isinstance(node, tuple)
    )
