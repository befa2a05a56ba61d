"""The kernels for a GPU, in Pallas's Triton: one file for what shares a scheme."""

from sae_jax.kernels.gpu.candidates import bucket_candidates
from sae_jax.kernels.gpu.rows import decode, sampled_product
from sae_jax.kernels.gpu.segments import segment_outer

__all__ = ["bucket_candidates", "decode", "sampled_product", "segment_outer"]
