"""Products with a code of few non-zeros per row.

    decode: x̂_bd = sum_k values_bk * w_dec_ld[indices_bk]
"""

import jax
import jax.numpy as jnp


def to_dense(values_bk: jax.Array, indices_bk: jax.Array, n_latents: int) -> jax.Array:
    """The code as [..., L]: each value at its index, zero elsewhere."""
    *batch, k = values_bk.shape
    values = values_bk.reshape(-1, k)
    rows_b1 = jnp.arange(values.shape[0])[:, None]
    dense = (
        jnp.zeros((values.shape[0], n_latents), values.dtype)
        .at[rows_b1, indices_bk.reshape(-1, k)]
        .add(values)
    )
    return dense.reshape(*batch, n_latents)


def decode(
    values_bk: jax.Array, indices_bk: jax.Array, w_dec_ld: jax.Array
) -> jax.Array:
    """Rows [B, D], float32 or wider: the weighted sum of the chosen decoder rows."""
    code_bl = to_dense(values_bk, indices_bk, w_dec_ld.shape[0])
    return jnp.matmul(
        code_bl.astype(w_dec_ld.dtype),
        w_dec_ld,
        preferred_element_type=jnp.promote_types(w_dec_ld.dtype, jnp.float32),
    )
