"""Encoder and choice in one pass: the K largest pre-activations, tile by tile.

    values_bk, indices_bk = the K largest of  x_bd . w_ld^T + bias_l  in each row

The matmul is the one dense product of a training step. A tile's pre-activations become
candidates while they are in cache; [B, L] is never held. The methods (`sae.selection`):

    exact     buckets, and proof: rows for which they cannot show that they found the K
              largest are chosen for once more, by sorting
    bucketed  buckets alone, with the expected recall of `topk.recall`; by a kernel of
              the platform's where `kernels` are given and it takes the shapes
    approx    `lax.approx_max_k` of a few rows at a time; exact on all but TPUs

A row that holds a NaN or an infinity gets NaN values, so that the loss shows it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from sae_jax import sparse
from sae_jax.kernels import Kernels
from sae_jax.matmul import matmul
from sae_jax.topk import bucketed, exact
from sae_jax.topk.plan import Choice

_FEW = 64  # at most 1 / this of the rows are chosen for again by themselves

Code = tuple[jax.Array, jax.Array]  # values and columns, [B, K] each


def encode(
    x_bd: jax.Array,
    w_ld: jax.Array,
    bias_l: jax.Array,
    choice: Choice,
    dtype: DTypeLike,
    kernels: Kernels | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The choice among the latents of one shard.

    Inside `jax.shard_map` all must vary over the same mesh axes.

    Returns:
        Values [B, K] in falling order, ReLU not applied, with their sparse gradient;
        the shard's columns, int32; and how many rows were chosen for again.
    """
    x, w, bias = (lax.stop_gradient(array) for array in (x_bd, w_ld, bias_l))
    values_bk, columns_bk, n_resorted = _choose(x, w, bias, choice, dtype, kernels)
    values_bk = sparse.multiply_at(
        values_bk, columns_bk, x_bd, w_ld, bias_l, dtype, kernels
    )
    return values_bk, columns_bk, n_resorted


