"""The code of a row: its K latents, their values, and the row's normalisation."""

import dataclasses

import jax

from sae_jax import sparse


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseCode:
    """At most K active latents of each row.

    Attributes:
        values: [..., K], falling and never negative; 0 marks an unused slot.
        indices: [..., K] int32, the latents, distinct and in range in every slot.
        shift: [..., 1] and
        scale: [..., 1]: the row's normalisation, which `decode` undoes.
        n_cut: [..., 1] int32, active latents beyond the K strongest, which are not in
            the code. Always 0 for TopK; elsewhere raise `sae.max_active` if it is not.
    """

    values: jax.Array
    indices: jax.Array
    shift: jax.Array
    scale: jax.Array
    n_cut: jax.Array

    def to_dense(self, n_latents: int) -> jax.Array:
        """The same code as [..., L]."""
        return sparse.to_dense(self.values, self.indices, n_latents)
