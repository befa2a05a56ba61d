"""What an SAE must beat: dictionaries that nobody trained, as TopK SAEs.

    channels     the residual stream's own axes, up and down: K of 2 D
    components   the first K principal components of the training rows, up and down
    random       L random directions, K a row
    untrained    a run's SAE before its first step

The first three subtract the mean training row and encode by their own decoder rows.
One number scales the reconstructions of `random_dictionary`, whose rows overlap, to the
least squared error. As the codes are SAE codes, every metric applies.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from sae_jax.config import SaeConfig, TrainConfig
from sae_jax.loader import StoreFeed, sample_rows
from sae_jax.mesh import single_device_mesh
from sae_jax.normalize import Normalization
from sae_jax.saes import Sae
from sae_jax.state import Setup, abstract, create
from sae_jax.step import validate
from sae_jax.store import Store

# Of the training rows: for components and biases, and for the scale of what overlaps.
_SAMPLE_ROWS, _SCALE_ROWS = 32_768, 4_096

Directions = NDArray[np.float32]


def channels(store: Store, site: str, k: int, mesh: Mesh | None = None) -> Sae:
    """The K channels of each row that are farthest from their mean."""
    axes_dd = np.eye(store.width(site), dtype=np.float32)
    return _make(store, site, np.concatenate([axes_dd, -axes_dd]), k, mesh)


def components(store: Store, site: str, k: int, mesh: Mesh | None = None) -> Sae:
    """Each row on the same K principal components: PCA."""
    rows_bd = sample_rows(store, site, _SAMPLE_ROWS, 0).astype(np.float64)
    rows_bd -= store.statistics(site).mean_d
    _, vectors_dd = np.linalg.eigh(rows_bd.T @ rows_bd)  # rising
    first_kd = vectors_dd[:, ::-1].T[:k].astype(np.float32)
    return _make(store, site, np.concatenate([first_kd, -first_kd]), k, mesh)


def random_dictionary(
    store: Store,
    site: str,
    n_latents: int,
    k: int,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Sae:
    """The K nearest of L random directions."""
    shape = (n_latents, store.width(site))
    w_ld = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    w_ld /= np.linalg.norm(w_ld, axis=1, keepdims=True)
    unscaled = _make(store, site, w_ld, k, mesh)
    rows_bd = sample_rows(store, site, _SCALE_ROWS, seed)
    mean_d = np.asarray(store.statistics(site).mean_d, np.float32)
    recon_bd = np.asarray(unscaled.decode(unscaled.encode(rows_bd))) - mean_d
    scale = float((recon_bd * (rows_bd - mean_d)).sum() / (recon_bd**2).sum())
    return _make(store, site, w_ld, k, mesh, scale)


def untrained(config: TrainConfig, store: Store, mesh: Mesh | None = None) -> Sae:
    """The SAE that training with this config starts from."""
    mesh = mesh or single_device_mesh()
    setup = validate(config, mesh, StoreFeed(config.data, mesh, config.seed, [store]))
    rows_bd = sample_rows(store, setup.site, _SAMPLE_ROWS, config.seed)
    return jax.jit(setup.sae)(create(setup, jnp.asarray(rows_bd)).params)


def _make(
    store: Store,
    site: str,
    w_ld: Directions,
    k: int,
    mesh: Mesh | None,
    scale: float = 1.0,
) -> Sae:
    """The TopK SAE that decodes by these rows and encodes by them times `scale`."""
    n_latents, d_model = w_ld.shape
    sae = SaeConfig(
        n_latents=n_latents, d_model=d_model, k=k, aux_coefficient=0.0, use_b_enc=False
    )
    mesh = mesh or single_device_mesh()
    setup = Setup(TrainConfig(sae=sae), Normalization(), mesh, site, "")
    params = {
        "w_enc_ld": scale * w_ld,
        "w_dec_ld": w_ld,
        "b_dec_d": np.asarray(store.statistics(site).mean_d, np.float32),
    }
    placed = {
        name: jax.device_put(jnp.asarray(params[name]), leaf.sharding)
        for name, leaf in abstract(setup).params.items()
    }
    return jax.jit(setup.sae)(placed)
