"""The four kernels in plain JAX: what each platform's own must give.

    bucket_candidates   the `kept` largest of x w^T + bias in each bucket of latents
    decode              sum_k values_bk w[indices_bk]
    sampled_product     x_b . w[indices_bk]
    segment_outer       sum over the entries n of latent l of values_n g[rows_n]

Simple and slow: [B, L] and [B, K, D] are held. For tests, and to be read first.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sae_jax.kernels.shapes import check_candidates


def bucket_candidates(
    x_bd: jax.Array, w_ld: jax.Array, bias_l: jax.Array, n_buckets: int, kept: int
) -> tuple[jax.Array, jax.Array]:
    """Values float32 and latents int32, both [B, kept * n_buckets].

    Latent l is in bucket l mod n_buckets. Column level * n_buckets + bucket holds the
    bucket's largest at level 0, its next at level 1, ...; of equal ones the lowest
    latent comes first. A slot that no latent fills holds -inf and latent 0; so does
    one filled by -inf or NaN, which are never candidates.
    """
    check_candidates(x_bd, w_ld, bias_l, n_buckets, kept)
    n_latents = w_ld.shape[0]
    pre_bl = _multiply(x_bd, w_ld.T) + bias_l.astype(jnp.float32)
    pre_bl = jnp.where(jnp.isnan(pre_bl), -jnp.inf, pre_bl)
    missing = -n_latents % n_buckets + (kept - 1) * n_buckets
    pre_bl = jnp.pad(pre_bl, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    n_rows = pre_bl.shape[0]
    # top_k over the last axis: of equal values the lowest place comes first.
    by_bucket = pre_bl.reshape(n_rows, -1, n_buckets).transpose(0, 2, 1)
    values, places = lax.top_k(by_bucket, kept)
    indices = places * n_buckets + jnp.arange(n_buckets)[:, None]
    indices = jnp.where(values == -jnp.inf, 0, indices)
    return (
        values.transpose(0, 2, 1).reshape(n_rows, -1),
        indices.transpose(0, 2, 1).reshape(n_rows, -1).astype(jnp.int32),
    )


def decode(values_bk: jax.Array, indices_bk: jax.Array, w_ld: jax.Array) -> jax.Array:
    """Rows [B, D] float32: the weighted sum of the chosen rows of w."""
    chosen_bkd = w_ld[indices_bk].astype(jnp.float32)
    return jnp.sum(values_bk.astype(jnp.float32)[..., None] * chosen_bkd, axis=1)


def sampled_product(
    x_bd: jax.Array, w_ld: jax.Array, indices_bk: jax.Array
) -> jax.Array:
    """Products [B, K] float32 of each row with its chosen rows of w."""
    chosen_bkd = w_ld[indices_bk].astype(jnp.float32)
    return jnp.sum(x_bd.astype(jnp.float32)[:, None] * chosen_bkd, axis=2)


def segment_outer(
    values_n: jax.Array, rows_n: jax.Array, starts_l: jax.Array, g_bd: jax.Array
) -> jax.Array:
    """Sums [L, D] float32: latent l owns the entries starts_l[l] : starts_l[l + 1].

    starts_l [L + 1] ascends from 0 to the number of entries.
    """
    n_latents = starts_l.shape[0] - 1
    latents_n = jnp.searchsorted(starts_l, jnp.arange(values_n.size), side="right") - 1
    terms_nd = values_n.astype(jnp.float32)[:, None] * g_bd[rows_n].astype(jnp.float32)
    return jax.ops.segment_sum(terms_nd, latents_n, n_latents)


def _multiply(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(
        a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
