"""A subject whose rows say which token stands there, which before it, and where.

A row is [one-hot of the token, one-hot of the token before, is it the first, 1]: small
whole numbers, exact in every type. The SAE's true features are one latent for each
token, for each pair of tokens in order, for the first position, and for any row.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import planted
import stores
from planted import SITE, D, L, T

from sae_jax.store import Store, open_store

VOCAB = 5
PIECES = [" a", "\n", " _", "b", "c"]
assert D == 2 * VOCAB + 2 and L == VOCAB + VOCAB**2 + 2
FIRST, ALWAYS = L - 2, L - 1  # latents


def pair(before: int, token: int) -> int:
    """The latent that fires on `token` right behind `before`."""
    return VOCAB + VOCAB * before + token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PatternSubject:
    mix_dd: jax.Array
    head_dv: jax.Array
    name: str = dataclasses.field(default="patterns", metadata={"static": True})
    identity: str = dataclasses.field(default="1" * 64, metadata={"static": True})

    vocab_size = VOCAB

    def forward(self, tokens_bt, capture=(), replace=None, logits=True):
        # Its context is no longer than that of the store.
        assert tokens_bt.shape[1] <= T
        acts_btd = _make_rows(jnp.asarray(tokens_bt), jnp)
        if replace:
            acts_btd = replace[SITE](acts_btd, tokens_bt)
        logits_btv = jnp.tanh(acts_btd @ self.mix_dd) @ self.head_dv
        return logits_btv, {SITE: acts_btd for _ in capture}

    def decode_tokens(self, ids):
        return [PIECES[i] for i in ids]


def make_subject() -> PatternSubject:
    rng = np.random.default_rng(8)
    arrays = rng.normal(size=(D, D)), rng.normal(size=(D, VOCAB))
    return PatternSubject(*(jnp.asarray(array, jnp.float32) for array in arrays))


def true_params() -> oracle.Params:
    """A dictionary whose latents are the features above, each 1 where it fires."""
    token, before, (first,), (always,) = np.split(np.eye(D), [VOCAB, -2, -1])
    pairs = [token[b] + before[a] for a in range(VOCAB) for b in range(VOCAB)]
    w_enc_ld = np.array([*token, *pairs, first, always])
    b_enc_l = np.zeros(L)
    b_enc_l[VOCAB : VOCAB + VOCAB**2] = -1
    rng = np.random.default_rng(9)
    w_dec_ld = oracle.unit_norm_rows(rng.normal(size=(L, D)))
    return {
        "w_enc_ld": w_enc_ld,
        "w_dec_ld": w_dec_ld,
        "b_dec_d": np.zeros(D),
        "b_enc_l": b_enc_l,
    }


def write_store(path: Path, subject: PatternSubject, heldout: int = 24) -> Store:
    """16 train and some held-out contexts of random tokens."""
    sizes = {"train": 16, "heldout": heldout}
    manifest = stores.make_manifest(
        {SITE: D},
        T,
        rows_per_shard=8 * T,
        rows_per_chunk=T,
        subject={"name": subject.name, "identity": subject.identity},
    )
    rng = np.random.default_rng(10)
    blocks = []
    for split, size in sizes.items():
        for start in range(0, size, 8):
            n = min(8, size - start)
            tokens = rng.integers(VOCAB, size=(n, T)).astype(np.int32)
            acts = _make_rows(tokens, np).reshape(-1, D).astype(ml_dtypes.bfloat16)
            documents = np.full((n, T), split == "heldout", np.int32)
            blocks.append((split, {SITE: acts}, tokens, documents))
    stores.write(path, manifest, blocks, ["train.txt", "heldout.txt"])
    return open_store(path)


def make_sae(params: oracle.Params, mesh_shape=None):
    """K = 4: a token's own latent, its pair's, and the two others."""
    return planted.make_sae(params, k=4, mesh_shape=mesh_shape)


def _make_rows(tokens_bt, np):
    token_btv = (tokens_bt[..., None] == np.arange(VOCAB)).astype(np.float32)
    before_btv = np.pad(token_btv[:, :-1], ((0, 0), (1, 0), (0, 0)))
    first_bt1 = np.ones_like(token_btv[..., :1]) * (
        np.arange(tokens_bt.shape[1])[:, None] == 0
    )
    always_bt1 = np.ones_like(first_bt1)
    return np.concatenate([token_btv, before_btv, first_bt1, always_bt1], axis=-1)
