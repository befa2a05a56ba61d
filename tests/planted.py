"""A tiny subject, store and SAE whose every figure NumPy can give in float64."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import stores
from flax import nnx

from sae_jax.config import DataConfig, MeshConfig, SaeConfig, TrainConfig
from sae_jax.mesh import make_mesh, single_device_mesh
from sae_jax.normalize import Normalization
from sae_jax.saes import TopKSae
from sae_jax.state import Setup
from sae_jax.store import Store, open_store

D, L, K, T, VOCAB = 12, 32, 5, 16, 24
SITE = "resid_post.1"
EXCLUDED = (0, 5)  # tokens of which a store with holes has no rows
PIECES = ["<script>", "\n", "\t", " a", "&", '"'] + [f"w{i}" for i in range(6, VOCAB)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlantedSubject:
    """Token embeddings averaged over the past, one nonlinear layer, logits."""

    embed_vd: jax.Array
    mix_dd: jax.Array
    head_dv: jax.Array
    name: str = dataclasses.field(default="planted", metadata={"static": True})
    identity: str = dataclasses.field(default="0" * 64, metadata={"static": True})

    vocab_size = VOCAB

    def forward(self, tokens_bt, capture=(), replace=None, logits=True):
        sums_btd = jnp.cumsum(self.embed_vd[tokens_bt], axis=1)
        acts_btd = sums_btd / (1 + jnp.arange(tokens_bt.shape[1]))[:, None]
        if replace:
            acts_btd = replace[SITE](acts_btd, tokens_bt)
        logits_btv = jnp.tanh(acts_btd @ self.mix_dd) @ self.head_dv
        return logits_btv, {SITE: acts_btd for _ in capture}

    def decode_tokens(self, ids):
        return [PIECES[i] for i in ids]


def make_subject() -> PlantedSubject:
    rng = np.random.default_rng(5)
    arrays = (
        3 * rng.normal(size=(VOCAB, D)) + 0.5,
        rng.normal(size=(D, D)),
        rng.normal(size=(D, VOCAB)),
    )
    return PlantedSubject(*(jnp.asarray(array, jnp.float32) for array in arrays))


def rows_of(subject: PlantedSubject, tokens_bt: np.ndarray) -> np.ndarray:
    """The subject's rows at the site, float64 [B, T, D]."""
    embed_vd = np.asarray(subject.embed_vd, np.float64)
    sums_btd = np.cumsum(embed_vd[tokens_bt], axis=1)
    return sums_btd / (1 + np.arange(tokens_bt.shape[1]))[:, None]


def log_predictions(subject: PlantedSubject, acts_btd: np.ndarray) -> np.ndarray:
    """Log probabilities of the next token, float64 [B, T, V]."""
    mix_dd, head_dv = (np.float64(w) for w in (subject.mix_dd, subject.head_dv))
    logits_btv = np.tanh(acts_btd @ mix_dd) @ head_dv
    return logits_btv - np.log(np.exp(logits_btv).sum(axis=-1, keepdims=True))


def write_store(path: Path, subject: PlantedSubject, heldout: bool = True) -> Store:
    """Two train and three held-out shards of 8 contexts, the last of 5."""
    sizes = [("train", 8), ("train", 8)]
    sizes += [("heldout", 8), ("heldout", 8), ("heldout", 5)] if heldout else []
    manifest = stores.make_manifest(
        {SITE: D},
        T,
        rows_per_shard=8 * T,
        rows_per_chunk=T,
        subject={"name": subject.name, "identity": subject.identity},
    )
    rng = np.random.default_rng(6)
    blocks = []
    for split, n in sizes:
        tokens = rng.integers(VOCAB, size=(n, T)).astype(np.int32)
        acts = rows_of(subject, tokens).reshape(-1, D).astype(ml_dtypes.bfloat16)
        documents = np.full((n, T), split == "heldout", np.int32)
        blocks.append((split, {SITE: acts}, tokens, documents))
    stores.write(path, manifest, blocks, ["train.txt", "held<out>.txt"])
    return open_store(path)


