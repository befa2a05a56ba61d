"""TopK against its rivals: error and shrinkage at equal L0, all tuned alike.

    sae-jax harvest --site=resid_post.3 --max_rows=1100000 --out=store/
    python experiments/frontier.py --store=store/ --out=frontier/

150 runs, each about 13 seconds on 2 free cores, half an hour in all; a stopped sweep
goes on. Default subject, 1,024 latents of width 256, 256,000 rows; for every point
the best of three learning rates, and three seeds. nmse and γ are of 65,536 held-out
rows, means over seeds, nmse ± half its range; "over TopK" is nmse over what TopK has
at the same L0, by straight lines in log-log between its points (jax 0.10.2, CPU):

| architecture | set to | rate | L0 | nmse | over TopK | γ | dead, % |
|---|---|---|---|---|---|---|---|
| topk | 8 | 0.003 | 8.0 | 0.3663 ± 0.0019 | 1 | 1.011 | 0.0 |
| topk | 16 | 0.003 | 16.0 | 0.2958 ± 0.0044 | 1 | 1.006 | 0.0 |
| topk | 32 | 0.003 | 32.0 | 0.2370 ± 0.0018 | 1 | 1.005 | 0.0 |
| topk | 64 | 0.009 | 64.0 | 0.1684 ± 0.0016 | 1 | 0.994 | 5.3 |
| topk | 128 | 0.009 | 128.0 | 0.0811 ± 0.0009 | 1 | 0.996 | 11.7 |
| batch_topk | 8 | 0.003 | 8.8 | 0.3533 ± 0.0046 | 0.992 | 1.010 | 0.0 |
| batch_topk | 16 | 0.003 | 17.8 | 0.2822 ± 0.0044 | 0.986 | 1.008 | 0.0 |
| batch_topk | 32 | 0.003 | 35.3 | 0.2216 ± 0.0032 | 0.981 | 1.007 | 0.0 |
| batch_topk | 64 | 0.009 | 70.4 | 0.1492 ± 0.0027 | 0.979 | 0.994 | 6.6 |
| batch_topk | 128 | 0.009 | 139.1 | 0.0622 ± 0.0020 | 0.837 | 0.996 | 18.1 |
| jumprelu | 0.001 | 0.003 | 90.8 | 0.1360 ± 0.0019 | 1.168 | 1.001 | 0.0 |
| jumprelu | 0.002 | 0.009 | 45.6 | 0.2060 ± 0.0009 | 1.035 | 0.999 | 32.3 |
| jumprelu | 0.004 | 0.003 | 20.6 | 0.2706 ± 0.0033 | 0.992 | 1.003 | 0.0 |
| jumprelu | 0.007 | 0.003 | 11.2 | 0.3193 ± 0.0045 | 0.967 | 1.004 | 0.2 |
| jumprelu | 0.012 | 0.001 | 8.6 | 0.3880 ± 0.0041 | 1.082 | 1.009 | 0.0 |
| gated | 0.09 | 0.003 | 97.4 | 0.1595 ± 0.0035 | 1.473 | 1.001 | 35.0 |
| gated | 0.12 | 0.003 | 63.4 | 0.2100 ± 0.0050 | 1.247 | 1.002 | 38.8 |
| gated | 0.2 | 0.003 | 23.5 | 0.3081 ± 0.0028 | 1.177 | 1.004 | 38.2 |
| gated | 0.27 | 0.003 | 12.8 | 0.3574 ± 0.0033 | 1.127 | 1.005 | 35.8 |
| gated | 0.35 | 0.003 | 7.9 | 0.4020 ± 0.0102 | 1.095 | 1.005 | 35.5 |
| prolu | 0.02 | 0.003 | 12.5 | 0.3931 ± 0.0065 | 1.229 | 0.975 | 7.9 |
| prolu | 0.04 | 0.003 | 13.1 | 0.3424 ± 0.0029 | 1.089 | 0.954 | 6.6 |
| prolu | 0.07 | 0.003 | 15.0 | 0.3256 ± 0.0045 | 1.080 | 0.920 | 5.2 |
| prolu | 0.13 | 0.003 | 14.1 | 0.3524 ± 0.0078 | 1.143 | 0.871 | 4.2 |
| prolu | 0.25 | 0.003 | 8.2 | 0.4449 ± 0.0108 | 1.222 | 0.806 | 10.4 |
| relu | 0.05 | 0.009 | 70.2 | 0.2005 ± 0.0023 | 1.312 | 0.923 | 0.0 |
| relu | 0.08 | 0.009 | 38.5 | 0.2571 ± 0.0027 | 1.188 | 0.899 | 0.0 |
| relu | 0.13 | 0.009 | 20.1 | 0.3223 ± 0.0031 | 1.172 | 0.864 | 0.2 |
| relu | 0.2 | 0.009 | 11.1 | 0.3936 ± 0.0050 | 1.190 | 0.823 | 0.4 |
| relu | 0.35 | 0.001 | 10.4 | 0.5087 ± 0.0048 | 1.505 | 0.708 | 0.1 |

As in the paper TopK is better than Gated and ProLU, and these than ReLU; ReLU's
values shrink (γ 0.71 to 0.92) and those of TopK, Gated and JumpReLU do not.
BatchTopK, which the paper does not have, is 1 to 2 % better than TopK up to L0 70,
and JumpReLU within 4 % of it at L0 of 11 to 46. Not as in the paper: ProLU, whose L0
follows the learning rate more than the penalty (at 0.001 it is 110 with a penalty of
0.07, at 0.003 it is 15), and whose values shrink too. Its threshold is a bias that
Adam moves by up to the rate each step, here against values of about 0.1; the paper's
runs are longer at a lower rate. More than a third of Gated's latents die at its best
rate; resampling, which the paper gives it, made a short run worse (tried once, with
Adam's b1 at 0: nmse 0.44 against 0.28 without). Codes of BatchTopK are about a tenth
longer on held-out rows, with averaged weights, than in training; why was not looked
into. The runs of the architectures with a penalty are from before the encoder's rescale
counted all latents: they started from codes cut at 512.
"""

