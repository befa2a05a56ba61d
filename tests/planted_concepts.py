"""Rows made of known features, tasks that ask for them, and SAEs that know them."""

import dataclasses

import numpy as np
import planted
from planted import D, K, L

from sae_jax.evals.context import Context
from sae_jax.evals.task_rows import TaskRows

N_TASKS = 4


def make_features(seed=0):
    """D orthonormal features, as rows."""
    rng = np.random.default_rng(seed)
    return np.linalg.qr(rng.normal(size=(D, D)))[0].T


def make_amounts(n, seed=1):
    """How much of each feature rows have, [n, D]: 1 to 2 of at most K, else 0."""
    rng = np.random.default_rng(seed)
    active_nd = rng.random((2 * n, D)) < 0.25
    active_nd = active_nd[active_nd.sum(axis=1) <= K][:n]
    return np.where(active_nd, rng.uniform(1, 2, (n, D)), 0)


def make_tasks(features_dd, n=400, seed=1):
    """Is feature i there? For i < N_TASKS, of balanced rows, one in four held out."""
    tasks = []
    for i in range(N_TASKS):
        amounts_nd = make_amounts(20 * n, [seed, i])
        labels_n = amounts_nd[:, i] > 0
        chosen = np.concatenate(
            [np.flatnonzero(labels_n == label)[: n // 2] for label in (True, False)]
        )
        acts_nd = (amounts_nd[chosen] @ features_dd).astype(np.float32)
        heldout_n = np.arange(n) % 4 == 0
        texts_n = np.arange(n)
        tasks.append(TaskRows(f"f{i}", acts_nd, labels_n[chosen], heldout_n, texts_n))
    return tasks


def make_pair(features_dd, n=400, seed=5):
    """Is feature 0 there, whether or not feature 1 is? As many of all four kinds."""
    amounts_nd = make_amounts(20 * n, seed)
    kind_n = (amounts_nd[:, 0] > 0) + 2 * (amounts_nd[:, 1] > 0)
    chosen = np.concatenate([np.flatnonzero(kind_n == i)[: n // 4] for i in range(4)])
    acts_nd = (amounts_nd[chosen] @ features_dd).astype(np.float32)
    kind_n, texts_n = kind_n[chosen], np.arange(len(chosen))
    heldout_n = texts_n % 4 == 0
    labels_n, spurious_n = kind_n % 2 == 1, kind_n > 1
    return TaskRows("0, not 1", acts_nd, labels_n, heldout_n, texts_n, spurious_n)


def make_sae(rows_ld, mesh_shape=None, encoder_ld=None, bias_l=None, kind="none"):
    """The SAE whose first latents are these unit rows; the others never fire."""
    n = len(rows_ld)
    rest_ld = planted.random_params()["w_dec_ld"][n:]
    w_dec_ld = np.concatenate([rows_ld, rest_ld])
    encoder_ld = rows_ld if encoder_ld is None else encoder_ld
    params = {
        "w_enc_ld": np.concatenate([encoder_ld, rest_ld]),
        "w_dec_ld": w_dec_ld,
        "b_dec_d": np.zeros(D),
        "b_enc_l": np.full(L, -1e6),
    }
    params["b_enc_l"][:n] = 0 if bias_l is None else bias_l
    return planted.make_sae(params, k=K, kind=kind, mesh_shape=mesh_shape)


def rotate(rows_ld, angle, seed=2):
    """Every row turned by this angle, each towards a direction of its own."""
    rng = np.random.default_rng(seed)
    other_ld = rng.normal(size=rows_ld.shape)
    other_ld -= (other_ld * rows_ld).sum(1, keepdims=True) * rows_ld
    other_ld /= np.linalg.norm(other_ld, axis=1, keepdims=True)
    return np.cos(angle) * rows_ld + np.sin(angle) * other_ld


def make_context(sae):
    """A context that has an SAE and nothing to read from."""
    empty = Context(sae, None, None, planted.SITE, sae.mesh, 0, False)
    return dataclasses.replace(empty, measured={})
