"""Whether a dictionary has the directions that one expects, and finds them again.

For each expected direction u, over all latents,

    decoder_cosine = mean over u of the largest cosine of u with a decoder row
    decoder_recall = share of u for which it is at least 0.9

`encoder_` is the same with encoder rows, `random_` with as many random directions as
there are latents: what a dictionary of that size has by chance. Figures begin with
`given_` where u are the rows of the file `directions`. Without one they are the
tasks' own, beginning with `task_`: the mean of the train rows labelled true less that
of the others. Directions are in activation space; where the SAE takes each row's mean
off, theirs is taken off too.

With another SAE, such as one of another seed, given by `against`: of at most 4,096
latents, drawn by the seed, with decoder rows d, and all decoder rows of the other,

    nearest_cosine = mean over d of the largest cosine with a row of the other
    matched_cosine = mean cosine of d with its partner (`sae_jax.matching`)
    stable_share   = share of d whose cosine with its partner is at least 0.7
    stable_share_90  the same for 0.9

and with the ending `_random` the same against as many random directions as the other
has latents. Of very large dictionaries there is only the nearest cosine, see
`sae_jax.matching`. Latents that never fire count like all others.

Sources: Gao et al. 2024 (arXiv:2406.04093), section 4.2, for asking after features that
one expects; Sharkey et al. 2022 for the largest cosine; Paulo and Belrose 2025
(arXiv:2501.16615) for pairs over seeds, and their 0.7.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from sae_jax import matching, run
from sae_jax.directions import Directions, RandomDirections, Rows
from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import Context, Sae
from sae_jax.evals.figures import Figure, average_figure, make_curve, make_table
from sae_jax.evals.task_rows import TaskRows, measure_task_rows
from sae_jax.matching import Cosines, Match
from sae_jax.mesh import LATENT
from sae_jax.progress import Progress

_RECALLED = 0.9
_STABLE, _VERY_STABLE = 0.7, 0.9
_MOST_LISTED = 100  # directions in the table
_CENTRING = ("center_unit_norm", "layer_norm")  # normalisations that take off means

_SOURCES = {"given": "the directions given", "task": "the tasks' mean differences"}
_DICTIONARIES = {
    "decoder": "decoder rows",
    "encoder": "encoder rows",
    "random": "as many random directions",
}
_ENDINGS = {"": "the other SAE", "_random": "as many random directions"}

READS = ("tasks", "task_rows", "directions", "against")
MEANINGS = {
    f"{source}_{rows}_{what}": f"{meaning} of {expected} with {described}"
    for source, expected in _SOURCES.items()
    for rows, described in _DICTIONARIES.items()
    for what, meaning in (
        ("cosine", "mean largest cosine"),
        ("recall", f"share, by a cosine of at least {_RECALLED},"),
    )
} | {
    f"{name}{ending}": f"{meaning} {described}"
    for ending, described in _ENDINGS.items()
    for name, meaning in (
        ("nearest_cosine", "mean largest cosine of a decoder row with"),
        ("matched_cosine", "mean cosine of a decoder row with its partner in"),
        ("stable_share", f"latents with a partner of at least {_STABLE} in"),
        ("stable_share_90", f"latents with a partner of at least {_VERY_STABLE} in"),
    )
}


def compute(context: Context, config: EvaluateConfig) -> dict[str, Any]:
    """The figures above, curves of shares over cosines, and a table of directions."""
    other = open_other(context, config.against) if config.against else None
    if config.directions:
        source = "given"
        rows_nd = read_directions(config.directions, context.sae.d_model)
        names = [str(number) for number in range(len(rows_nd))]
    else:
        tasks = measure_task_rows(context, config)
        source, rows_nd = "task", np.stack([_subtract_means(task) for task in tasks])
        names = [task.name for task in tasks]
    n_steps = 5 if other else 3
    with Progress(n_steps, "searches", "recovery", is_shown=context.progress) as shown:
        results = _recover(context, source, names, rows_nd, shown)
        if other:
            results |= _match(context, other, shown)
    return results


def _recover(
    context: Context,
    source: str,
    names: Sequence[str],
    rows_nd: NDArray[np.floating],
    progress: Progress,
) -> dict[str, Any]:
    """Which of the directions the dictionary has."""
    if context.sae.config.normalization in _CENTRING:
        rows_nd = rows_nd - rows_nd.mean(axis=1, keepdims=True)
    weights, _ = context.sae.weights()
    key = jax.random.key(context.seed)
    dictionaries: dict[str, Directions] = {
        "decoder": Rows(weights["w_dec_ld"]),
        "encoder": Rows(weights["w_enc_ld"]),
        "random": RandomDirections(key, weights["w_dec_ld"].shape),
    }
    nearest = {}
    for done, (kind, directions) in enumerate(dictionaries.items(), start=1):
        nearest[kind] = matching.find_nearest(rows_nd, directions, context.mesh)
        progress.update(done)
    cosines_n = {kind: cosine_n for kind, (cosine_n, _) in nearest.items()}
    results: dict[str, Any] = {}
    for kind, cosine_n in cosines_n.items():
        results[f"{source}_{kind}_cosine"] = average_figure(cosine_n, "directions")
        is_recalled_n = cosine_n >= _RECALLED
        results[f"{source}_{kind}_recall"] = average_figure(is_recalled_n, "directions")
    return results | {
        "shares_of_directions": _make_curves(cosines_n, "directions"),
        "directions": _make_directions_table(names, nearest),
    }


def _match(context: Context, other: Sae, progress: Progress) -> dict[str, Any]:
    """How much of the dictionary another one has too."""
    w_dec_ld, others_ld = (s.weights()[0]["w_dec_ld"] for s in (context.sae, other))
    # Not the key of `_recover`: the same random directions would be drawn twice.
    key = jax.random.fold_in(jax.random.key(context.seed), 1)
    dictionaries: dict[str, Directions] = {
        "": Rows(others_ld),
        "_random": RandomDirections(key, others_ld.shape),
    }
    results: dict[str, Any] = {}
    cosines_n = {}
    for done, (ending, directions) in enumerate(dictionaries.items(), start=4):
        match = matching.match(w_dec_ld, directions, context.mesh, context.seed)
        for name, values_n in _list_values(match).items():
            results[f"{name}{ending}"] = average_figure(values_n, "latents")
        cosines_n[_ENDINGS[ending]] = match.nearest_n
        progress.update(done)
    return results | {"shares_of_latents": _make_curves(cosines_n, "latents")}


def _list_values(match: Match) -> dict[str, NDArray[Any]]:
    """What is averaged over latents, by the names of the figures."""
    values_n = {"nearest_cosine": match.nearest_n}
    if match.assigned_n is None:
        return values_n
    return values_n | {
        "matched_cosine": match.assigned_n,
        "stable_share": match.assigned_n >= _STABLE,
        "stable_share_90": match.assigned_n >= _VERY_STABLE,
    }


def open_other(context: Context, path: str) -> Sae:
    """The SAE of another run, which must be of the same site and width."""
    workdir, _ = run.locate(path)
    n_latents = run.read_config(workdir).sae.n_latents
    n_shards = context.mesh.shape[LATENT]
    if n_latents % n_shards:
        raise ValueError(
            f"against = {path}: its {n_latents} latents do not divide among the "
            f"{n_shards} latent shards of this mesh: evaluate on a smaller one"
        )
    other, sae = run.load(path, context.mesh), context.sae
    if (other.site, other.d_model) != (sae.site, sae.d_model):
        raise ValueError(
            f"against = {path}: an SAE of width {other.d_model} at {other.site} cannot "
            f"be matched with this one, of width {sae.d_model} at {sae.site}: give one "
            "of the same site"
        )
    return other


def read_directions(path: str, d_model: int) -> NDArray[np.float64]:
    """The directions [N, D] of a .npy file."""
    try:
        with open(path, "rb") as stream:
            rows_nd = np.lib.format.read_array(stream, allow_pickle=False)
    except ValueError as error:
        raise ValueError(
            f"directions = {path} cannot be read as a .npy file of numbers: write it "
            "with numpy.save, from an array of floats"
        ) from error
    if rows_nd.dtype.kind not in "fiu":
        raise ValueError(
            f"directions = {path} holds values of type {rows_nd.dtype}: must be numbers"
        )
    if rows_nd.ndim != 2 or not len(rows_nd) or rows_nd.shape[1] != d_model:
        raise ValueError(
            f"directions = {path} has shape {rows_nd.shape}: must be [N, {d_model}], a "
            f"row of the SAE's width {d_model} for each of at least one direction"
        )
    rows_nd = rows_nd.astype(np.float64)
    is_good_n = np.isfinite(rows_nd).all(axis=1) & rows_nd.any(axis=1)
    if not is_good_n.all():
        raise ValueError(
            f"directions = {path}: row {np.argmin(is_good_n)} of {len(rows_nd)} is 0 "
            "or not finite, and so points nowhere: leave it out"
        )
    return rows_nd


def _subtract_means(task: TaskRows) -> NDArray[np.float64]:
    """The mean train row with the label less the mean without."""
    rows_nd = task.acts_nd[~task.heldout_n].astype(np.float64)
    labels_n = task.labels_n[~task.heldout_n]
    return rows_nd[labels_n].mean(axis=0) - rows_nd[~labels_n].mean(axis=0)


def _make_curves(cosines_n: Mapping[str, Cosines], of: str) -> Figure:
    """The share of each that reaches a cosine, over the cosine."""
    x = np.linspace(0, 1, 101)
    shares = {
        name: (values_n[:, None] >= x).mean(axis=0)
        for name, values_n in cosines_n.items()
    }
    return make_curve(x, shares, "largest cosine, at least", f"share of {of}")


def _make_directions_table(
    names: Sequence[str], nearest: Mapping[str, tuple[Cosines, NDArray[np.int64]]]
) -> Figure:
    """The first directions, and the latents nearest to them."""
    columns, cells = ["direction"], [list(names)]
    for kind in ("decoder", "encoder"):
        columns += [f"{kind} latent", f"{kind} cosine"]
        cosine_n, latents_n = nearest[kind]
        cells += [latents_n.tolist(), cosine_n.tolist()]
    columns.append("random cosine")
    cells.append(nearest["random"][0].tolist())
    return make_table(columns, list(zip(*cells))[:_MOST_LISTED])
