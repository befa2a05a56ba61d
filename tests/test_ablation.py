"""Sparsity of effects: NumPy, planted answers, meshes, real layers, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import planted
import pytest
from jax.tree_util import Partial
from planted import PIECES, SITE, VOCAB, D, T
from test_subjects import CONFIG, make_tokenizer, make_weights

from sae_jax.evals import EvaluateConfig, ablation, evaluate, places
from sae_jax.evals.context import open_context
from sae_jax.evals.effects import find_median, measure_effects, measure_sparsity
from sae_jax.evals.figures import ratio_figure
from sae_jax.subjects import Subject

HORIZON = 12
# More than there are: 21 held-out contexts, of 16 tokens.
EVERYWHERE = EvaluateConfig(
    ablated_tokens=10_000, ablation_horizon=HORIZON, batch_sequences=8
)
N_PLACES = 21 * (T - HORIZON + 1)
MEASURES = ("ablation_sparsity", "own_sparsity", "ablation_norm", "ablation_kl")
GAUSSIAN = 2 / np.pi


@pytest.fixture(scope="module")
def subject():
    return planted.make_subject()


@pytest.fixture(scope="module")
def store(subject, tmp_path_factory):
    return planted.write_store(tmp_path_factory.mktemp("ablation") / "store", subject)


def _measure(sae, subject, store, config=EVERYWHERE, **settings):
    results = evaluate(sae, subject, store, ("ablation",), config=config, **settings)
    return results["metrics"]["ablation"]


def _values(measured):
    return {name: part["value"] for name, part in measured.items() if "value" in part}


@pytest.fixture(scope="module")
def holed(subject, tmp_path_factory):
    path = tmp_path_factory.mktemp("holes") / "store"
    return planted.write_holed_store(path, subject)


@pytest.mark.parametrize(("which", "horizon"), [("store", HORIZON), ("holed", 5)])
@pytest.mark.parametrize(
    ("kind", "tokens_before"), [("none", 64), ("center_unit_norm", 2)]
)
def test_it_is_that_of_numpy(
    subject, which, horizon, monkeypatch, kind, tokens_before, request
):
    monkeypatch.setattr(places, "_TOKENS_BEFORE", tokens_before)
    store, params = request.getfixturevalue(which), planted.random_params()
    config = dataclasses.replace(EVERYWHERE, ablation_horizon=horizon)
    measured = _measure(planted.make_sae(params, kind=kind), subject, store, config)
    want = _measure_slowly(subject, store, params, kind, tokens_before, horizon)
    values, n_places = _values(measured), len(_list_places(store, horizon))
    for name, by_context in want.items():
        by_context = [np.array(terms) for terms in by_context.values()]
        mean = np.concatenate(by_context).mean()
        assert values[name] == pytest.approx(mean, rel=2e-4), name
        assert measured[name]["samples"] == sum(map(len, by_context))
        total_s, count_s = (
            np.array([of(terms) for terms in by_context], float) for of in (np.sum, len)
        )
        ci95 = ratio_figure(total_s, count_s, 0, "")["ci95"]
        assert measured[name]["ci95"] == pytest.approx(ci95, rel=2e-3), name
    assert values["ablation_no_effect"] == 0
    assert measured["ablation_no_effect"]["samples"] > 3 * n_places
    assert values.keys() == ablation.MEANINGS.keys()


def _list_places(store, horizon):
    """(sequence, position) of all rows with so many tokens from them on."""
    _, is_real_st, is_row_st = planted.find_positions(store)
    return [
        (sequence, place)
        for sequence, is_real_t, is_row_t in zip(
            store.sequences("heldout").tolist(), is_real_st, is_row_st, strict=True
        )
        for place in np.flatnonzero(is_row_t).tolist()
        if place + horizon <= is_real_t.sum()
    ]


def test_places_of_contexts_with_holes(subject, holed):
    """One of each context that has any, drawn from all, before a second of one."""
    context = open_context(planted.make_sae(planted.random_params()), subject, holed)
    of_context = {}
    for sequence, place in _list_places(holed, 5):
        of_context.setdefault(sequence, set()).add(place)
    drawn = np.random.default_rng(0).permutation(holed.sequences("heldout")).tolist()
    with_places = [sequence for sequence in drawn if sequence in of_context]
    assert len(with_places) < len(drawn)
    n_all = sum(map(len, of_context.values()))
    for wanted in (1, 5, len(with_places), len(with_places) + 3, n_all, 10_000):
        config = dataclasses.replace(
            EVERYWHERE, ablated_tokens=wanted, ablation_horizon=5
        )
        found = [(p.sequence, p.position) for p in places.read_places(context, config)]
        assert len(set(found)) == len(found) == min(wanted, n_all)
        assert all(place in of_context[sequence] for sequence, place in found)
        first = [sequence for sequence, _ in found[: len(with_places)]]
        assert sorted(first) == sorted(with_places[:wanted])


def _measure_slowly(subject, store, params, kind, tokens_before, horizon):
    """Each figure's terms by context, in float64."""
    mean_d = store.statistics(SITE).mean_d
    want = {name: {} for name in ablation.MEANINGS if name != "ablation_no_effect"}
    for sequence, place in _list_places(store, horizon):
        tokens_t = store.read_tokens([sequence])[0]
        first = max(0, place - tokens_before)
        acts_1td = planted.rows_of(subject, tokens_t[None, first:])
        row_d = acts_1td[0, place - first]
        (code_l,), (recon_d,) = planted.encode(params, row_d[None], kind=kind)
        active = np.flatnonzero(code_l)
        rng = np.random.default_rng((0, sequence, place))
        ablated = {"": [], "_channels": [], "_random": []}
        for latent in active:
            without_l = np.where(np.arange(len(code_l)) == latent, 0, code_l)
            scale = np.linalg.norm(row_d - row_d.mean()) if kind != "none" else 1.0
            contribution_d = scale * (code_l - without_l) @ params["w_dec_ld"]
            ablated[""].append(row_d - contribution_d)
        for channel in rng.permutation(D)[: len(active)]:
            changed_d = np.where(np.arange(D) == channel, mean_d, row_d)
            ablated["_channels"].append(changed_d)
        for unit_d in rng.standard_normal((len(active), D)):
            unit_d /= np.linalg.norm(unit_d)
            ablated["_random"].append(row_d - unit_d * (unit_d @ (row_d - mean_d)))
        for suffix, rows in ablated.items():
            terms = [
                _effect_of(subject, acts_1td, place - first, row, horizon)
                for row in rows
            ]
            for name, values in zip(MEASURES, np.array(terms).T):
                want[name + suffix].setdefault(sequence, []).extend(values)
    return want