from collections.abc import Callable, Iterator

import numpy as np
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

SEEDS = (0, 1, 2)
L0_RANGE = (8, 128)
HIGH_RATES, LOW_RATES = (1e-3, 3e-3, 9e-3), (3e-4, 1e-3, 3e-3)
# At 9e-3 most latents of these two die.
RATES = {"prolu": LOW_RATES, "gated": LOW_RATES}
# What makes an architecture sparse, and at which values it is tried; topk comes first.
SWEEPS: dict[str, tuple[str, tuple[float, ...]]] = {
    "topk": ("k", (8, 16, 32, 64, 128)),
    "batch_topk": ("k", (8, 16, 32, 64, 128)),
    "relu": ("sparsity_coefficient", (0.05, 0.08, 0.13, 0.2, 0.35)),
    "prolu": ("sparsity_coefficient", (0.02, 0.04, 0.07, 0.13, 0.25)),
    "gated": ("sparsity_coefficient", (0.09, 0.12, 0.2, 0.27, 0.35)),
    "jumprelu": ("sparsity_coefficient", (0.001, 0.002, 0.004, 0.007, 0.012)),
}
SETTINGS: dict[str, Figures] = {"jumprelu": {"bandwidth": 0.01}}


def get_config(
    architecture: str = "topk",
    value: float = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
    store: str = "store",
) -> TrainConfig:
    """One run: 1,024 latents, 1,000 steps of 256 rows."""
    name, _ = SWEEPS[architecture]
    is_penalised = name == "sparsity_coefficient"
    settings = SETTINGS.get(architecture, {}) | {name: value}
    return TrainConfig(
        sae=SaeConfig(
            architecture=architecture,
            n_latents=1024,
            rescale_encoder=True,
            **settings,
        ),
        optimizer=OptimizerConfig(
            learning_rate=learning_rate, decay_rows=51_200, ema_decay=0.98
        ),
        data=DataConfig(store=store, batch_rows=256),
        rows=256_000,
        dead_after_rows=25_600,
        sparsity_warmup_rows=25_600 if is_penalised else 0,
        seed=seed,
        log_every_steps=100,
        checkpoint_every_steps=1000,
        checkpoints_kept=1,
    )


def measure(store: str) -> Callable[..., Figures]:
    """The figures of an SAE on 65,536 held-out rows."""
    names = ("nmse", "l0", "l0_cut", "shrinkage", "dead_fraction")
    return measure_heldout(store, names, rows=65_536)


def sweep(runs: Runs) -> Iterator[tuple[str, float, float, list[Figures]]]:
    """(architecture, value, best learning rate, its runs by seed) of every point.

    The best rate has the least nmse for its L0: in relation to what the best TopK has
    at that L0, for a rate also moves the L0 of an architecture with a penalty. Rates
    that move it out of the range of TopK's are left aside.
    """
    frontier: list[Figures] = []
    for architecture, (_, values) in SWEEPS.items():
        rates = RATES.get(architecture, HIGH_RATES)
        for value in values:
            tried = [runs.figures(architecture, value, rate, 0) for rate in rates]
            usable = [result for result in tried if is_in_range(result)] or tried
            best = min(usable, key=lambda result: compare(result, frontier))
            rate = best["run"][2]
            yield (
                architecture,
                value,
                rate,
                [runs.figures(architecture, value, rate, seed) for seed in SEEDS],
            )
            if architecture == "topk":
                frontier.append(best)


def is_in_range(result: Figures) -> bool:
    least, most = L0_RANGE
    return least - 0.5 <= result["l0"] <= most + 0.5


def compare(result: Figures, frontier: list[Figures]) -> float:
    """The nmse of a result over that of TopK's frontier at the same L0.

    The frontier is taken to be straight between its points, and beyond the outer ones,
    in log nmse against log L0. While TopK itself is tuned, it is the nmse alone.
    """
    if result["run"][0] == "topk":
        return result["nmse"]
    log_l0 = np.log([point["l0"] for point in frontier])
    log_nmse = np.log([point["nmse"] for point in frontier])
    at = np.log(result["l0"])
    first = int(np.clip(np.searchsorted(log_l0, at) - 1, 0, len(log_l0) - 2))
    slope = np.diff(log_nmse)[first] / np.diff(log_l0)[first]
    expected = log_nmse[first] + slope * (at - log_l0[first])
    return result["nmse"] / float(np.exp(expected))


def print_table(runs: Runs) -> None:
    """Means over seeds, ± half their range."""
    header = ("architecture", "set to", "rate", "L0", "nmse", "over TopK", "γ", "dead")
    print_header(header)
    frontier: list[Figures] = []
    for architecture, value, rate, results in sweep(runs):
        if architecture == "topk":
            means = {n: np.mean([r[n] for r in results]) for n in ("l0", "nmse")}
            frontier.append({"run": results[0]["run"], **means})
        ratios = [compare(result, frontier) for result in results]
        cells = [architecture, f"{value:g}", f"{rate:g}"]
        cells += [spread([r["l0"] for r in results], 1)]
        cells += [spread([r["nmse"] for r in results], 4)]
        cells += ["1" if architecture == "topk" else spread(ratios, 3)]
        cells += [spread([r["shrinkage"] for r in results], 3)]
        cells += [spread([100 * r["dead_fraction"] for r in results], 1) + " %"]
        print_row(cells)


if __name__ == "__main__":
    start("frontier", get_config, measure, print_table)
