"""How long each choice of K latents takes, and how many of the K largest it finds.

    python experiments/bench_topk.py

Encoder and choice together, of 1,024 normal rows and random latents, for every L and K.
`over_matmul` is in relation to the plain encoder, which writes [B, L], in the faster of
two layouts. "sort" is what there is without a plan: the same matmul, for some rows at a
time, and `lax.top_k` of all L; its choice is the one that recall is measured against.
`again` counts the rows that the exact method had to choose for twice.

`over_matmul` on 2 CPU cores, where `approx` is exact too (Python 3.11, jax 0.10.2,
width 768, medians of 3 rounds, about 8 minutes), and the recall of `bucketed`:

| latents | K | sort | exact | again | bucketed | recall | expected | approx |
|---|---|---|---|---|---|---|---|---|
| 16,384 | 32 | 1.23 | 1.17 | 0 | 0.97 | 99.24 % | 99.17 % | 1.20 |
| 16,384 | 64 | 1.26 | 1.15 | 0 | 0.98 | 99.70 % | 99.65 % | 1.26 |
| 16,384 | 128 | 1.40 | 1.46 | 4 | 1.13 | 99.62 % | 99.61 % | 1.50 |
| 65,536 | 32 | 1.17 | 1.09 | 0 | 1.02 | 99.22 % | 99.16 % | 1.71 |
| 65,536 | 64 | 1.19 | 1.30 | 1 | 1.04 | 99.67 % | 99.64 % | 1.71 |
| 65,536 | 128 | 1.24 | 1.22 | 7 | 1.00 | 99.58 % | 99.59 % | 1.73 |
| 262,144 | 32 | 1.10 | 1.03 | 0 | 0.94 | 99.12 % | 99.16 % | 3.44 |
| 262,144 | 64 | 1.12 | 1.15 | 0 | 0.99 | 99.62 % | 99.64 % | 3.63 |
| 262,144 | 128 | 1.24 | 1.36 | 7 | 1.08 | 99.55 % | 99.59 % | 3.82 |

Of so few rows, `exact` gains over `sort` at K = 32 only.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from timing import Figures, Shape, make_rows, medians, plain_matmuls, start

from sae_jax import topk
from sae_jax.config.sae import SELECTIONS
from sae_jax.matmul import matmul
from sae_jax.optim import normalise_rows

LATENTS = (16_384, 65_536, 262_144)
KS = (32, 64, 128)
ROWS = 1024
SORTED_ROWS = 1024  # at once


def measure(shape: Shape, repeats: int) -> Iterator[Figures]:
    """One row for each way to choose."""
    x_bd = make_rows(shape)
    w_ld = _make_latents(shape)
    choices = {name: _plan(shape, name) for name in SELECTIONS}
    encoders = {"sort": jax.jit(_sort(shape.k))}
    encoders |= {name: jax.jit(_choose(choice)) for name, choice in choices.items()}

    def run(name: str) -> Callable[[], Any]:
        return lambda: encoders[name](x_bd, w_ld)

    matmuls = plain_matmuls(x_bd, w_ld)
    seconds = medians(matmuls | {name: run(name) for name in encoders}, repeats)
    plain = min(seconds[name] for name in matmuls)
    _, sorted_bk, _ = run("sort")()
    for name in encoders:
        _, columns_bk, n_again = run(name)()
        yield {
            "latents": shape.latents,
            "k": shape.k,
            "selection": name,
            "seconds": seconds[name],
            "over_matmul": seconds[name] / plain,
            "recall": float(_recall(columns_bk, sorted_bk)),
            "expected_recall": choices[name].recall if name in choices else 1.0,
            "again": int(n_again),
        }


def _make_latents(shape: Shape) -> jax.Array:
    w_ld = jax.random.normal(jax.random.key(0), (shape.latents, shape.d_model))
    return normalise_rows(w_ld).astype(shape.dtype)


def _plan(shape: Shape, method: str) -> topk.Choice:
    platform = jax.default_backend()
    return topk.plan(shape.k, shape.latents, method=method, platform=platform)


def _choose(choice: topk.Choice) -> Callable[..., Any]:
    def choose(x_bd: jax.Array, w_ld: jax.Array) -> Any:
        bias_l = jnp.zeros(w_ld.shape[0])
        return topk.encode(x_bd, w_ld, bias_l, choice, w_ld.dtype)

    return choose


def _sort(k: int) -> Callable[..., Any]:
    def choose(x_bd: jax.Array, w_ld: jax.Array) -> Any:
        values_bk, columns_bk = lax.map(
            lambda x_d: lax.top_k(matmul(x_d[None], w_ld.T, w_ld.dtype)[0], k),
            x_bd,
            batch_size=min(SORTED_ROWS, x_bd.shape[0]),
        )
        return values_bk, columns_bk, jnp.int32(0)

    return choose


@jax.jit
def _recall(found_bk: jax.Array, all_bk: jax.Array) -> jax.Array:
    return jnp.mean(jax.vmap(jnp.isin)(all_bk, found_bk))


if __name__ == "__main__":
    start(measure, rows=(ROWS,), latents=LATENTS, k=KS)