def _effect_of(subject, acts_1td, place, row_d, horizon):
    changed_1td = acts_1td.copy()
    changed_1td[0, place] = row_d
    span = slice(place, place + horizon)
    clean_tv, ablated_tv = (
        _logits(subject, acts)[0, span] for acts in (acts_1td, changed_1td)
    )
    effect_tv = ablated_tv - clean_tv
    effect_tv -= np.median(effect_tv, axis=1, keepdims=True)
    log_clean_tv, log_ablated_tv = (
        planted.log_predictions(subject, acts)[0, span]
        for acts in (acts_1td, changed_1td)
    )
    kl_t = (np.exp(log_clean_tv) * (log_clean_tv - log_ablated_tv)).sum(1)
    norm = np.linalg.norm(effect_tv)
    return _sparsity(effect_tv), _sparsity(effect_tv[0]), norm, kl_t.mean()


def _logits(subject, acts_btd):
    mix_dd, head_dv = (np.float64(w) for w in (subject.mix_dd, subject.head_dv))
    return np.tanh(acts_btd @ mix_dd) @ head_dv


def _sparsity(effect):
    return (np.abs(effect).sum() / np.linalg.norm(effect)) ** 2 / effect.size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearSubject:
    """Logits are head @ the row itself, or the sum of the rows up to it."""

    embed_vd: jax.Array
    head_dv: jax.Array
    carries: bool = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(default="planted", metadata={"static": True})
    identity: str = dataclasses.field(default="0" * 64, metadata={"static": True})

    def forward(self, tokens_bt, capture=(), replace=None, logits=True):
        acts_btd = self.embed_vd[tokens_bt]
        if replace:
            acts_btd = replace[SITE](acts_btd, tokens_bt)
        seen_btd = jnp.cumsum(acts_btd, axis=1) if self.carries else acts_btd
        return seen_btd @ self.head_dv, {SITE: acts_btd for _ in capture}

    def decode_tokens(self, ids):
        return [PIECES[i % VOCAB] for i in ids]


def _linear(subject, head_dv, carries=False):
    return LinearSubject(subject.embed_vd, jnp.asarray(head_dv, jnp.float32), carries)


def _rotated_params(rotation_dd):
    """Latents are the rotated channels, each way: with k = D, D are active."""
    params = planted.perfect_params()
    rotated_ld = params["w_dec_ld"] @ rotation_dd
    return params | {"w_enc_ld": rotated_ld, "w_dec_ld": rotated_ld}


