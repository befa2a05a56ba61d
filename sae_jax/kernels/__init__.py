"""The hot path's kernels, one folder a platform, each beside plain JAX.

    bucket_candidates   encoder product and first stage of choosing K, without [B, L]
    decode              the weighted sum of each row's chosen rows of a matrix
    sampled_product     a row times its chosen rows of a matrix: the values' gradient
    segment_outer       sums over entries sorted by latent: the weights' gradient

`reference` says what each gives, in plain JAX; `tpu` (Mosaic) and `gpu` (Triton) are
Pallas. n_buckets is a multiple of 128 on a TPU and a power of two on a GPU. Nothing
here is differentiated by JAX: the third and fourth are the gradients of the second.

Nobody gets a kernel unasked: `find` is the one way in, and `sae.kernels` asks. Then
`topk.encoder` calls the first, `sparse` the others, and both go on in plain JAX where
the platform has no kernels or one of them refuses a shape, which is logged once.

A kernel may be called inside `jax.shard_map`, on the arrays of one shard. `interpret`
runs it on any platform, slowly, for tests; JAX's interpreter wants check_vma=False.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from absl import logging

from sae_jax.kernels.shapes import Refused


class Kernels(NamedTuple):
    """The kernels of one platform, with the arguments of those in `reference`.

    One that refuses its arguments gives None: its caller goes on in plain JAX.
    """

    bucket_candidates: Callable[..., tuple[jax.Array, jax.Array] | None]
    decode: Callable[..., jax.Array | None]
    sampled_product: Callable[..., jax.Array | None]
    segment_outer: Callable[..., jax.Array | None]


# Cached: functions that are traced with kernels are known again by them.
@functools.cache
def find(platform: str, interpret: bool = False) -> Kernels | None:
    """The kernels of a device's platform ("tpu", "gpu"), or None where there are none.

    None is logged, once.
    """
    # Imported on demand: Pallas is slow to import, and most runs want one platform.
    if platform == "tpu":
        from sae_jax.kernels import tpu as own
    elif platform == "gpu":
        from sae_jax.kernels import gpu as own  # type: ignore[no-redef]
    else:
        _tell_plain(f"platform {platform!r} has none, only 'tpu' and 'gpu' have")
        return None
    kernels = (
        functools.partial(_attempt, getattr(own, name), interpret=interpret)
        for name in Kernels._fields
    )
    return Kernels(*kernels)


def _attempt(kernel: Callable[..., Any], *args: Any, **options: Any) -> Any:
    try:
        return kernel(*args, **options)
    except Refused as why:
        _tell_plain(f"{kernel.__name__}: {why}")
        return None


@functools.cache
def _tell_plain(why: str) -> None:
    """Logs each reason once: an array of other rows is traced again and again."""
    logging.warning("sae.kernels: %s; plain JAX takes its place", why)
