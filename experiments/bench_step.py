"""How much longer a training step takes than the encoder's matmul, and what for.

    python experiments/bench_step.py

The default shape is the platform's: on a CPU float32, 8,192 rows of width 768, 32,768
latents, K = 32; on a GPU bfloat16, 65,536 rows of width 4,096, 131,072 latents, K = 64.
Every variant projects gradients, runs Adam, keeps decoder rows at unit norm and the
average of the weights, and is of one batch of normal rows. With AuxK, of k_aux = D / 2,
a tenth of the latents, spread at random, are dead in every step.

The plain matmul writes its [B, L], in the dtype of its factors. `over_matmul` is in
relation to the faster of its two layouts. A step less the gradient alone is the
optimizer; the gradient less the choice alone is decoding, AuxK and their gradients.

On 2 CPU cores (Python 3.11, jax 0.10.2; medians of 5 rounds, about 6 minutes):

| variant | seconds | over matmul | select | decode, gradients | optimizer |
|---|---|---|---|---|---|
| x @ w_ld.T | 2.71 | 1.000 |  |  |  |
| x @ w_dl | 2.74 | 1.010 |  |  |  |
| exact | 3.15 | 1.163 | 2.59 | 0.41 | 0.15 |
| bucketed | 2.85 | 1.050 | 2.36 | 0.43 | 0.06 |
| bucketed, AuxK | 4.16 | 1.535 | 2.47 | 1.77 | -0.08 |
| bucketed, Multi-TopK | 4.49 | 1.655 | 2.42 | 2.19 | -0.13 |

The gradient alone returns its matrices, which a step uses where they are; so a part
may be more than its share, and the optimizer then less than nothing. Not measured on a
GPU yet: there the same command takes the GPU's shape.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import Figures, Shape, make_rows, make_setup, medians, plain_matmuls, start

from sae_jax import state as states
from sae_jax import topk
from sae_jax.config import most_chosen
from sae_jax.firing import Counters
from sae_jax.gradients import differentiate
from sae_jax.saes.topk import plan_choice
from sae_jax.state import Setup, TrainState
from sae_jax.step import make_step

VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {"selection": "exact"},
    "bucketed": {"selection": "bucketed"},
    "bucketed, AuxK": {"selection": "bucketed", "aux_coefficient": 1 / 32},
    "bucketed, Multi-TopK": {"selection": "bucketed", "multi_topk": True},
}
PARTS = ("step", "gradient", "select")
DEAD = 10  # one latent in so many


def measure(shape: Shape, repeats: int) -> Iterator[Figures]:
    """One row for each layout of the plain matmul, then one for each variant."""
    runs = _Runs(shape)
    matmuls = plain_matmuls(runs.rows_bd, runs.state.params["w_enc_ld"])
    contenders = matmuls | {
        f"{part} {name}": run
        for name in VARIANTS
        for part, run in runs.contenders(name).items()
    }
    seconds = medians(contenders, repeats)
    matmul = min(seconds[name] for name in matmuls)
    for name in matmuls:
        yield _row(name, seconds[name], matmul)
    for name in VARIANTS:
        step, gradient, select = (seconds[f"{part} {name}"] for part in PARTS)
        yield _row(name, step, matmul, select, gradient - select, step - gradient)


class _Runs:
    """One state, which every step of every variant takes and hands on."""

    def __init__(self, shape: Shape):
        self._shape = shape
        setup = make_setup(shape)
        self.rows_bd = make_rows(shape)
        self.state: TrainState = states.create(setup, self.rows_bd)
        is_dead_l = np.random.default_rng(0).permutation(shape.latents) % DEAD == 0
        never = setup.config.dead_after_steps
        self._since_l = jnp.where(is_dead_l, never, 0).astype(jnp.int32)

    def contenders(self, name: str) -> dict[str, Callable[[], Any]]:
        """A whole step, its gradient, and its choice of latents."""
        k_aux = self._shape.d_model // 2
        setup = make_setup(self._shape, k_aux=k_aux, **VARIANTS[name])
        step = make_step(setup)
        gradient = jax.jit(_gradient(setup))
        select = jax.jit(_select(setup, self._shape.dtype))

        def run_step() -> TrainState:
            counters = self._counters(setup)
            self.state, _ = step(self.state._replace(counters=counters), self.rows_bd)
            return self.state

        def run_gradient() -> Any:
            return gradient(self.state.params, self._counters(setup), self.rows_bd)

        def run_select() -> Any:
            return select(self.state.params, self.rows_bd)

        return dict(zip(PARTS, (run_step, run_gradient, run_select)))

    def _counters(self, setup: Setup) -> Counters:
        has_auxk = setup.config.sae.aux_coefficient > 0
        # New each time: the step before it was given the last one's memory.
        return self.state.counters._replace(steps_since_l=self._since_l * has_auxk)


def _row(name: str, seconds: float, matmul: float, *parts: float) -> Figures:
    select, gradients, optimizer = parts or (None,) * 3
    return {
        "variant": name,
        "seconds": seconds,
        "over_matmul": seconds / matmul,
        "select": select,
        "decode_and_gradients": gradients,
        "optimizer": optimizer,
    }


def _gradient(setup: Setup) -> Callable[..., Any]:
    def gradient(params: Any, counters: Counters, rows_bd: jax.Array) -> Any:
        return differentiate(setup, params, (rows_bd, rows_bd), counters)

    return gradient


def _select(setup: Setup, dtype: str) -> Callable[..., Any]:
    config = setup.config.sae
    choice = plan_choice(config, setup.mesh, most_chosen(config))

    def select(params: Any, rows_bd: jax.Array) -> Any:
        bias_l = params["b_enc_l"]
        return topk.encode(rows_bd, params["w_enc_ld"], bias_l, choice, dtype)

    return select


if __name__ == "__main__":
    start(measure)
