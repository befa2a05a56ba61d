"""The hot path's kernels, one folder a platform, each beside plain JAX.

    bucket_candidates   encoder product and first stage of choosing K, without [B, L]
    decode              the weighted sum of each row's chosen rows of a matrix
    sampled_product     a row times its chosen rows of a matrix: the values' gradient
    segment_outer       sums over entries sorted by latent: the weights' gradient

`reference` says what each gives, in plain JAX; `tpu` (Mosaic) and `gpu` (Triton) are
Pallas. n_buckets is a multiple of 128 on a TPU and a power of two on a GPU. Nothing
here is differentiated by JAX: the third and fourth are the gradients of the second.
Nobody gets a kernel unasked: `find` is the one way in.

A kernel may be called inside `jax.shard_map`, on the arrays of one shard. `interpret`
runs it on any platform, slowly, for tests; JAX's interpreter wants check_vma=False.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from absl import logging


class Kernels(NamedTuple):
    """The kernels of one platform, with the arguments of those in `reference`."""

    bucket_candidates: Callable[..., tuple[jax.Array, jax.Array]]
    decode: Callable[..., jax.Array]
    sampled_product: Callable[..., jax.Array]
    segment_outer: Callable[..., jax.Array]


def find(platform: str) -> Kernels | None:
    """The kernels of a device's platform ("tpu", "gpu"), or None where there are none.

    None on any platform but the CPU is logged, once.
    """
    # Imported on demand: Pallas is slow to import, and most runs want one platform.
    if platform == "tpu":
        from sae_jax.kernels import tpu as own
    elif platform == "gpu":
        from sae_jax.kernels import gpu as own  # type: ignore[no-redef]
    else:
        if platform != "cpu":
            logging.log_first_n(
                logging.WARNING, "no kernels for platform %r: plain JAX", 1, platform
            )
        return None
    return Kernels(*(getattr(own, name) for name in Kernels._fields))
