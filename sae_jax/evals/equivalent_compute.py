"""The reconstruction's loss as the training compute of a smaller model.

Of a family of models, given as a table of (compute, loss), the law

    loss(C) = E + A C^-b,    E, A >= 0, b > 0

is fitted by least squares of the relative errors fit/loss - 1, and inverted:

    C(loss)                  = (A / (loss - E))^(1/b)
    equivalent_compute       = C(ce_sae)
    equivalent_compute_share = C(ce_sae) / C(ce_clean)

in the table's unit of compute, and log10_ of both, which have the intervals: those of
the losses over contexts, carried to first order, in the share of both losses together;
they leave out the fit's own error. The table's losses must be of the text that ce_sae
is of, in nats a token of the subject's tokenizer. Where the law says nothing, a bound
stands in its place:

    ce_sae above all losses    equivalent_compute_at_most, that of the smallest model,
                               and equivalent_share_at_most, of it
    ce_sae at or below E       equivalent_compute_at_least, that of the largest model

family_extrapolation is how many times beyond the largest model the law was read, for
ce_clean or ce_sae; 1 is not at all.

Source: Gao et al. 2024 (arXiv:2406.04093), section 4.1; there the SAE of 16 million
latents of GPT-4 has a share of 10 %.
"""

import math
from typing import Any

import numpy as np

from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import Context
from sae_jax.evals.downstream import Nats, measure_nats
from sae_jax.evals.family import ComputeLaw, Family, fit_law, read_family
from sae_jax.evals.figures import (
    Array,
    Figure,
    make_figure,
    make_points,
    make_table,
)

READS = ("sequences", "family")
MEANINGS = {
    "equivalent_compute": "that trains a model of the family to ce_sae",
    "equivalent_compute_share": "the same over the compute that trains one to ce_clean",
    "log10_equivalent_compute": "the decimal logarithm of the first",
    "log10_equivalent_compute_share": "the decimal logarithm of the second",
    "equivalent_compute_at_most": "the smallest model's, which is better than ce_sae",
    "equivalent_share_at_most": "the same over the compute that trains to ce_clean",
    "equivalent_compute_at_least": "the largest model's: ce_sae is below the floor",
    "family_points": "models of the family",
    "family_fit_error": "largest relative error of the losses that the law gives them",
    "family_floor": "E of the law E + A C^-b of the family's loss by compute C",
    "family_exponent": "b of the law",
    "family_extrapolation": "compute that the law was read at over the largest model's",
}

_GRID = 40  # points at which the law is drawn


def compute(context: Context, config: EvaluateConfig) -> dict[str, Any]:
    """The figures above; none where no family is given."""
    if not config.family:
        return {}
    family = read_family(config.family)
    law = fit_law(family.computes_n, family.losses_n)
    nats = measure_nats(context, config)
    error_n = law.loss_of(family.computes_n) / family.losses_n - 1

    def of_family(value: float) -> Figure:
        return make_figure(value, None, len(error_n), "models")

    return {
        **_place(law, family, nats),
        "family_points": of_family(len(error_n)),
        "family_fit_error": of_family(float(np.abs(error_n).max())),
        "family_floor": of_family(law.floor),
        "family_exponent": of_family(law.exponent),
        **_show(law, family, nats.mean("sae"), nats.mean("clean")),
    }


def _place(law: ComputeLaw, family: Family, nats: Nats) -> dict[str, Figure]:
    """Where the losses lie by the law, or the bounds where it does not say."""
    smallest, largest = float(family.computes_n[0]), float(family.computes_n[-1])
    ce_sae, ce_clean = nats.mean("sae"), nats.mean("clean")
    at_sae, at_clean = law.compute_of(ce_sae), law.compute_of(ce_clean)
    figures = {}

    def bound(name: str, value: float) -> None:
        figures[name] = make_figure(value, None, nats.n_tokens, "tokens")

    def carry(name: str, value: float, change_st: Array) -> None:
        bound(name, value)
        ci95 = nats.average(change_st)["ci95"]
        ci95 = ci95 and ci95 / law.exponent / math.log(10)
        log10 = math.log10(value)
        figures[f"log10_{name}"] = make_figure(log10, ci95, nats.n_tokens, "tokens")

    # d log C = -1/b d log(loss - E): what each token moves log C by, but for -1/b.
    change_sae_st = nats["sae"] / (ce_sae - law.floor)
    if ce_sae > np.max(family.losses_n):
        bound("equivalent_compute_at_most", smallest)
        if math.isfinite(at_clean) and ce_clean < np.max(family.losses_n):
            bound("equivalent_share_at_most", smallest / at_clean)
    elif not math.isfinite(at_sae):
        bound("equivalent_compute_at_least", largest)
    else:
        carry("equivalent_compute", at_sae, change_sae_st)
        if math.isfinite(at_clean):
            change_clean_st = nats["clean"] / (ce_clean - law.floor)
            change_st = change_sae_st - change_clean_st
            carry("equivalent_compute_share", at_sae / at_clean, change_st)
    read_at = [at for at in (at_sae, at_clean) if math.isfinite(at)]
    bound("family_extrapolation", max([largest, *read_at]) / largest)
    return figures


def _show(
    law: ComputeLaw, family: Family, ce_sae: float, ce_clean: float
) -> dict[str, Any]:
    """The family, its law, and where by the law the SAE and the subject lie."""
    computes_n, losses_n = family.computes_n, family.losses_n
    grid = np.geomspace(computes_n[0], computes_n[-1], _GRID)
    points = {
        "models": list(zip(computes_n.tolist(), losses_n.tolist())),
        "law": list(zip(grid.tolist(), law.loss_of(grid).tolist())),
    }
    for name, loss in {"subject": ce_clean, "with the SAE": ce_sae}.items():
        at = law.compute_of(loss)
        points[name] = [(at, loss)] if math.isfinite(at) else []
    rows = zip(family.names, computes_n, losses_n, law.loss_of(computes_n))
    return {
        "loss_by_compute": make_points(
            points, "compute", "nats a token", x_log=True, y_log=True
        ),
        "family": make_table(
            ["model", "compute", "loss", "by the law"],
            [(name, *map(float, numbers)) for name, *numbers in rows],
        ),
    }