@pytest.mark.parametrize(("n_mixed", "carries"), [(1, True), (2, False), (4, True)])
def test_true_features_move_one_logit_and_rotated_ones_as_many_as_are_mixed(
    subject, store, n_mixed, carries
):
    """The head reads channels one by one; a Δ of n equal entries has n/V."""
    hadamard = np.array([[1.0]])
    while len(hadamard) < n_mixed:
        hadamard = np.kron(hadamard, [[1, 1], [1, -1]])
    rotation_dd = np.kron(np.eye(D // n_mixed), hadamard / np.sqrt(n_mixed))
    sae = planted.make_sae(_rotated_params(rotation_dd), k=D)
    values = _values(_measure(sae, _linear(subject, np.eye(D), carries), store))
    assert values["own_sparsity"] == pytest.approx(n_mixed / D, rel=1e-5)
    # Of all channels each place has each once, whatever is drawn.
    assert values["own_sparsity_channels"] == pytest.approx(1 / D, rel=1e-5)
    assert values["own_sparsity_random"] == pytest.approx(GAUSSIAN, abs=0.05)
    for kind in ("", "_channels", "_random"):
        want = values["own_sparsity" + kind] / (1 if carries else HORIZON)
        assert values["ablation_sparsity" + kind] == pytest.approx(want, rel=1e-4)


def test_a_random_head_makes_every_effect_gaussian(subject, store):
    wide_dv = np.random.default_rng(0).normal(size=(D, 5000))
    sae = planted.make_sae(planted.random_params())
    config = dataclasses.replace(EVERYWHERE, ablated_tokens=5)
    values = _values(_measure(sae, _linear(subject, wide_dv, True), store, config))
    for kind in ("", "_channels", "_random"):
        for name in ("ablation_sparsity", "own_sparsity"):
            assert values[name + kind] == pytest.approx(GAUSSIAN, abs=0.01)


def test_ablations_that_change_nothing_are_left_out_and_counted(subject, store):
    head_dv = np.eye(D, VOCAB)
    head_dv[3] = 0
    sae = planted.make_sae(planted.perfect_params(), k=D)
    measured = _measure(sae, _linear(subject, head_dv), store)
    figure = measured["ablation_no_effect"]
    assert figure["samples"] == 3 * D * N_PLACES
    assert figure["value"] == 2 * N_PLACES  # of channel 3: the latent, the channel
    assert measured["ablation_sparsity"]["samples"] == (D - 1) * N_PLACES
    assert measured["ablation_sparsity"]["value"] == pytest.approx(
        1 / (HORIZON * VOCAB), rel=1e-5
    )


def test_what_a_latent_raises_and_lowers(subject, store):
    """Latent l of channel l raises token l; beyond D it lowers token l - D."""
    sae = planted.make_sae(planted.perfect_params(), k=D)
    measured = _measure(sae, _linear(subject, np.eye(D, VOCAB)), store)
    table = measured["ablated_latents"]
    assert len(table["rows"]) == 12
    for row in table["rows"]:
        shown = dict(zip(table["columns"], row))
        side = "raises" if shown["latent"] < D else "lowers"
        assert shown[side].startswith(repr(PIECES[shown["latent"] % D]))
    assert sum(row[1] for row in table["rows"]) <= D * N_PLACES
    distribution = measured["ablation_distribution"]
    assert distribution["ys"].keys() == {"latents", "channels", "random"}
    assert distribution["ys"]["random"][-1] == 1
    assert sum(measured["ablation_by_latent"]["counts"]) == 2 * D


def test_sharded_and_in_tiles_it_is_the_same(subject, store, monkeypatch):
    params, config = planted.random_params(), dataclasses.replace(
        EVERYWHERE, ablated_tokens=30
    )

    def measure(mesh_shape=None):
        sae = planted.make_sae(params, kind="layer_norm", mesh_shape=mesh_shape)
        return _measure(sae, subject, store, config)

    whole = measure()
    sharded = measure((2, 4))
    monkeypatch.setattr(ablation, "_LOGIT_BYTES", 4 * T * VOCAB * 4)
    tiled = measure()
    for other in (sharded, tiled):
        for name, value in _values(whole).items():
            assert _values(other)[name] == pytest.approx(value, rel=1e-4), name
    context = open_context(planted.make_sae(params), subject, store)
    drawn = list(places.read_places(context, config))
    assert ablation._choose_tile(context, drawn) == 4


def test_the_seed_draws_places_and_baselines(subject, store):
    sae = planted.make_sae(planted.random_params())
    config = dataclasses.replace(EVERYWHERE, ablated_tokens=40)
    one, again = (_measure(sae, subject, store, config) for _ in range(2))
    other = _measure(sae, subject, store, config, seed=1)
    assert one == again
    for name in ("ablation_sparsity", "ablation_sparsity_random"):
        assert other[name]["value"] != one[name]["value"]
    context = open_context(sae, subject, store)
    drawn = [
        [(place.sequence, place.position) for place in places.read_places(context, c)]
        for c in (config, dataclasses.replace(config, ablated_tokens=21))
    ]
    assert len(set(drawn[0])) == 40 and len(drawn[1]) == 21
    heldout = set(store.sequences("heldout").tolist())
    assert {sequence for sequence, _ in drawn[1]} == heldout
    assert {position for _, position in drawn[0]} > {0, T - HORIZON}


def test_one_compilation_for_each_program(subject, store, monkeypatch):
    traced = []
    forward = type(subject).forward

    def counting(self, tokens_bt, *args, **kwargs):
        traced.append(kwargs.get("replace") is not None)
        return forward(self, tokens_bt, *args, **kwargs)

    monkeypatch.setattr(type(subject), "forward", counting)
    config = dataclasses.replace(EVERYWHERE, ablation_horizon=6, batch_sequences=4)
    _measure(planted.make_sae(planted.random_params()), subject, store, config)
    assert traced == [False, False, True]  # rows, the shape of logits, effects


def test_an_sae_that_never_fires(subject, store):
    sae = planted.make_sae(planted.constant_params(np.zeros(D)))
    measured = _measure(sae, subject, store)
    assert measured.keys() == {"ablation_no_effect"}
    assert measured["ablation_no_effect"]["samples"] == 0


def test_a_horizon_beyond_the_context_is_refused(subject, store):
    sae = planted.make_sae(planted.random_params())
    config = EvaluateConfig(ablation_horizon=T + 1)
    with pytest.raises(ValueError, match="ablation_horizon = 17: .* have 16 tokens"):
        _measure(sae, subject, store, config)
    values = _values(_measure(sae, subject, store, EvaluateConfig(ablation_horizon=T)))
    assert values["ablation_sparsity"] > 0


@pytest.mark.parametrize("kind", ["resid_pre", "attn_out", "mlp_act", "mlp_out"])
def test_one_context_into_many_rows_goes_through_real_layers(kind):
    """As when each row is given its own context, replaced in all of its layers."""
    weights = jax.tree.map(jnp.asarray, make_weights(CONFIG, 0))
    subject = Subject(weights, CONFIG, make_tokenizer(), "small", "0", 0)
    site, place, rng = f"{kind}.0", 4, np.random.default_rng(0)
    tokens_w = rng.integers(subject.vocab_size, size=8).astype(np.int32)
    removed_nd = rng.normal(size=(3, subject.width(site))).astype(np.float32)
    removed_nd[0] = 0
    effects = jax.jit(measure_effects, static_argnames=("site", "horizon"))(
        subject, tokens_w, place, removed_nd, site=site, horizon=3
    )

    def remove(removed_nd, acts_nwd, _):
        return acts_nwd.at[:, place].add(-removed_nd)

    replace = {site: Partial(remove, removed_nd)}
    tokens_nw = np.tile(tokens_w, (3, 1))
    logits_nwv, _ = jax.jit(lambda: subject.forward(tokens_nw, replace=replace))()
    effect_ntv = np.float64(logits_nwv[:, place : place + 3])
    effect_ntv -= effect_ntv[:1].copy()
    effect_ntv -= np.median(effect_ntv, axis=-1, keepdims=True)
    assert effects["norm"][0] == effects["sparsity"][0] == effects["kl"][0] == 0
    for n in (1, 2):
        want = np.linalg.norm(effect_ntv[n]), _sparsity(effect_ntv[n])
        got = effects["norm"][n], effects["sparsity"][n]
        np.testing.assert_allclose(got, want, rtol=1e-4)
        assert effects["lowered"][n, 0] == np.argmax(effect_ntv[n, 0])
        assert effects["raised"][n, 0] == np.argmin(effect_ntv[n, 0])


@pytest.mark.parametrize("size", [1, 2, 3, 40, 41])
def test_the_median_is_that_of_numpy(size):
    rng = np.random.default_rng(size)
    values = rng.normal(size=(60, size)) * 10.0 ** rng.integers(-30, 30, size=(60, 1))
    values[::3] = np.round(values[::3]).clip(-2, 2)  # many equal, and both zeros
    values[1], values[2] = np.abs(values[1]), -np.abs(values[2])
    values = values.astype(np.float32)
    want = np.median(values, axis=-1)
    np.testing.assert_array_equal(jax.jit(find_median)(values), want)


def test_sparsity_of_known_effects():
    one, equal, normal = np.zeros((3, 2, 500), np.float32)
    one[1, 7], equal[:] = -3, 2
    normal[:] = np.random.default_rng(0).normal(size=normal.shape)
    sparsity_n, norm_n = measure_sparsity(jnp.stack([one, equal, normal, 0 * one]))
    np.testing.assert_allclose(sparsity_n, [1e-3, 1, GAUSSIAN, 0], atol=0.01, rtol=1e-5)
    np.testing.assert_allclose(norm_n[:2], [3, 2 * np.sqrt(1000)], rtol=1e-5)
