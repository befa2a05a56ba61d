"""How sparse the effects of single latents on the logits are.

At a place, a position of a held-out context, every active latent of the code is taken
out of the row on its own; the SAE's error stays in:

    x' = x - (decode(code) - decode(code without the latent))

Δ is what that changes in the logits of `ablation_horizon` tokens, the ablated one and
those after it, less each token's median over the vocabulary, and

    sparsity = (|Δ|_1 / |Δ|_2)^2 / (T V)     (`sae_jax.evals.effects`)

the lower, the fewer logits a latent moves; normal noise has 2/π. Where few layers are
left, what happens is at the ablated token alone, and everything is about as sparse as
1/T: own_sparsity, of that token's V logits, tells the kinds apart there too.

Two baselines take something else out of the same rows, as often as latents were:

    channels   a channel of the row, drawn at random, is set to its mean training value
    random     x' = x - u u·(x - mean training row),  u a random unit vector

Figures are means over ablations, intervals are over contexts. Contexts are cut to the
64 tokens before the place, and rows are those of the cut context. At most one place is
drawn from a context while there are contexts left. An ablation that changes no logit is
left out and counted. In a subject of bfloat16 the rounding of x' makes effects denser.

Source: Gao et al. 2024 (arXiv:2406.04093), section 4.5; it has 10 to 14 % for latents
and 60 % for channels. What its baselines set a channel to is not known to us.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import Context
from sae_jax.evals.effects import measure_effects
from sae_jax.evals.figures import (
    Array,
    Figure,
    make_curve,
    make_figure,
    make_histogram,
    make_table,
    ratio_figure,
)
from sae_jax.evals.places import Place, make_rng, over_devices, read_places
from sae_jax.mesh import replicated
from sae_jax.progress import Progress

READS = ("ablated_tokens", "ablation_horizon")
MEANINGS = {
    "ablation_sparsity": "share of logits that ablating one latent moves, in effect",
    "ablation_sparsity_channels": "the same for channels set to their training mean",
    "ablation_sparsity_random": "the same for random directions; 0.64 is normal noise",
    "own_sparsity": "ablation_sparsity of the ablated token's own logits",
    "own_sparsity_channels": "the same for channels",
    "own_sparsity_random": "the same for random directions",
    "ablation_norm": "mean norm of what ablating one latent changes in the logits",
    "ablation_norm_channels": "the same for channels",
    "ablation_norm_random": "the same for random directions",
    "ablation_kl": "mean KL(clean || ablated) of the predictions, one latent ablated",
    "ablation_kl_channels": "the same for channels",
    "ablation_kl_random": "the same for random directions",
    "ablation_no_effect": "ablations, of all three kinds, that change no logit",
}

_KINDS = {"latents": "", "channels": "_channels", "random": "_random"}
_LOGIT_BYTES = 2**28  # on one device, in one tile of ablations
_CALL_COST = 4  # of a call, in copies of the context: the layers below the site
_EDGES = np.linspace(0, 1, 51)
_LATENTS_SHOWN = 12


@dataclasses.dataclass(frozen=True, eq=False)
class _Effects:
    """One entry an ablation; `latent` is -1 where none was ablated."""

    kind: NDArray[np.str_]
    sequence: NDArray[np.int64]
    token: NDArray[np.int64]
    latent: NDArray[np.int64]
    sparsity: Array
    own_sparsity: Array
    norm: Array
    kl: Array
    raised: NDArray[np.int64]  # [N, 3] tokens
    lowered: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.kind)

    def where(self, is_chosen: NDArray[np.bool_]) -> "_Effects":
        fields = dataclasses.fields(self)
        return _Effects(*(getattr(self, field.name)[is_chosen] for field in fields))


def compute(context: Context, config: EvaluateConfig) -> dict[str, Any]:
    """The figures above at `config.ablated_tokens` places, or all that there are."""
    places = list(read_places(context, config))
    if not any(len(place.latents_k) for place in places):
        return {"ablation_no_effect": make_figure(0, None, 0, "ablations")}
    tried = _ablate(context, config, places)
    effects = tried.where(tried.norm > 0)
    by_kind = {kind: effects.where(effects.kind == kind) for kind in _KINDS}
    by_kind = {kind: found for kind, found in by_kind.items() if len(found)}
    n_without = len(tried) - len(effects)
    return {
        **_average("ablation_sparsity", "sparsity", by_kind),
        **_average("own_sparsity", "own_sparsity", by_kind),
        **_average("ablation_norm", "norm", by_kind),
        **_average("ablation_kl", "kl", by_kind),
        "ablation_no_effect": make_figure(n_without, None, len(tried), "ablations"),
        **_show(context, by_kind),
    }


def _average(
    name: str, measure: str, by_kind: dict[str, _Effects]
) -> dict[str, Figure]:
    figures = {}
    for kind, effects in by_kind.items():
        _, context_n = np.unique(effects.sequence, return_inverse=True)
        of_measure = getattr(effects, measure).astype(np.float64)
        total_s, count_s = (
            np.bincount(context_n, weights_n).astype(np.float64)
            for weights_n in (of_measure, np.ones_like(of_measure))
        )
        figures[name + _KINDS[kind]] = ratio_figure(
            total_s, count_s, len(effects), "ablations"
        )
    return figures


def _show(context: Context, by_kind: dict[str, _Effects]) -> dict[str, Any]:
    """Distributions of sparsity; latents, from the sparsest on, with what they do."""
    shares = {
        kind: np.mean(effects.sparsity[:, None] <= _EDGES, axis=0)
        for kind, effects in by_kind.items()
    }
    shown = {
        "ablation_distribution": make_curve(
            _EDGES, shares, "sparsity, at most", "share of ablations"
        )
    }
    if "latents" not in by_kind:
        return shown
    effects = by_kind["latents"]
    latents, index_n = np.unique(effects.latent, return_inverse=True)
    mean_l = np.bincount(index_n, effects.sparsity) / np.bincount(index_n)
    counts, _ = np.histogram(mean_l, _EDGES)
    ranks = np.linspace(0, len(latents) - 1, min(len(latents), _LATENTS_SHOWN))
    own_l = np.bincount(index_n, effects.own_sparsity) / np.bincount(index_n)
    order = np.argsort(own_l, kind="stable")[ranks.round().astype(int)]
    columns = ["latent", "places", "own", "sparsity", "norm", "at", "raises", "lowers"]
    rows = [_describe(context, effects.where(index_n == index)) for index in order]
    return shown | {
        "ablation_by_latent": make_histogram(
            _EDGES, counts, "mean sparsity of a latent", "latents"
        ),
        "ablated_latents": make_table(columns, rows),
    }


def _describe(context: Context, effects: _Effects) -> list[str | int | float]:
    """One latent: its means, and the tokens of the place where it did most."""
    most = int(np.argmax(effects.norm))

    def name(tokens: NDArray[np.int64]) -> str:
        return " ".join(map(repr, context.subject.decode_tokens(tokens.tolist())))

    return [
        int(effects.latent[most]),
        len(effects),
        float(effects.own_sparsity.mean()),
        float(effects.sparsity.mean()),
        float(effects.norm.mean()),
        name(effects.token[most : most + 1]),
        name(effects.raised[most]),
        name(effects.lowered[most]),
    ]


def _ablate(
    context: Context, config: EvaluateConfig, places: list[Place]
) -> _Effects:
    """All ablations at all places: a context a call, in tiles of one shape."""
    n_tile = _choose_tile(context, places)
    measure = jax.jit(
        measure_effects,
        static_argnames=("site", "horizon"),
        out_shardings=replicated(context.mesh),
    )
    tiles = []
    with Progress(
        len(places), "places", "ablation", is_shown=context.progress
    ) as progress:
        for n_done, place in enumerate(places, start=1):
            kind_n, latent_n, removed_nd = _list_ablations(context, place)
            for first in range(0, len(removed_nd), n_tile - 1):
                chosen = slice(first, first + n_tile - 1)
                n_real = len(kind_n[chosen])
                tile_nd = np.zeros((n_tile, context.sae.d_model), np.float32)
                tile_nd[1 : 1 + n_real] = removed_nd[chosen]
                measures = measure(
                    context.subject,
                    jax.device_put(place.tokens_w, replicated(context.mesh)),
                    place.inside,
                    jax.device_put(tile_nd, over_devices(context)),
                    site=context.site,
                    horizon=config.ablation_horizon,
                )
                tile = jax.device_get(measures)
                tile = {name: array[1 : 1 + n_real] for name, array in tile.items()}
                tile["kind"], tile["latent"] = kind_n[chosen], latent_n[chosen]
                tile["sequence"] = np.full(n_real, place.sequence)
                tile["token"] = np.full(n_real, place.tokens_w[place.inside])
                tiles.append(tile)
            progress.update(n_done)
    return _Effects(
        **{name: np.concatenate([tile[name] for tile in tiles]) for name in tiles[0]}
    )


def _list_ablations(
    context: Context, place: Place
) -> tuple[NDArray[np.str_], NDArray[np.int64], Array]:
    """The kind, latent and what is removed of each ablation, [N], [N], [N, D]."""
    rng = make_rng(context, place.sequence, place.position)
    n, d_model = place.parts_kd.shape
    mean_d = context.store.statistics(context.site).mean_d
    from_mean_d = place.row_d - mean_d
    channels = rng.permutation(d_model)[:n]
    in_channels_nd = np.zeros((len(channels), d_model))
    in_channels_nd[np.arange(len(channels)), channels] = from_mean_d[channels]
    units_nd = rng.standard_normal((n, d_model))
    units_nd /= np.linalg.norm(units_nd, axis=1, keepdims=True)
    removed = {
        "latents": place.parts_kd,
        "channels": in_channels_nd,
        "random": units_nd * (units_nd @ from_mean_d)[:, None],
    }
    kind_n = np.repeat(list(_KINDS), [len(removed[kind]) for kind in _KINDS])
    latent_n = np.full(len(kind_n), -1)
    latent_n[:n] = place.latents_k
    return kind_n, latent_n, np.concatenate([removed[kind] for kind in _KINDS])


def _choose_tile(context: Context, places: list[Place]) -> int:
    """How many copies of a context go through the subject at a time, one of them clean.

    The number within memory that makes least work of all places.
    """
    tokens_1w = places[0].tokens_w[None]
    logits_1wv, _ = jax.eval_shape(lambda: context.subject.forward(tokens_1w))
    n_devices = context.mesh.size
    in_memory = max(2, _LOGIT_BYTES // (4 * logits_1wv.size)) * n_devices
    n_ablations_p = np.array([3 * len(place.latents_k) for place in places])
    most = min(in_memory, n_ablations_p.max() + n_devices)

    def work(n_tile: int) -> float:
        n_calls = np.sum(-(-n_ablations_p // (n_tile - 1)))
        return n_calls * (n_tile + _CALL_COST)

    return min(range(max(2, n_devices), most + 1, n_devices), key=work)
