"""AuxK on and off, where latents die: 16 latents per dimension, few of them chosen.

    sae-jax harvest --site=resid_post.3 --max_rows=1100000 --out=store/
    python experiments/auxk.py --store=store/ --out=auxk/

Eight runs, about 10 minutes on 2 free cores. Latents of the default subject's SAE that
fire on none of 219,904 held-out rows; mean of 2 seeds, ± half the range (jax 0.10.2):

| rate | AuxK | dead | nmse |
|---|---|---|---|
| 0.005 | off | 22.0 ± 0.1 % | 0.3464 ± 0.0018 |
| 0.005 | 1/32 | 19.2 ± 0.5 % | 0.3450 ± 0.0027 |
| 0.01 | off | 35.6 ± 1.3 % | 0.4017 ± 0.0010 |
| 0.01 | 1/32 | 60.7 ± 1.4 % | 0.4013 ± 0.0022 |

At 0.005 AuxK revives a few; at 0.01, against the paper, it kills. Loss and gradients
are those of a float64 oracle (`tests/`), so we take it to be the regime: Adam moves
what only AuxK trains by the full rate, whatever AuxK's weight, and here values are of
the size of 0.1. Dead latents that together overshoot the residual would be pushed down
until they are below zero on every row, where AuxK's ReLU, which is the paper's, leaves
them without a gradient. Without that ReLU (then three lines in `saes/auxk.py`, tried
once at 0.005, on 65,536 rows) 4 % were dead instead of 31 %, at an nmse of 0.371
instead of 0.348. The paper's rates are some fifty times lower and its runs longer; the
quickstart, at 0.003 with K = 32, ends without a dead latent.
"""

import itertools
from collections.abc import Callable

from runs import (
    Figures,
    Runs,
    measure_heldout,
    print_header,
    print_row,
    spread,
    start,
)

from sae_jax.config import DataConfig, OptimizerConfig, SaeConfig, TrainConfig

SEEDS = (0, 1)
RATES = (5e-3, 1e-2)


def get_config(
    learning_rate: float = 5e-3,
    aux_coefficient: float = 1 / 32,
    seed: int = 0,
    store: str = "store",
) -> TrainConfig:
    """One run: 4,096 latents, K = 8, 600 steps of 256 rows."""
    return TrainConfig(
        sae=SaeConfig(n_latents=4096, k=8, aux_coefficient=aux_coefficient),
        optimizer=OptimizerConfig(learning_rate=learning_rate, ema_decay=0.98),
        data=DataConfig(store=store, batch_rows=256),
        rows=153_600,
        dead_after_rows=15_360,
        seed=seed,
        log_every_steps=50,
        checkpoint_every_steps=1000,
        checkpoints_kept=1,
    )


def measure(store: str) -> Callable[..., Figures]:
    """nmse and the share of latents that fire on none of the held-out rows."""
    return measure_heldout(store, ("nmse", "dead_fraction"))


def print_table(runs: Runs) -> None:
    print_header(("rate", "AuxK", "dead", "nmse"))
    for rate, coefficient in itertools.product(RATES, (0.0, 1 / 32)):
        results = [runs.figures(rate, coefficient, seed) for seed in SEEDS]
        dead = spread((100 * result["dead_fraction"] for result in results), 1)
        nmse = spread((result["nmse"] for result in results), 4)
        print_row((rate, "1/32" if coefficient else "off", f"{dead} %", nmse))


if __name__ == "__main__":
    start("auxk", get_config, measure, print_table)