class _Latents(NamedTuple):
    """A shard's encoder, `size` latents at a time."""

    w_ld: jax.Array
    bias_l: jax.Array
    size: int

    def project(self, x_bd: jax.Array, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A tile's pre-activations [B, size], and its first latent.

        The last tile reaches back where it is not full; what an earlier tile has seen
        is then -inf.
        """
        n_own = self.w_ld.shape[0]
        first = jnp.minimum(tile * self.size, n_own - self.size)
        w_td = lax.dynamic_slice_in_dim(self.w_ld, first, self.size)
        pre_bt = matmul(x_bd, w_td.T, x_bd.dtype)
        pre_bt += lax.dynamic_slice_in_dim(self.bias_l, first, self.size)
        if n_own % self.size:
            is_new_t = first + lax.iota(jnp.int32, self.size) >= tile * self.size
            pre_bt = jnp.where(is_new_t, pre_bt, -jnp.inf)
        return pre_bt, first

    def fold(
        self, on_tile: Callable[..., Any], x_bd: jax.Array, start: int, carry: Any
    ) -> Any:
        """on_tile(carry, pre_bt, first) over the tiles from `start` on."""
        n_tiles = -(-self.w_ld.shape[0] // self.size)
        return lax.fori_loop(
            start, n_tiles, lambda i, c: on_tile(c, *self.project(x_bd, i)), carry
        )


def _choose(
    x_bd: jax.Array,
    w_ld: jax.Array,
    bias_l: jax.Array,
    choice: Choice,
    dtype: DTypeLike,
    kernels: Kernels | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    is_finite_b1 = jnp.isfinite(jnp.sum(x_bd, axis=1, keepdims=True))
    x_bd = jnp.where(is_finite_b1, x_bd, 0).astype(dtype)
    latents = _Latents(w_ld.astype(dtype), bias_l, choice.tile_latents)
    n_resorted = jnp.full_like(x_bd, 0, dtype=jnp.int32, shape=())
    if choice.method == "exact" and choice.n_buckets:
        code, n_resorted = _prove(latents, x_bd, choice)
    elif choice.n_buckets:
        code = _map_rows(
            lambda x: _find(latents, x, choice, kernels), x_bd, choice.tile_rows
        )
    elif choice.method == "approx":
        code = _approximate(latents, x_bd, choice)
    else:
        code = _map_rows(lambda x: _sort(latents, x, choice.k), x_bd, choice.tile_rows)
    return jnp.where(is_finite_b1, code[0], jnp.nan), code[1], n_resorted


def _prove(
    latents: _Latents, x_bd: jax.Array, choice: Choice
) -> tuple[Code, jax.Array]:
    """The buckets' choice; for rows where it may be wrong, that of sorting."""
    n_rows = x_bd.shape[0]
    few = max(1, n_rows // _FEW)
    *code, is_unproven_b = _map_rows(
        lambda x: _fill(latents, x, choice), x_bd, choice.tile_rows
    )
    n_resorted = jnp.sum(is_unproven_b, dtype=jnp.int32)

    def sort_few() -> Code:
        (rows,) = jnp.nonzero(is_unproven_b, size=few, fill_value=n_rows)
        again = _sort(latents, x_bd.at[rows].get(mode="clip"), choice.k)
        # libtpu aborts where what is scattered is gathered in the same fusion.
        again = lax.optimization_barrier(again)
        values_bk, columns_bk = (
            old.at[rows].set(new, mode="drop") for old, new in zip(code, again)
        )
        return values_bk, columns_bk

    def sort_all() -> Code:
        return _map_rows(lambda x: _sort(latents, x, choice.k), x_bd, choice.tile_rows)

    need = (n_resorted > 0).astype(jnp.int32) + (n_resorted > few)
    return lax.switch(need, (lambda: tuple(code), sort_few, sort_all)), n_resorted


def _find(
    latents: _Latents, x_bd: jax.Array, choice: Choice, kernels: Kernels | None
) -> Code:
    """The buckets' choice, their candidates found by the kernel if there is one."""
    own = kernels and kernels.bucket_candidates(
        x_bd, latents.w_ld, latents.bias_l, choice.n_buckets, choice.kept
    )
    if own is None:
        return _fill(latents, x_bd, choice)[:2]
    values, columns = own  # levels side by side
    return bucketed.best(bucketed.Buckets((values,), (columns,), None), choice.k)[:2]


def _fill(
    latents: _Latents, x_bd: jax.Array, choice: Choice
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The buckets' choice and, for the exact method, where it may be wrong."""
    is_exact = choice.method == "exact"
    buckets = bucketed.start(x_bd, choice.n_buckets, choice.kept, is_exact)
    return bucketed.best(latents.fold(bucketed.insert, x_bd, 0, buckets), choice.k)


def _sort(latents: _Latents, x_bd: jax.Array, k: int) -> Code:
    """The choice by `top_k` in every tile; ties go to the lowest latent."""

    def merge(best: Code, pre_bt: jax.Array, first: jax.Array) -> Code:
        values_bk, columns_bk = exact.choose(pre_bt, k)
        # Those of earlier tiles come first: `top_k` prefers the earlier of equals.
        values = jnp.concatenate([best[0], values_bk], axis=1)
        columns = jnp.concatenate([best[1], columns_bk + first], axis=1)
        values_bk, places_bk = exact.choose(values, k)
        return values_bk, jnp.take_along_axis(columns, places_bk, axis=1)

    first, _ = latents.project(x_bd, jnp.int32(0))
    return latents.fold(merge, x_bd, 1, exact.choose(first, k))


def _approximate(latents: _Latents, x_bd: jax.Array, choice: Choice) -> Code:
    """The choice by XLA's own two stages, which take all latents at once."""

    def choose(x_bd: jax.Array) -> Code:
        pre_bl = matmul(x_bd, latents.w_ld.T, x_bd.dtype) + latents.bias_l
        values_bk, columns_bk = lax.approx_max_k(
            pre_bl,
            choice.k,
            recall_target=choice.recall_target,
            reduction_input_size_override=choice.n_latents,
        )
        return values_bk, columns_bk

    n_own = latents.w_ld.shape[0]
    tile_rows = max(1, choice.tile_rows * choice.tile_latents // n_own)
    return _map_rows(choose, x_bd, tile_rows)


def _map_rows(on_rows: Callable[[jax.Array], Any], x_bd: jax.Array, size: int) -> Any:
    """on_rows of `size` rows at a time, its results put together again."""
    n_rows, d_model = x_bd.shape
    if n_rows <= size:
        return on_rows(x_bd)
    n_tiles = -(-n_rows // size)
    size = -(-n_rows // n_tiles)
    filled_bd = jnp.pad(x_bd, ((0, n_tiles * size - n_rows), (0, 0)))
    results = lax.map(on_rows, filled_bd.reshape(n_tiles, size, d_model))
    return jax.tree.map(
        lambda result: result.reshape(-1, *result.shape[2:])[:n_rows], results
    )
