"""The kernels for a TPU, in Pallas's Mosaic: one file for what shares a scheme.

They want the VMEM of a v5e, v5p or v6e. `decode` and `sampled_product` take float32
weights alone, `segment_outer` at most 86016 rows of g.
"""

from sae_jax.kernels.tpu.candidates import bucket_candidates
from sae_jax.kernels.tpu.rows import decode, sampled_product
from sae_jax.kernels.tpu.segments import segment_outer

__all__ = ["bucket_candidates", "decode", "sampled_product", "segment_outer"]
