"""Tasks whose labels are single features of the rows, and SAEs to tell them by."""

import jax
import numpy as np

from sae_jax.config import MeshConfig, SaeConfig, TrainConfig
from sae_jax.evals.context import Context
from sae_jax.evals.task_rows import TaskRows
from sae_jax.mesh import make_mesh
from sae_jax.normalize import Normalization
from sae_jax.state import Setup, abstract

SITE = "resid_post.1"


def make_sae(w_ld, kind="none", mesh_shape=(1, 1), w_enc_ld=None, site=SITE):
    """A TopK SAE that decodes by these rows, and encodes by them unless by others."""
    n_latents, d_model = w_ld.shape
    sae = SaeConfig(n_latents=n_latents, d_model=d_model, k=2, normalization=kind)
    mesh = make_mesh(MeshConfig(*mesh_shape))
    setup = Setup(TrainConfig(sae=sae), Normalization(kind), mesh, site, "0")
    params = {
        "w_enc_ld": w_ld if w_enc_ld is None else w_enc_ld,
        "w_dec_ld": w_ld,
        "b_dec_d": np.arange(d_model),
        "b_enc_l": np.arange(n_latents),
    }
    placed = {
        name: jax.device_put(np.float32(params[name]), leaf.sharding)
        for name, leaf in abstract(setup).params.items()
    }
    return jax.jit(setup.sae)(placed)


def make_context(sae, seed=0):
    """Enough of a context for metrics that are made of tasks' rows alone."""
    return Context(sae, None, None, SITE, sae.mesh, seed, progress=False)


def make_tasks(features_fd, n_tasks, n_rows=160, noise=0.0):
    """Task i asks whether feature i is in a row, as a third of the others are.

    Tasks differ in their number of rows; every fourth text of 4 rows is held out.
    """
    rng = np.random.default_rng(0)
    n_features, d_model = features_fd.shape
    tasks = []
    for at in range(n_tasks):
        n = n_rows - 16 * at
        is_in_nf = rng.random((n, n_features)) < 1 / 3
        is_in_nf[:, at] = np.arange(n) % 2
        codes_nf = is_in_nf * rng.uniform(0.8, 1.2, size=(n, n_features))
        acts_nd = 3 + codes_nf @ features_fd + noise * rng.normal(size=(n, d_model))
        texts_n = np.arange(n) // 4
        tasks.append(
            TaskRows(
                f"task {at}",
                acts_nd.astype(np.float32),
                is_in_nf[:, at],
                texts_n % 4 == 3,
                texts_n,
            )
        )
    return tasks


def random_rows(n, d_model, seed=1):
    """Unit rows [n, D]."""
    rows_nd = np.random.default_rng(seed).normal(size=(n, d_model))
    return rows_nd / np.linalg.norm(rows_nd, axis=1, keepdims=True)


def rotate(rows_nd, angle):
    """Each of at most D / 2 orthogonal rows, turned towards a direction of its own."""
    basis_dd = np.linalg.svd(rows_nd)[2]
    others_nd = basis_dd[len(rows_nd) : 2 * len(rows_nd)]
    return np.cos(angle) * rows_nd + np.sin(angle) * others_nd
