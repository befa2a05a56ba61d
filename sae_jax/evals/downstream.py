"""What the reconstruction costs the language model that the rows came from.

Cross-entropy, in nats for each predicted token, with the site as it is (clean), and
with it replaced at every position by the reconstruction (sae), by the mean training
row (mean_ablated) and by zeros (zero_ablated):

    delta_ce            = ce_sae - ce_clean
    kl                  = mean of KL(clean || sae) of the predicted distributions
    recovered_from_mean = (ce_mean_ablated - ce_sae) / (ce_mean_ablated - ce_clean)
    recovered_from_zero = the same from ce_zero_ablated

Zero ablation breaks most models far more than the mean does, so recovered_from_zero
flatters. `by_position` has kl and delta_ce after each number of tokens read; beyond 64
of them in 32 groups, each a constant factor longer than the one before.
Source: Gao et al. 2024 (arXiv:2406.04093), section 4.1.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import (
    Context,
    Sae,
    choose_sequences,
    iterate_tokens,
)
from sae_jax.evals.figures import (
    Array,
    Figure,
    make_curve,
    mean_figure,
    ratio_figure,
)
from sae_jax.mesh import replicated
from sae_jax.subjects import Subject, next_token_loss

READS = ("sequences",)
MEANINGS = {
    "ce_clean": "cross-entropy of the subject, nats a token",
    "ce_sae": "with the reconstruction in place of the rows",
    "ce_mean_ablated": "with the mean row in their place",
    "ce_zero_ablated": "with zeros in their place",
    "delta_ce": "ce_sae less ce_clean",
    "kl": "from clean predictions to those on the reconstruction, nats",
    "recovered_from_mean": "share of the loss of mean ablation that the SAE recovers",
    "recovered_from_zero": "the same against zero ablation, which flatters",
}


_MOST_POSITIONS, _GROUPS = 64, 32


def compute(context: Context, config: EvaluateConfig) -> dict[str, Any]:
    """The figures above over `config.sequences` held-out contexts."""
    nats = measure_nats(context, config)

    def recovered_from(ablated: str) -> Figure:
        gap_st = nats[ablated] - nats["clean"]
        gain_st = nats[ablated] - nats["sae"]
        return ratio_figure(
            gain_st.sum(axis=1), gap_st.sum(axis=1), gain_st.size, "tokens"
        )

    return {
        "ce_clean": mean_figure(nats["clean"], "tokens"),
        "ce_sae": mean_figure(nats["sae"], "tokens"),
        "ce_mean_ablated": mean_figure(nats["mean_ablated"], "tokens"),
        "ce_zero_ablated": mean_figure(nats["zero_ablated"], "tokens"),
        "delta_ce": mean_figure(nats["sae"] - nats["clean"], "tokens"),
        "kl": mean_figure(nats["kl"], "tokens"),
        "recovered_from_mean": recovered_from("mean_ablated"),
        "recovered_from_zero": recovered_from("zero_ablated"),
        "by_position": group_by_position(
            {"kl": nats["kl"], "delta_ce": nats["sae"] - nats["clean"]}
        ),
    }


def measure_nats(context: Context, config: EvaluateConfig) -> dict[str, Array]:
    """Nats by kind, each [contexts, positions - 1]: one entry a predicted token.

    `clean`, `sae`, `mean_ablated` and `zero_ablated` are cross-entropies, `kl` is as
    above. Done once for each context.
    """
    key = ("nats", config.sequences, config.batch_sequences)
    if key not in context.measured:
        context.measured[key] = _measure(context, config)
    return context.measured[key]


def group_by_position(values: dict[str, Array]) -> Figure:
    """Means of [contexts, positions] by tokens read; a group is at its mean."""
    n_positions = next(iter(values.values())).shape[1]
    edges = np.arange(n_positions + 1)
    if n_positions > _MOST_POSITIONS:
        # Of the edges of short groups some fall on the same position.
        edges = np.geomspace(1, n_positions + 1, _GROUPS + 1).round().astype(int) - 1
        edges = np.unique(edges)

    def average(values_t: Array) -> Array:
        return np.add.reduceat(values_t, edges[:-1]) / np.diff(edges)

    return make_curve(
        average(np.arange(1.0, n_positions + 1)),
        {name: average(values_st.mean(axis=0)) for name, values_st in values.items()},
        "tokens read",
        "nats for the next token",
        x_log=True,
    )


def _measure(context: Context, config: EvaluateConfig) -> dict[str, Array]:
    sequences = choose_sequences(context, config.sequences)
    mean_d = jnp.asarray(context.store.statistics(context.site).mean_d, jnp.float32)
    measure_batch = jax.jit(
        _measure_batch, static_argnames="site", out_shardings=replicated(context.mesh)
    )
    batches = []
    with contextlib.closing(
        iterate_tokens(context, sequences, config.batch_sequences, "splice")
    ) as contexts:
        for tokens_bt, n_real in contexts:
            nats = measure_batch(
                context.sae, context.subject, tokens_bt, mean_d, site=context.site
            )
            nats = jax.device_get(nats)
            batches.append({name: nats_bt[:n_real] for name, nats_bt in nats.items()})
    return {
        name: np.concatenate([batch[name] for batch in batches]).astype(np.float64)
        for name in batches[0]
    }


def _measure_batch(
    sae: Sae, subject: Subject, tokens_bt: jax.Array, mean_d: jax.Array, site: str
) -> dict[str, jax.Array]:
    # In one program, so that the compiler runs the layers below the site once.
    def predict(replacement: Any) -> jax.Array:
        replace = None if replacement is None else {site: replacement}
        logits_btv, _ = subject.forward(tokens_bt, replace=replace)
        assert logits_btv is not None
        return logits_btv

    clean_btv = predict(None)
    sae_btv = predict(Partial(reconstruct, sae))
    log_clean_btv = jax.nn.log_softmax(clean_btv[:, :-1].astype(jnp.float32))
    log_sae_btv = jax.nn.log_softmax(sae_btv[:, :-1].astype(jnp.float32))
    difference_btv = log_clean_btv - log_sae_btv
    return {
        "clean": next_token_loss(clean_btv, tokens_bt),
        "sae": next_token_loss(sae_btv, tokens_bt),
        "mean_ablated": next_token_loss(predict(Partial(ablate, mean_d)), tokens_bt),
        "zero_ablated": next_token_loss(
            predict(Partial(ablate, jnp.zeros_like(mean_d))), tokens_bt
        ),
        "kl": jnp.sum(jnp.exp(log_clean_btv) * difference_btv, axis=-1),
    }


def reconstruct(sae: Sae, acts_btd: jax.Array, tokens_bt: jax.Array) -> jax.Array:
    """What the SAE makes of the rows, to replace them with."""
    return sae.decode(sae.encode(acts_btd.astype(jnp.float32)))


def ablate(value_d: jax.Array, acts_btd: jax.Array, tokens_bt: jax.Array) -> jax.Array:
    """The same row everywhere, to replace the rows with."""
    return jnp.broadcast_to(value_d, acts_btd.shape)