def write_holed_store(path: Path, subject: PlantedSubject) -> Store:
    """Of contexts that token 0 begins and padding ends, with tokens that are no rows.

    The second context of each shard has no row at all, and nor have the last of the
    held-out ones, whose rows are short of a chunk.
    """
    manifest = stores.make_manifest(
        {SITE: D},
        T,
        rows_per_shard=4 * T,
        rows_per_chunk=16,
        contexts_per_shard=8,
        excluded_ids=list(EXCLUDED),
        subject={"name": subject.name, "identity": subject.identity},
    )
    rng = np.random.default_rng(11)
    blocks = []
    sizes = [("train", 8)] * 2 + [("heldout", 8), ("heldout", 8), ("heldout", 5)]
    for split, n in sizes:
        tokens = rng.integers(VOCAB, size=(n, T)).astype(np.int32)
        lengths = rng.integers(T // 4, T + 1, size=n)
        lengths[:2] = T, 1
        tokens[:, 0] = 0
        is_real = np.arange(T) < lengths[:, None]
        tokens[~is_real] = 3
        acts = rows_of(subject, tokens).reshape(-1, D).astype(ml_dtypes.bfloat16)
        documents = np.where(is_real, int(split == "heldout"), -1).astype(np.int32)
        blocks.append((split, {SITE: acts}, tokens, documents))
    stores.write(path, manifest, blocks, ["train.txt", "held<out>.txt"])
    return open_store(path)


def find_positions(store: Store) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Held-out tokens, which are real, and which are rows, [contexts, T]."""
    heldout = store.sequences("heldout")
    tokens_st = store.read_tokens(heldout)
    is_real_st = store.read_documents(heldout) >= 0
    is_row_st = is_real_st & ~np.isin(tokens_st, store.manifest.excluded_ids)
    number_st = np.cumsum(is_row_st).reshape(is_row_st.shape)
    return tokens_st, is_real_st, is_row_st & (number_st <= store.rows("heldout"))


def put_at_rows(store: Store, tokens_bt: np.ndarray, new_btd, acts_btd) -> np.ndarray:
    """New rows, but the old ones at excluded tokens."""
    is_excluded_bt = np.isin(tokens_bt, store.manifest.excluded_ids)
    return np.where(is_excluded_bt[..., None], acts_btd, new_btd)


def heldout_rows(store: Store) -> np.ndarray:
    """All held-out rows in float64, [contexts, T, D]; 0 where there is none."""
    return store.read_contexts(SITE, store.sequences("heldout"))[0].astype(float)


def random_params() -> oracle.Params:
    """An SAE in which latents 0 and 7 never fire."""
    rng = np.random.default_rng(7)
    b_enc_l = 0.3 * rng.normal(size=L)
    b_enc_l[[0, 7]] = -1e6
    return {
        "w_enc_ld": 0.5 * rng.normal(size=(L, D)),
        "w_dec_ld": oracle.unit_norm_rows(rng.normal(size=(L, D))),
        "b_dec_d": 0.3 * rng.normal(size=D),
        "b_enc_l": b_enc_l,
    }


def perfect_params() -> oracle.Params:
    """With k = D, a row is rebuilt exactly from its positive and negative parts."""
    both_ld = np.concatenate([np.eye(D), -np.eye(D), np.zeros((L - 2 * D, D))])
    return {
        "w_enc_ld": both_ld,
        "w_dec_ld": both_ld,
        "b_dec_d": np.zeros(D),
        "b_enc_l": np.zeros(L),
    }


def constant_params(value_d: np.ndarray) -> oracle.Params:
    """No latent ever fires: every reconstruction is this vector."""
    params = perfect_params() | {"w_enc_ld": np.zeros((L, D))}
    return params | {"b_dec_d": np.asarray(value_d, np.float64)}


def make_sae(
    params: oracle.Params, k: int = K, kind: str = "none", mesh_shape=None
) -> TopKSae:
    """The SAE with these parameters, on one device or on a mesh."""
    config = TrainConfig(
        sae=SaeConfig(d_model=D, n_latents=L, k=k, k_aux=4, normalization=kind),
        data=DataConfig(batch_rows=16, lanes=1),
    )
    mesh = make_mesh(MeshConfig(*mesh_shape)) if mesh_shape else single_device_mesh()
    setup = Setup(config, Normalization(kind), mesh, SITE, "0")
    with jax.set_mesh(mesh):
        specs = nnx.to_pure_dict(
            nnx.get_named_sharding(nnx.state(setup.sae(params)), mesh)
        )
    placed = {
        name: jax.device_put(np.asarray(value, np.float32), specs[name])
        for name, value in params.items()
    }
    return setup.sae(placed)


def encode(params: oracle.Params, acts: np.ndarray, k: int = K, kind: str = "none"):
    """Dense codes [..., L] and reconstructions [..., D], by the oracle."""
    rows_bd = np.asarray(acts, np.float64).reshape(-1, D)
    normed_bd, shift_b1, scale_b1 = oracle.normalize(kind, rows_bd)
    values_bk, indices_bk = oracle.encode(params, normed_bd, k)
    recon_bd = oracle.decode(params, values_bk, indices_bk) * scale_b1 + shift_b1
    code_bl = np.zeros((len(rows_bd), L))
    np.put_along_axis(code_bl, indices_bk, values_bk, axis=1)
    return code_bl.reshape(*acts.shape[:-1], L), recon_bd.reshape(acts.shape)
