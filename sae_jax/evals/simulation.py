"""What the language model loses where explanations stand in for the SAE's latents.

Every latent is what its patterns predict (`sae_jax.evals.patterns`), scaled to be right
on average. With a its value and s the prediction, both over the contexts that it was
explained from, a row is rebuilt as

    x̂ = sum_l E[s_l a_l] / E[s_l^2] s_l d_l + b

in the SAE's space, and put at the site. Where the normalisation has a shift and a scale
of each row, undoing it takes them from the true row, as the SAE's own reconstruction
does (`tested_ce_simulated`); or it takes their means over the contexts explained from,
so that nothing is known of a row but its patterns (`tested_ce_patterns_alone`).

All figures are cross-entropies, in nats for each predicted token, over the same
contexts: up to `config.sequences` of those that explanations are tested on. Where the
store has no rows, as at excluded tokens, the site is left as it is. The n-gram models
(`sae_jax.evals.ngrams`) are of the store's train tokens.

Source: Gao et al. 2024 (arXiv:2406.04093), section 4.4.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import Partial
from numpy.typing import NDArray

from sae_jax.evals.config import EvaluateConfig
from sae_jax.evals.context import Context, Sae, iterate_rows, iterate_tokens
from sae_jax.evals.downstream import ablate, keep_predicted, reconstruct
from sae_jax.evals.figures import Array, Figure
from sae_jax.evals.firings import Firings
from sae_jax.evals.ngrams import predict_tokens
from sae_jax.evals.positions import (
    list_excluded,
    put_at_rows,
    read_positions,
    read_real_tokens,
)
from sae_jax.mesh import DATA, LATENT, replicated
from sae_jax.saes.code import SparseCode
from sae_jax.subjects import Subject, next_token_loss

MEANINGS = {
    "tested_ce_clean": "cross-entropy where explanations are tested, nats a token",
    "tested_ce_sae": "with the reconstruction in place of the rows",
    "tested_ce_simulated": "with the reconstruction from simulated latents",
    "tested_ce_patterns_alone": "the same with one shift and scale for all rows",
    "tested_ce_mean_ablated": "with the mean row in place of the rows",
    "tested_ce_unigram": "of a unigram model of the train tokens",
    "tested_ce_bigram": "of a bigram model of them",
    "tested_ce_trigram": "of a trigram model of them",
    "simulated_below_bigram": "tested_ce_bigram less tested_ce_simulated",
}

_NGRAMS = ("unigram", "bigram", "trigram")
_TRAIN_TOKENS = 2**24  # the most that n-gram models are made of

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Explained:
    """All living latents, explained on one half of the contexts for the other."""

    latents_n: Ints
    half: Ints  # the sequences explained from
    other: Ints
    known: Firings  # in `half`
    predicted: Firings  # the same, as explanations have it
    simulated: Firings  # what they predict in `other`, whether or not it is a row


def compute(
    context: Context, config: EvaluateConfig, explained: Explained
) -> dict[str, Figure]:
    """The figures above."""
    n_tested = len(explained.other)
    drawn = np.random.default_rng(context.seed).permutation(n_tested)
    tested = np.sort(drawn[: config.sequences])
    sequences = explained.other[tested]
    by_kind = _splice(context, config, explained, tested)
    by_kind |= _predict(context, sequences)
    nats = keep_predicted(by_kind, read_positions(context.store, sequences))
    figures = {
        f"tested_ce_{name}": nats.average(nats_st)
        for name, nats_st in nats.by_kind.items()
    }
    below_st = nats["bigram"] - nats["simulated"]
    return figures | {"simulated_below_bigram": nats.average(below_st)}


def _predict(context: Context, sequences: Ints) -> dict[str, Array]:
    """Nats [contexts, positions - 1] of each n-gram model."""
    store = context.store
    train = store.sequences("train")
    n_train = -(-_TRAIN_TOKENS // store.context_length)
    drawn = np.random.default_rng(context.seed).permutation(train)[:n_train]
    log_p = predict_tokens(
        read_real_tokens(store, np.sort(drawn)),
        read_real_tokens(store, sequences),
        context.subject.vocab_size,
        len(_NGRAMS),
    )
    return {name: -log_st for name, log_st in zip(_NGRAMS, log_p, strict=True)}


def _splice(
    context: Context, config: EvaluateConfig, explained: Explained, tested: Ints
) -> dict[str, Array]:
    """Nats [contexts, positions - 1] of the subject, by what is put at the site."""
    codes = _simulate(explained, tested, context.store.context_length)
    common = _average_normalization(context, explained.half, config.batch_rows)
    mean_d = jnp.asarray(context.store.statistics(context.site).mean_d, jnp.float32)
    excluded_n = list_excluded(context.store)
    measure_batch = jax.jit(
        _measure_batch, static_argnames="site", out_shardings=replicated(context.mesh)
    )
    sharding = NamedSharding(context.mesh, PartitionSpec((DATA, LATENT)))
    batches: list[dict[str, Any]] = []
    done = 0
    with contextlib.closing(
        iterate_tokens(
            context, explained.other[tested], config.batch_sequences, "explanations"
        )
    ) as contexts:
        for tokens_bt, n_real in contexts:
            missing = ((0, len(tokens_bt) - n_real), (0, 0), (0, 0))
            code = [
                jax.device_put(np.pad(slots[done : done + n_real], missing), sharding)
                for slots in codes
            ]
            nats = jax.device_get(
                measure_batch(
                    context.sae,
                    context.subject,
                    tokens_bt,
                    code,
                    common,
                    mean_d,
                    excluded_n,
                    site=context.site,
                )
            )
            batches.append({name: nats_bt[:n_real] for name, nats_bt in nats.items()})
            done += n_real
    return {
        name: np.concatenate([batch[name] for batch in batches]).astype(np.float64)
        for name in batches[0]
    }


def _simulate(
    explained: Explained, tested: Ints, n_positions: int
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Scaled values and latents [contexts, T, most that any row has] of the tested."""
    simulated = explained.simulated
    counts_n = simulated.counts_n
    latents_f = np.repeat(explained.latents_n, counts_n)
    values_f = simulated.values_f * np.repeat(_fit_scales(explained), counts_n)
    order_f = np.argsort(simulated.rows_f, kind="stable")
    rows_f = simulated.rows_f[order_f]
    n_rows = len(explained.other) * n_positions
    counts_r = np.bincount(rows_f, minlength=n_rows)
    first_r = np.cumsum(counts_r) - counts_r
    slots_f = np.arange(len(rows_f)) - np.repeat(first_r, counts_r)
    place_s = np.full(len(explained.other), -1)
    place_s[tested] = np.arange(len(tested))
    places_f, positions_f = place_s[rows_f // n_positions], rows_f % n_positions
    is_tested_f = places_f >= 0
    n_slots = max(1, int(np.max(counts_r)))
    shape = (len(tested), n_positions, n_slots)
    values, latents = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    at = tuple(index[is_tested_f] for index in (places_f, positions_f, slots_f))
    values[at] = values_f[order_f][is_tested_f]
    latents[at] = latents_f[order_f][is_tested_f]
    return values, latents


def _fit_scales(explained: Explained) -> Array:
    """E[s a] / E[s^2] of each latent; 0 where nothing was predicted."""
    scales = []
    for index in range(len(explained.latents_n)):
        rows_s, s = explained.predicted.of(index)
        rows_a, a = explained.known.of(index)
        _, of_s, of_a = np.intersect1d(
            rows_s, rows_a, assume_unique=True, return_indices=True
        )
        power = np.sum(np.square(s, dtype=np.float64))
        scales.append(np.sum(s[of_s] * a[of_a]) / power if power else 0.0)
    return np.array(scales)


def _average_normalization(
    context: Context, sequences: Ints, batch_rows: int
) -> tuple[float, float]:
    """The mean shift and scale of rows."""
    sum_batch = jax.jit(_sum_normalization, out_shardings=replicated(context.mesh))
    total, n_rows = np.zeros(2), 0
    for rows_bd, mask_b in iterate_rows(context, sequences, batch_rows):
        total += jax.device_get(sum_batch(context.sae, rows_bd, mask_b))
        n_rows += int(np.sum(mask_b))
    shift, scale = total / n_rows
    return float(shift), float(scale)


def _sum_normalization(sae: Sae, rows_bd: jax.Array, mask_b: jax.Array) -> jax.Array:
    _, *shift_and_scale = sae.normalize(rows_bd.astype(jnp.float32))
    both_b2 = jnp.concatenate(shift_and_scale, axis=1)
    return jnp.sum(both_b2, axis=0, where=mask_b[:, None])


def _measure_batch(
    sae: Sae,
    subject: Subject,
    tokens_bt: jax.Array,
    code: list[jax.Array],
    common: tuple[float, float],
    mean_d: jax.Array,
    excluded_n: jax.Array,
    site: str,
) -> dict[str, jax.Array]:
    def lose(replacement: Any) -> jax.Array:
        replace = {site: put_at_rows(replacement, excluded_n)} if replacement else None
        logits_btv, _ = subject.forward(tokens_bt, replace=replace)
        assert logits_btv is not None
        return next_token_loss(logits_btv, tokens_bt)

    return {
        "clean": lose(None),
        "sae": lose(Partial(reconstruct, sae)),
        "simulated": lose(Partial(_rebuild, sae, code, None)),
        "patterns_alone": lose(Partial(_rebuild, sae, code, common)),
        "mean_ablated": lose(Partial(ablate, mean_d)),
    }


def _rebuild(
    sae: Sae,
    code: list[jax.Array],
    common: tuple[jax.Array, jax.Array] | None,
    acts_btd: jax.Array,
    tokens_bt: jax.Array,
) -> jax.Array:
    """Each row from its own simulated code."""
    values_btk, indices_btk = code
    _, shift_bt1, scale_bt1 = sae.normalize(acts_btd.astype(jnp.float32))
    if common is not None:
        shift_bt1, scale_bt1 = (jnp.full_like(shift_bt1, value) for value in common)
    n_cut_bt1 = jnp.zeros(shift_bt1.shape, jnp.int32)
    return sae.decode(
        SparseCode(values_btk, indices_btk, shift_bt1, scale_bt1, n_cut_bt1)
    )
