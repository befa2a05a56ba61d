"""Neuron2Graph: from tokens on which a latent fires to the patterns that make it fire.

For each such token, with a its activation there and a(·) that at the last token of what
the subject is given instead:

    suffix     the shortest run of tokens s that ends there and has a(s) >= a / 2
    anchored   where one padding token before it spoils that: a(pad, s) < a / 2
    any token  where s_i does not matter: 1 - a(s with pad for s_i) / a(s) < 1 / 2

An activation is the latent's value in the code of the row at the last token, so latents
compete for it as they do in any row.

Sources: Foote et al. 2023 (arXiv:2305.19911); the thresholds and the one padding token,
" _", are those of the code that Gao et al. 2024 (arXiv:2406.04093) released. Two things
differ. A suffix has at most `LONGEST` tokens, not a whole context: where none suffices
there is no pattern, and theirs would have been the whole context. And where s_i is the
padding token itself another stands in for it: it could never be found to matter.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

from sae_jax.evals.context import Context, Sae
from sae_jax.evals.patterns import ANY, Pattern
from sae_jax.evals.positions import Positions
from sae_jax.mesh import DATA, LATENT, replicated
from sae_jax.progress import Progress
from sae_jax.subjects import Subject

LONGEST = 16  # tokens of a suffix

_KEPT = 0.5  # of the activation, by a suffix and by a padded one
_SALIENT = 0.5  # of the suffix's activation, lost without a token
_PADDING = (" _", "_")  # the first of these that is a token; few latents ask for it
# What a batch is filled up to: as the subject is causal, tokens behind the one that is
# read change nothing, and each width is a program to compile.
_WIDTHS = (1, 2, 3, 4, 6, 8, 12, LONGEST + 1)
_TOKENS_AT_ONCE = 4096

Ints = NDArray[np.int64]
Tokens = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Peaks:
    """Tokens on which a latent fires: where in the contexts, and how strongly."""

    latents_n: Ints
    sequences_n: Ints
    positions_n: Ints
    acts_n: Floats


def find_patterns(
    context: Context, positions: Positions, peaks: Peaks
) -> list[Pattern | None]:
    """The pattern of each peak in these contexts; None where no suffix suffices."""
    tokens_st = positions.tokens_st
    padding = _choose_padding(context.subject, tokens_st[positions.is_row_st])
    reader = _Reader(context)
    patterns: list[Pattern | None] = [None] * len(peaks.acts_n)
    waiting_n = np.arange(len(peaks.acts_n))
    # One less than a context, so that a padded suffix is no longer than that.
    longest = min(LONGEST, tokens_st.shape[1] - 1)
    with Progress(
        len(patterns), "contexts", "explanations", is_shown=context.progress
    ) as progress:
        for length in range(1, longest + 1):
            waiting_n = waiting_n[peaks.positions_n[waiting_n] + 1 >= length]
            suffixes_nt = _cut(tokens_st, peaks, waiting_n, length)
            acts_n = reader.read(suffixes_nt, peaks.latents_n[waiting_n])
            suffices_n = acts_n >= _KEPT * peaks.acts_n[waiting_n]
            found_n = waiting_n[suffices_n]
            found = _generalise(
                reader,
                padding,
                suffixes_nt[suffices_n],
                peaks.latents_n[found_n],
                peaks.acts_n[found_n],
                acts_n[suffices_n],
            )
            for index, pattern in zip(found_n, found, strict=True):
                patterns[index] = pattern
            waiting_n = waiting_n[~suffices_n]
            progress.update(len(patterns) - len(waiting_n))
        progress.update(len(patterns))
    return patterns


def _choose_padding(subject: Subject, tokens_n: Tokens) -> tuple[int, int]:
    """A token that means little, and one to take its place where it stands itself.

    Where the text has no such token, those are the two most frequent of these.
    """
    tokens, counts = np.unique(tokens_n, return_counts=True)
    frequent = tokens[np.argsort(-counts, kind="stable")]
    texts = subject.decode_tokens(frequent)
    preferred = [frequent[texts.index(text)] for text in _PADDING if text in texts]
    first = int(preferred[0] if preferred else frequent[0])
    others = frequent[frequent != first]
    return first, int(others[0]) if others.size else first


def _cut(tokens_st: Tokens, peaks: Peaks, which_n: Ints, length: int) -> Tokens:
    """The last `length` tokens [n, length] up to each peak."""
    before_t = np.arange(1 - length, 1)
    return tokens_st[
        peaks.sequences_n[which_n, None], peaks.positions_n[which_n, None] + before_t
    ]


def _generalise(
    reader: "_Reader",
    padding: tuple[int, int],
    suffixes_nt: Tokens,
    latents_n: Ints,
    acts_n: Floats,
    suffix_acts_n: Floats,
) -> list[Pattern]:
    """The patterns of suffixes of one length."""
    n, length = suffixes_nt.shape
    padded_nt = np.pad(suffixes_nt, ((0, 0), (1, 0)), constant_values=padding[0])
    is_anchored_n = reader.read(padded_nt, latents_n) < _KEPT * acts_n
    # [n, replaced, T]
    replaced_nrt = np.repeat(suffixes_nt[:, None], length, axis=1)
    stand_ins_nt = np.where(suffixes_nt == padding[0], padding[1], padding[0])
    diagonal = np.arange(length)
    replaced_nrt[:, diagonal, diagonal] = stand_ins_nt
    without_nr = reader.read(
        replaced_nrt.reshape(-1, length), np.repeat(latents_n, length)
    ).reshape(n, length)
    is_any_nt = 1 - without_nr / suffix_acts_n[:, None] < _SALIENT
    return [
        Pattern(tuple(tokens), bool(is_anchored), float(act))
        for tokens, is_anchored, act in zip(
            np.where(is_any_nt, ANY, suffixes_nt).tolist(),
            is_anchored_n,
            suffix_acts_n,
            strict=True,
        )
    ]


class _Reader:
    """Runs the subject to the site, and the encoder there."""

    def __init__(self, context: Context):
        self._context = context
        self._encode = jax.jit(
            _encode_at,
            static_argnames="site",
            out_shardings=replicated(context.mesh),
        )

    def read(self, tokens_nt: Tokens, latents_n: Ints) -> Floats:
        """The activation of each latent at the last of its tokens.

        Equal runs of tokens are run once, for all latents that ask for them.
        """
        acts_n = np.zeros(len(latents_n), np.float32)
        distinct_mt, which_n = np.unique(tokens_nt, axis=0, return_inverse=True)
        which_n = which_n.reshape(-1)
        order_n = np.argsort(which_n, kind="stable")
        for first, values_bk, indices_bk in self._iterate_codes(distinct_mt):
            span = np.searchsorted(which_n[order_n], [first, first + len(values_bk)])
            asked_n = order_n[slice(*span)]
            rows_n = which_n[asked_n] - first
            is_own_nk = indices_bk[rows_n] == latents_n[asked_n, None]
            acts_n[asked_n] = np.sum(values_bk[rows_n], axis=1, where=is_own_nk)
        return acts_n

    def _iterate_codes(
        self, tokens_mt: Tokens
    ) -> Iterator[tuple[int, Floats, NDArray[np.int32]]]:
        """(first row, values, indices) of batches, of one shape for each width."""
        m, length = tokens_mt.shape
        longest = self._context.store.context_length
        width = min(longest, min(width for width in _WIDTHS if width >= length))
        n_devices = self._context.mesh.size
        n_batch = max(1, _TOKENS_AT_ONCE // width // n_devices) * n_devices
        sharding = NamedSharding(
            self._context.mesh, PartitionSpec((DATA, LATENT), None)
        )
        for first in range(0, m, n_batch):
            part_bt = tokens_mt[first : first + n_batch]
            missing = ((0, n_batch - len(part_bt)), (0, width - length))
            code = self._encode(
                self._context.sae,
                self._context.subject,
                jax.device_put(np.pad(part_bt, missing, mode="edge"), sharding),
                length - 1,
                site=self._context.site,
            )
            values_bk, indices_bk = jax.device_get(code)
            yield first, values_bk[: len(part_bt)], indices_bk[: len(part_bt)]


def _encode_at(
    sae: Sae, subject: Subject, tokens_bt: jax.Array, position: int, site: str
) -> tuple[jax.Array, jax.Array]:
    """Values and indices [B, K] of the rows at this position."""
    _, acts = subject.forward(tokens_bt, capture=(site,), logits=False)
    code = sae.encode(acts[site][:, position].astype(jnp.float32))
    return code.values, code.indices
