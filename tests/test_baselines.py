"""Dictionaries that nobody trained: each is what its name says, and an SAE."""

import numpy as np
import planted
import pytest
from planted import SITE, D

from sae_jax import baselines
from sae_jax.config import DataConfig, MeshConfig, SaeConfig, TrainConfig
from sae_jax.mesh import make_mesh


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("baselines") / "store"
    return planted.write_store(path, planted.make_subject())


@pytest.fixture(scope="module")
def rows(store):
    x = planted.heldout_rows(store).reshape(-1, D)
    return x, np.asarray(store.statistics(SITE).mean_d, float)


def _rebuild(sae, x):
    return np.asarray(sae.decode(sae.encode(x.astype(np.float32))), float)


def _train_rows(store):
    n = store.rows("train")
    return store.read_ranges(SITE, [(0, n)]).astype(float)


@pytest.mark.parametrize("k", [1, 4, D])
def test_channels_keep_the_k_farthest_from_their_mean(store, rows, k):
    x, mean = rows
    centred = x - mean
    least = np.sort(np.abs(centred), axis=1)[:, D - k][:, None]
    want = mean + np.where(np.abs(centred) >= least, centred, 0)
    np.testing.assert_allclose(
        _rebuild(baselines.channels(store, SITE, k), x), want, atol=1e-5
    )


@pytest.mark.parametrize("k", [1, 3, D])
def test_components_are_those_of_pca(store, rows, k):
    x, mean = rows
    train = _train_rows(store) - mean
    vectors = np.linalg.svd(train, full_matrices=False)[2][:k]
    want = mean + (x - mean) @ vectors.T @ vectors
    got = _rebuild(baselines.components(store, SITE, k), x)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_the_random_dictionary_is_scaled_to_the_least_error(store, rows):
    _, mean = rows
    train = _train_rows(store)
    sae = baselines.random_dictionary(store, SITE, 64, 4, seed=3)
    recon = _rebuild(sae, train) - mean
    # The best factor on top of it is one.
    factor = (recon * (train - mean)).sum() / (recon**2).sum()
    assert factor == pytest.approx(1, abs=1e-4)
    norms = np.linalg.norm(np.asarray(sae.w_dec_ld[...]), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-6)
    other = baselines.random_dictionary(store, SITE, 64, 4, seed=4)
    assert not np.allclose(np.asarray(other.w_dec_ld[...]), sae.w_dec_ld[...])


def test_on_a_mesh_they_are_the_same(store, rows):
    x, _ = rows
    mesh = make_mesh(MeshConfig(2, 4))
    one = baselines.random_dictionary(store, SITE, 64, 4)
    many = baselines.random_dictionary(store, SITE, 64, 4, mesh=mesh)
    np.testing.assert_allclose(_rebuild(many, x), _rebuild(one, x), atol=1e-5)


def test_an_untrained_sae_is_the_one_that_training_starts_from(store, tmp_path):
    config = TrainConfig(
        sae=SaeConfig(n_latents=16, k=2),
        data=DataConfig(store=str(store.path), batch_rows=32, lanes=2, window_chunks=1),
        rows=64,
        dead_after_rows=32,
    )
    sae = baselines.untrained(config, store)
    w_enc_ld, w_dec_ld = (np.asarray(w[...]) for w in (sae.w_enc_ld, sae.w_dec_ld))
    np.testing.assert_allclose(w_enc_ld, w_dec_ld)  # as they start
    np.testing.assert_allclose(np.linalg.norm(w_dec_ld, axis=1), 1, atol=1e-6)
    assert sae.config.k == 2 and sae.site == SITE
    assert 0 < np.abs(np.asarray(sae.b_dec_d[...])).max()
