"""What the reconstruction costs the language model that the rows came from.

Cross-entropy, in nats for each predicted token, with the site as it is (clean), and
with every row replaced by the reconstruction (sae), by the mean training row
(mean_ablated) and by zeros (zero_ablated):

    delta_ce            = ce_sae - ce_clean
    kl                  = mean of KL(clean || sae) of the predicted distributions
    recovered_from_mean = (ce_mean_ablated - ce_sae) / (ce_mean_ablated - ce_clean)
    recovered_from_zero = the same from ce_zero_ablated

Zero ablation breaks most models far more than the mean does, so recovered_from_zero
flatters. `by_position` has kl and delta_ce after each number of tokens read; beyond 64
of them in 32 groups, each a constant factor longer than the one before.

Nothing is predicted at padding, or from it. Tokens that the store excludes are read and
predicted like others, but there the site is left as it is: the SAE was not trained on
them (`sae_jax.evals.positions`).

Source: Gao et al. 2024 (arXiv:2406.04093), section 4.1.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from numpy.typing import NDArray

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
from sae_jax.evals.positions import (
    Positions,
    list_excluded,
    put_at_rows,
    read_positions,
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


@dataclass(frozen=True, eq=False)
class Nats:
    """Nats by kind, each [contexts, positions - 1]: one entry a predicted token, and 0
    where none is predicted.

    `clean`, `sae`, `mean_ablated` and `zero_ablated` are cross-entropies, `kl` is as
    above.
    """

    by_kind: Mapping[str, Array]
    is_predicted_st: NDArray[np.bool_]

    def __getitem__(self, kind: str) -> Array:
        return self.by_kind[kind]

    @property
    def n_tokens(self) -> int:
        return int(self.is_predicted_st.sum())

    def mean(self, kind: str) -> float:
        return float(self[kind].sum() / self.n_tokens)

    def average(self, nats_st: Array) -> Figure:
        """The mean of what is 0 where no token is predicted."""
        return mean_figure(nats_st, self.is_predicted_st, "tokens")


def compute(context: Context, config: EvaluateConfig) -> dict[str, Any]:
    """The figures above over `config.sequences` held-out contexts."""
    nats = measure_nats(context, config)

    def recovered_from(ablated: str) -> Figure:
        gap_st = nats[ablated] - nats["clean"]
        gain_st = nats[ablated] - nats["sae"]
        return ratio_figure(
            gain_st.sum(axis=1), gap_st.sum(axis=1), nats.n_tokens, "tokens"
        )

    return {
        "ce_clean": nats.average(nats["clean"]),
        "ce_sae": nats.average(nats["sae"]),
        "ce_mean_ablated": nats.average(nats["mean_ablated"]),
        "ce_zero_ablated": nats.average(nats["zero_ablated"]),
        "delta_ce": nats.average(nats["sae"] - nats["clean"]),
        "kl": nats.average(nats["kl"]),
        "recovered_from_mean": recovered_from("mean_ablated"),
        "recovered_from_zero": recovered_from("zero_ablated"),
        "by_position": group_by_position(
            {"kl": nats["kl"], "delta_ce": nats["sae"] - nats["clean"]},
            nats.is_predicted_st,
        ),
    }


def measure_nats(context: Context, config: EvaluateConfig) -> Nats:
    """The nats of `config.sequences` contexts; done once for each context."""
    key = ("nats", config.sequences, config.batch_sequences)
    if key not in context.measured:
        context.measured[key] = _measure(context, config)
    return context.measured[key]


def group_by_position(
    values: Mapping[str, Array], counts_st: NDArray[np.bool_]
) -> Figure:
    """Means of those [contexts, positions] that count, others being 0, by tokens read.

    A group is at its mean; a group of which nothing counts is left out.
    """
    n_positions = counts_st.shape[1]
    edges = np.arange(n_positions + 1)
    if n_positions > _MOST_POSITIONS:
        # Of the edges of short groups some fall on the same position.
        edges = np.geomspace(1, n_positions + 1, _GROUPS + 1).round().astype(int) - 1
        edges = np.unique(edges)

    share_t = counts_st.mean(axis=0)
    share_g = np.add.reduceat(share_t, edges[:-1])

    def average(values_t: Array) -> Array:
        sum_g = np.add.reduceat(values_t, edges[:-1])
        return sum_g[share_g > 0] / share_g[share_g > 0]

    return make_curve(
        average(np.arange(1.0, n_positions + 1) * share_t),
        {name: average(values_st.mean(axis=0)) for name, values_st in values.items()},
        "tokens read",
        "nats for the next token",
        x_log=True,
    )


def _measure(context: Context, config: EvaluateConfig) -> Nats:
    sequences = choose_sequences(context, config.sequences)
    mean_d = jnp.asarray(context.store.statistics(context.site).mean_d, jnp.float32)
    excluded_n = list_excluded(context.store)
    measure_batch = jax.jit(
        _measure_batch, static_argnames="site", out_shardings=replicated(context.mesh)
    )
    batches = []
    with contextlib.closing(
        iterate_tokens(context, sequences, config.batch_sequences, "splice")
    ) as contexts:
        for tokens_bt, n_real in contexts:
            nats = measure_batch(
                context.sae,
                context.subject,
                tokens_bt,
                mean_d,
                excluded_n,
                site=context.site,
            )
            nats = jax.device_get(nats)
            batches.append({name: nats_bt[:n_real] for name, nats_bt in nats.items()})
    by_kind = {
        name: np.concatenate([batch[name] for batch in batches]).astype(np.float64)
        for name in batches[0]
    }
    return keep_predicted(by_kind, read_positions(context.store, sequences))


def keep_predicted(by_kind: Mapping[str, Array], positions: Positions) -> Nats:
    """The nats of contexts whose positions these are, whatever is at padding."""
    is_predicted_st = positions.is_predicted_st
    kept = {k: np.where(is_predicted_st, v, 0) for k, v in by_kind.items()}
    return Nats(kept, is_predicted_st)


def _measure_batch(
    sae: Sae,
    subject: Subject,
    tokens_bt: jax.Array,
    mean_d: jax.Array,
    excluded_n: jax.Array,
    site: str,
) -> dict[str, jax.Array]:
    # In one program, so that the compiler runs the layers below the site once.
    def predict(replacement: Any) -> jax.Array:
        replace = {site: put_at_rows(replacement, excluded_n)} if replacement else None
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
