"""Top contexts against brute force over every held-out row."""

import numpy as np
import planted
import pytest
from planted import PIECES, L, T

from sae_jax.evals import EvaluateConfig
from sae_jax.viewer import top_contexts

SMALL = EvaluateConfig(rows=336, batch_rows=4 * T)


@pytest.fixture(scope="module")
def subject():
    return planted.make_subject()


@pytest.fixture(scope="module")
def store(subject, tmp_path_factory):
    return planted.write_store(tmp_path_factory.mktemp("viewer") / "store", subject)


@pytest.fixture(scope="module")
def holed(subject, tmp_path_factory):
    path = tmp_path_factory.mktemp("holes") / "store"
    return planted.write_holed_store(path, subject)


@pytest.mark.parametrize("which", ["store", "holed"])
@pytest.mark.parametrize("mesh_shape", [None, (2, 4)])
def test_top_contexts_are_those_of_brute_force(subject, which, mesh_shape, request):
    store, params = request.getfixturevalue(which), planted.random_params()
    sae = planted.make_sae(params, mesh_shape=mesh_shape)
    views = top_contexts(sae, subject, store, L, n_contexts=3, config=SMALL)

    sequences = store.sequences("heldout")
    tokens, is_real_st, is_row_st = planted.find_positions(store)
    code_stl, _ = planted.encode(params, planted.heldout_rows(store))
    code_stl[~is_row_st] = 0
    density_l = (code_stl[is_row_st] > 0).mean(axis=0)
    alive = np.flatnonzero(density_l)
    assert sorted(view.latent for view in views) == alive.tolist()
    assert len(alive) < L

    for view in views:
        assert view.density == pytest.approx(density_l[view.latent])
        acts_st = code_stl[:, :, view.latent]
        best = np.argsort(-acts_st.max(axis=1), kind="stable")[:3]
        best = [i for i in best if acts_st[i].max() > 0]
        assert [c.sequence for c in view.contexts] == sequences[best].tolist()
        assert view.max_activation == pytest.approx(acts_st.max(), rel=1e-5)
        for i, context in zip(best, view.contexts, strict=True):
            peak = int(acts_st[i].argmax())
            assert context.position == peak
            start, stop = max(0, peak - 24), min(peak + 9, is_real_st[i].sum())
            assert context.tokens == tuple(PIECES[t] for t in tokens[i, start:stop])
            np.testing.assert_allclose(
                context.activations, acts_st[i, start:stop], rtol=1e-4, atol=1e-5
            )
            assert context.activation == max(context.activations)
            assert context.document == "held<out>.txt"


def test_shown_latents_are_a_seeded_sample_from_dense_to_rare(subject, store):
    sae = planted.make_sae(planted.random_params())

    def latents(seed):
        views = top_contexts(
            sae, subject, store, 6, n_contexts=1, seed=seed, config=SMALL
        )
        densities = [view.density for view in views]
        assert densities == sorted(densities, reverse=True)
        return [view.latent for view in views]

    assert len(set(latents(0))) == 6
    assert latents(0) == latents(0) != latents(1)


def test_an_sae_that_never_fires_has_nothing_to_show(subject, store):
    sae = planted.make_sae(planted.constant_params(np.zeros(planted.D)))
    assert top_contexts(sae, subject, store, config=SMALL) == []
