"""Directions in any number, searched a tile at a time for the best.

Directions are the rows of a weight matrix, the channels themselves, or random; what is
searched is scaled to unit norm. Each latent shard goes through its own part of them,
slices or draws a tile, and keeps the best that it has seen. So of scores [Q, L] one
tile is held, and of random directions too. Between shards moves one winner each. The
result is that of a search in order, where the first of equals wins, on every mesh.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sae_jax.mesh import DATA, LATENT, replicated

_TILE_SIZE = 2**20  # numbers, 4 MiB, which the caches of a CPU hold


class Directions(Protocol):
    """Directions by their number. A pytree, whose arrays lie as `spec` says."""

    spec: ClassVar[P]

    @property
    def shape(self) -> tuple[int, ...]:
        """How many, and their width D."""

    def at(self, index_q: jax.Array) -> jax.Array:
        """The directions [Q, D] of these numbers, as they are."""

    def take(self, first: jax.Array, n: int) -> jax.Array:
        """n directions [n, D] from `first` on, inside the shard that has them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a matrix that is partitioned over latents."""

    rows_ld: jax.Array
    spec: ClassVar[P] = P(LATENT, None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows_ld.shape

    def at(self, index_q: jax.Array) -> jax.Array:
        return self.rows_ld[index_q]

    def take(self, first: jax.Array, n: int) -> jax.Array:
        n_own = self.rows_ld.shape[0]
        own_first = first - lax.axis_index(LATENT) * n_own
        return lax.dynamic_slice_in_dim(self.rows_ld, own_first, n)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Channels:
    """The D axes of a space."""

    width: int = dataclasses.field(metadata={"static": True})
    spec: ClassVar[P] = P()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.width, self.width

    def at(self, index_q: jax.Array) -> jax.Array:
        return jax.nn.one_hot(index_q, self.width)

    def take(self, first: jax.Array, n: int) -> jax.Array:
        return self.at(first + jnp.arange(n))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RandomDirections:
    """As likely to point one way as another. Each depends on key and number alone."""

    key: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    spec: ClassVar[P] = P()

    def at(self, index_q: jax.Array) -> jax.Array:
        keys_q = jax.vmap(jax.random.fold_in, (None, 0))(self.key, index_q)
        return jax.vmap(lambda key: jax.random.normal(key, self.shape[1:]))(keys_q)

    def take(self, first: jax.Array, n: int) -> jax.Array:
        return self.at(first + jnp.arange(n))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Best:
    """The winner for each query: its score, its number, and what came with it, [Q].

    Where every score is NaN, the score is -inf and the number 0.
    """

    score_q: jax.Array
    index_q: jax.Array
    extras: Any


# Scores [Q, T] of unit directions [T, D] for queries, and arrays [Q, T] beside them.
Score = Callable[..., tuple[jax.Array, Any]]


@functools.partial(jax.jit, static_argnames=("mesh", "score", "n_held"))
def find_best(
    directions: Directions, mesh: Mesh, score: Score, n_held: int, *queries: jax.Array
) -> Best:
    """The direction of highest score for each query; everywhere on the mesh.

    Args:
        score: `score(unit_td, *queries)`, for the queries of one data shard.
        n_held: numbers that `score` holds for each direction.
        queries: arrays [Q, ...], partitioned over data; Q must be divisible.
    """

    def on_shard(directions: Directions, *queries: jax.Array) -> Best:
        best = _search(directions, shape, n_own, n_tile, score, queries)
        return jax.tree.map(lambda leaf_q: leaf_q[None], best)

    shape = directions.shape
    n_own = -(-shape[0] // mesh.shape[LATENT])
    n_tile = min(n_own, max(1, _TILE_SIZE // max(n_held, shape[1])))
    mapped = jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(directions.spec, *(P(DATA) for _ in queries)),
        out_specs=P(LATENT, DATA),
        # Loops start from what is alike on all shards, which the checker refuses.
        check_vma=False,
    )
    return lax.with_sharding_constraint(
        _choose(mapped(directions, *queries)), replicated(mesh)
    )


@functools.partial(jax.jit, static_argnames="mesh")
def look_up(directions: Directions, mesh: Mesh, index_q: jax.Array) -> jax.Array:
    """The unit directions [Q, D] of these numbers; everywhere on the mesh."""
    rows_qd = _unit(directions.at(index_q).astype(jnp.float32))
    return lax.with_sharding_constraint(rows_qd, replicated(mesh))


def _unit(rows_td: jax.Array) -> jax.Array:
    """Rows of norm 1; zeros stay zeros."""
    # By the largest first, for squares overflow sooner.
    largest_t1 = jnp.max(jnp.abs(rows_td), axis=1, keepdims=True)
    rows_td = rows_td / jnp.where(largest_t1 == 0, 1, largest_t1)
    norm_t1 = jnp.linalg.norm(rows_td, axis=1, keepdims=True)
    return rows_td / jnp.where(norm_t1 == 0, 1, norm_t1)


def _search(
    directions: Directions,
    shape: tuple[int, ...],
    n_own: int,
    n_tile: int,
    score: Score,
    queries: tuple[jax.Array, ...],
) -> Best:
    """The best of a shard's own part."""
    first = lax.axis_index(LATENT) * n_own
    last = jnp.minimum(first + n_own, shape[0]) - n_tile

    def best_of_tile(number: jax.Array | int) -> Best:
        # The last tile overlaps the one before it rather than being shorter.
        start = jnp.minimum(first + number * n_tile, last)
        unit_td = _unit(directions.take(start, n_tile).astype(jnp.float32))
        scores_qt, extras = score(unit_td, *queries)
        scores_qt = jnp.where(jnp.isnan(scores_qt), -jnp.inf, scores_qt)
        place_q = jnp.argmax(scores_qt, axis=1)
        score_q, extras_q = jax.tree.map(
            lambda leaf_qt: jnp.take_along_axis(leaf_qt, place_q[:, None], 1)[:, 0],
            (scores_qt, extras),
        )
        return Best(score_q, start + place_q, extras_q)

    def improve(number: jax.Array, best: Best) -> Best:
        other = best_of_tile(number)
        is_better_q = other.score_q > best.score_q
        return jax.tree.map(
            lambda new_q, old_q: jnp.where(is_better_q, new_q, old_q), other, best
        )

    nothing = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(best_of_tile, 0)
    )
    nothing = dataclasses.replace(nothing, score_q=nothing.score_q - jnp.inf)
    return lax.fori_loop(0, -(-n_own // n_tile), improve, nothing)


def _choose(best_s: Best) -> Best:
    """The best of all shards, whose leaves are [S, Q]; the lowest shard of equals."""
    winner_1q = jnp.argmax(best_s.score_q, axis=0)[None]
    return jax.tree.map(
        lambda leaf_sq: jnp.take_along_axis(leaf_sq, winner_1q, 0)[0], best_s
    )
