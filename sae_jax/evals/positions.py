"""Which positions of a store's contexts count, and for what.

    real       not padding
    row        the store has its row: it is real, no excluded token, and not one of the
               last of a split, short of a chunk. Errors, densities and firings are of
               rows.
    predicted  it is real, and so is the one before it, where it is predicted. Losses
               are of these; an excluded token is read and predicted like any other.

An SAE was not trained on excluded tokens, so what is put in the place of rows is not
put there: the subject goes on with its own activations (`put_at_rows`).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from numpy.typing import NDArray

from sae_jax.store import NO_DOCUMENT, Store

NO_TOKEN = -1


@dataclass(frozen=True, eq=False)
class Positions:
    """Contexts [S, T]: their tokens, and which positions are real and which rows."""

    tokens_st: NDArray[np.int32]
    is_real_st: NDArray[np.bool_]
    is_row_st: NDArray[np.bool_]

    @property
    def is_predicted_st(self) -> NDArray[np.bool_]:
        """[S, T - 1], as losses are: of all but the first position."""
        return self.is_real_st[:, :-1] & self.is_real_st[:, 1:]


def read_positions(store: Store, sequences: NDArray[np.int64]) -> Positions:
    """The positions of these contexts of one split."""
    _, is_row_st = store.find_rows(sequences)
    is_real_st = store.read_documents(sequences) != NO_DOCUMENT
    return Positions(store.read_tokens(sequences), is_real_st, is_row_st)


def read_real_tokens(store: Store, sequences: NDArray[np.int64]) -> NDArray[np.int32]:
    """The tokens of these contexts [S, T], and NO_TOKEN at padding."""
    is_real_st = store.read_documents(sequences) != NO_DOCUMENT
    return np.where(is_real_st, store.read_tokens(sequences), np.int32(NO_TOKEN))


def list_excluded(store: Store) -> NDArray[np.int32]:
    """The tokens of which the store has no rows."""
    return np.asarray(store.manifest.excluded_ids, np.int32)


def put_at_rows(replacement: Partial, excluded_n: jax.Array) -> Partial:
    """The replacement of a site's activations, but not at excluded tokens.

    At padding too: behind it there is no position that counts.
    """
    if not len(excluded_n):
        return replacement
    return Partial(_replace, replacement, excluded_n)


def _replace(
    replacement: Partial,
    excluded_n: jax.Array,
    acts_btd: jax.Array,
    tokens_bt: jax.Array,
) -> jax.Array:
    is_excluded_bt1 = jnp.isin(tokens_bt, excluded_n)[..., None]
    return jnp.where(is_excluded_bt1, acts_btd, replacement(acts_btd, tokens_bt))
