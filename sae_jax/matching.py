"""How near the directions of one dictionary are to those of another, by cosine.

    nearest     the largest cosine of a direction with any of the other dictionary
    assigned    its cosine with the one that it is paired with, where no two share a
                partner and the sum of cosines is as large as it can be

The nearest are found tile by tile (`sae_jax.directions`), in dictionaries of any size.
Pairing holds all cosines [N, L] on the host, twice in float64 while SciPy solves it, so
it is done for at most MAX_COSINES of them.

Sources: Sharkey et al. 2022, "Taking features out of superposition with sparse
autoencoders", for the mean of the nearest; Paulo and Belrose 2025 (arXiv:2501.16615)
for pairing the SAEs of two seeds.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from sae_jax.directions import Directions, Rows, find_best, look_up
from sae_jax.mesh import DATA, replicated

MAX_DRAWN = 4096  # latents that are matched with all of the other dictionary
MAX_COSINES = 2**26
_BLOCK = 4096  # queries, or directions, at a time

Cosines = NDArray[np.float32]
Numbers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Match:
    """Latents of one dictionary, and what they match in another.

    Attributes:
        latents_n: numbers of the latents, rising.
        nearest_n: their largest cosine with the other dictionary.
        nearest_to_n: with which of its latents.
        assigned_n: their cosine with their partner, or None where none were paired.
        assigned_to_n: the partners, or None.
    """

    latents_n: Numbers
    nearest_n: Cosines
    nearest_to_n: Numbers
    assigned_n: Cosines | None
    assigned_to_n: Numbers | None


def match(
    w_dec_ld: jax.Array,
    others: Directions,
    mesh: Mesh,
    seed: int = 0,
    n_most: int = MAX_DRAWN,
) -> Match:
    """Matches latents of a decoder, partitioned over the mesh, with another dictionary.

    All latents if they are `n_most` or fewer, else so many, drawn by the seed. They are
    matched with all of the others; with more of them, or fewer drawn, cosines rise.
    """
    latents_n = draw_latents(w_dec_ld.shape[0], n_most, seed)
    rows_nd = jax.device_get(look_up(Rows(w_dec_ld), mesh, jnp.asarray(latents_n)))
    nearest_n, nearest_to_n = find_nearest(rows_nd, others, mesh)
    if not is_assignable(len(latents_n), others.shape[0]):
        return Match(latents_n, nearest_n, nearest_to_n, None, None)
    assigned = assign(rows_nd, others, mesh)
    return Match(latents_n, nearest_n, nearest_to_n, *assigned)


def draw_latents(n_latents: int, n_most: int, seed: int) -> Numbers:
    """At most `n_most` latents, rising."""
    drawn = np.random.default_rng(seed).permutation(n_latents)[:n_most]
    return np.sort(drawn)


def is_assignable(n: int, n_others: int) -> bool:
    """Whether n directions can have partners among so many others."""
    return n <= n_others and n * n_others <= MAX_COSINES


def find_nearest(
    rows_nd: NDArray[np.floating], others: Directions, mesh: Mesh
) -> tuple[Cosines, Numbers]:
    """For each row the largest cosine with any of the others, and with which, [N].

    Rows of any norm and number; zeros have cosine 0 with all.
    """
    n, n_data = len(rows_nd), mesh.shape[DATA]
    n_block = -(-min(n, _BLOCK) // n_data) * n_data
    by_row = NamedSharding(mesh, P(DATA, None))
    cosines, numbers = [], []
    for first in range(0, n, n_block):
        block_nd = _normalise(rows_nd[first : first + n_block])
        padded_qd = np.pad(block_nd, ((0, n_block - len(block_nd)), (0, 0)))
        queries_qd = jax.device_put(padded_qd, by_row)
        n_held = n_block // n_data
        best = jax.device_get(
            find_best(others, mesh, _score_by_cosine, n_held, queries_qd)
        )
        cosines.append(best.score_q[: len(block_nd)])
        numbers.append(best.index_q[: len(block_nd)].astype(np.int64))
    return np.concatenate(cosines), np.concatenate(numbers)


def assign(
    rows_nd: NDArray[np.floating], others: Directions, mesh: Mesh
) -> tuple[Cosines, Numbers]:
    """For each row the cosine with its partner, and which that is, [N].

    Raises:
        ValueError: fewer others than rows, or more than MAX_COSINES cosines.
    """
    n, n_others = len(rows_nd), others.shape[0]
    if not is_assignable(n, n_others):
        raise ValueError(
            f"{n} directions cannot be paired with {n_others} others: there must be as "
            f"many at least, and {MAX_COSINES} cosines at most; draw fewer"
        )
    queries_nd = jax.device_put(_normalise(rows_nd), replicated(mesh))
    n_block = min(n_others, _BLOCK)
    cosines_nl = np.empty((n, n_others), np.float32)
    for first in range(0, n_others, n_block):
        # The last block overlaps the one before it, so that there is one shape.
        block = min(first, n_others - n_block) + np.arange(n_block)
        cosines_nb = _measure_cosines(others, mesh, jnp.asarray(block), queries_nd)
        cosines_nl[:, block] = jax.device_get(cosines_nb)
    if not np.isfinite(cosines_nl).all():
        raise ValueError(
            "a dictionary has values that are not finite: its latents cannot be paired"
        )
    _, partners_n = linear_sum_assignment(cosines_nl, maximize=True)
    return cosines_nl[np.arange(n), partners_n], partners_n


def _score_by_cosine(
    unit_td: jax.Array, queries_qd: jax.Array
) -> tuple[jax.Array, tuple[()]]:
    cosines_qt = jnp.matmul(queries_qd, unit_td.T, precision=lax.Precision.HIGHEST)
    return cosines_qt, ()


@functools.partial(jax.jit, static_argnames="mesh")
def _measure_cosines(
    others: Directions, mesh: Mesh, block_b: jax.Array, queries_nd: jax.Array
) -> jax.Array:
    cosines_nb, _ = _score_by_cosine(look_up(others, mesh, block_b), queries_nd)
    return lax.with_sharding_constraint(cosines_nb, replicated(mesh))


def _normalise(rows_nd: NDArray[np.floating]) -> NDArray[np.float32]:
    norms_n1 = np.linalg.norm(rows_nd.astype(np.float64), axis=1, keepdims=True)
    return (rows_nd / np.where(norms_n1 == 0, 1, norms_n1)).astype(np.float32)
