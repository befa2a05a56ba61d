"""Every figure against plain float64 NumPy, planted SAEs, meshes and refusals."""

import dataclasses
import io
import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import oracle
import planted
import pytest
from planted import SITE, D, K, L, T

from sae_jax.config import MeshConfig
from sae_jax.evals import METRICS, EvaluateConfig, downstream, evaluate, format_table
from sae_jax.evals.context import (
    choose_row_sequences,
    choose_sequences,
    open_context,
)
from sae_jax.evals.figures import average_figure, mean_figure, ratio_figure
from sae_jax.mesh import make_mesh

# The store has 21 held-out contexts, so in batches of 4 the last has one.
SMALL = EvaluateConfig(rows=336, batch_rows=4 * T, sequences=21, batch_sequences=4)


@pytest.fixture(scope="module")
def subject():
    return planted.make_subject()


@pytest.fixture(scope="module")
def store(subject, tmp_path_factory):
    return planted.write_store(tmp_path_factory.mktemp("evals") / "store", subject)


@pytest.fixture(scope="module")
def holed(subject, tmp_path_factory):
    path = tmp_path_factory.mktemp("holes") / "store"
    return planted.write_holed_store(path, subject)


def test_what_a_store_with_holes_has(holed):
    """Without which the tests that read one would say little."""
    tokens_st, is_real_st, is_row_st = planted.find_positions(holed)
    is_kept_st = is_real_st & ~np.isin(tokens_st, planted.EXCLUDED)
    assert 1 < np.sum(is_kept_st & ~is_row_st) < 16  # short of a chunk
    assert np.sum(~is_row_st.any(axis=1)) >= 3
    assert 0 < np.sum(is_real_st[:, 1:] & ~is_kept_st[:, 1:]) and not is_real_st.all()
    np.testing.assert_array_equal(
        holed.find_rows(holed.sequences("heldout"))[1], is_row_st
    )


def _values(results):
    return {
        name: figure["value"]
        for metric in results["metrics"].values()
        for name, figure in metric.items()
        if "value" in figure
    }


@pytest.mark.parametrize(
    ("which", "per_batch"), [("store", 4), ("holed", 4), ("holed", 1)]
)
@pytest.mark.parametrize("kind", ["none", "center_unit_norm", "layer_norm"])
def test_reconstruction_and_density_are_those_of_numpy(
    subject, which, per_batch, kind, request
):
    store, params = request.getfixturevalue(which), planted.random_params()
    sae = planted.make_sae(params, kind=kind)
    config = dataclasses.replace(
        SMALL, rows=store.rows("heldout"), batch_rows=per_batch * T
    )
    results = evaluate(
        sae, subject, store, ("reconstruction", "density"), config=config
    )
    acts_std = planted.heldout_rows(store)
    code_stl, recon_std = planted.encode(params, acts_std, kind=kind)
    _, _, is_row_st = planted.find_positions(store)
    x, x_hat = acts_std[is_row_st], recon_std[is_row_st]
    normed, shift, scale = oracle.normalize(kind, x)
    error_b = ((x_hat - x) ** 2).sum(1)
    fvu = []
    for i in range(0, len(acts_std), per_batch):
        batch = np.zeros(is_row_st.shape, bool)
        batch[i : i + per_batch] = is_row_st[i : i + per_batch]
        part = acts_std[batch]
        if len(part) > 1:
            variation = ((part - part.mean(0)) ** 2).sum()
            fvu.append(((recon_std[batch] - part) ** 2).sum() / variation)
    counts_l = (code_stl[is_row_st] > 0).sum(0)
    mean = normed.mean(0)
    centred_hat = (x_hat - shift) / scale - mean
    want = {
        "nmse": (((x_hat - shift) / scale - normed) ** 2).sum()
        / ((normed - normed.mean(0)) ** 2).sum(),
        "nmse_raw": error_b.sum() / ((x - x.mean(0)) ** 2).sum(),
        "mse_over_power": (error_b / (x**2).sum(1)).mean(),
        "fvu_batch": np.mean(fvu),
        "cosine": (
            (x * x_hat).sum(1)
            / np.linalg.norm(x, axis=1)
            / np.linalg.norm(x_hat, axis=1)
        ).mean(),
        "explained_variance": np.mean(
            1 - ((x_hat - x) ** 2).sum(0) / ((x - x.mean(0)) ** 2).sum(0)
        ),
        "shrinkage": (centred_hat**2).sum() / (centred_hat * (normed - mean)).sum(),
        "l0": counts_l.sum() / len(x),
        "l0_cut": 0,
        "n_dead": (counts_l == 0).sum(),
        "dead_fraction": (counts_l == 0).mean(),
    }
    values = _values(results)
    assert values.keys() == want.keys()
    for name, value in want.items():
        assert values[name] == pytest.approx(value, rel=2e-5), name
    assert want["n_dead"] >= 2
    histogram = results["metrics"]["density"]["densities"]
    counted, _ = np.histogram(
        np.log10(counts_l[counts_l > 0] / len(x)), histogram["edges"]
    )
    assert histogram["counts"] == counted.tolist()
    assert sum(counted) == L - want["n_dead"]
    assert results["rows"] == len(x) == store.rows("heldout")
    measured = results["metrics"]["reconstruction"]
    assert measured["nmse"]["samples"] == measured["l0"]["samples"] == len(x)
    assert measured["fvu_batch"]["samples"] == len(fvu)
    l0_s = np.sum(code_stl > 0, axis=-1, where=is_row_st[..., None]).sum(axis=1)
    rows_s = is_row_st.sum(axis=1)
    ci95 = ratio_figure(l0_s.astype(float), rows_s.astype(float), 0, "")["ci95"]
    assert measured["l0"]["ci95"] == pytest.approx(ci95)


def test_a_mean_far_from_zero_cancels_nothing(subject, store):
    rng = np.random.default_rng(0)
    # At 4096 bfloat16 holds multiples of 32 exactly.
    x = 4096.0 + 32 * rng.integers(-3, 4, size=(store.rows("heldout"), D))
    results, x_hat = _reconstruct(subject, store, x)
    want = ((x_hat - x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert _values(results)["nmse_raw"] == pytest.approx(want, rel=1e-4)


def test_rows_of_zeros_and_dimensions_that_do_not_vary_are_left_out(subject, store):
    x = planted.heldout_rows(store).reshape(-1, D)
    x[:, 3] = 0
    x[::5] = 0
    results, x_hat = _reconstruct(subject, store, x)
    error, is_there, varies = (x_hat - x) ** 2, np.arange(len(x)) % 5 > 0, np.arange(D)
    error_b, power_b = error.sum(1)[is_there], (x**2).sum(1)[is_there]
    explained_d = 1 - error.sum(0) / np.maximum(((x - x.mean(0)) ** 2).sum(0), 1e-9)
    for name, values in (
        ("mse_over_power", error_b / power_b),
        ("explained_variance", explained_d[varies != 3]),
    ):
        figure = results["metrics"]["reconstruction"][name]
        assert figure["value"] == pytest.approx(values.mean(), rel=1e-4)
        assert figure["samples"] == len(values)


def _reconstruct(subject, store, x):
    """The metric over these rows in place of the held-out ones, and x̂."""
    first = store.sequences("heldout")[0]

    class Other:
        """The same store with other rows."""

        def __getattr__(self, name):
            return getattr(store, name)

        def read_contexts(self, site, sequences):
            is_row_st = store.find_rows(sequences)[1]
            return x.reshape(-1, T, D)[sequences - first], is_row_st

    params = planted.random_params()
    results = evaluate(
        planted.make_sae(params), subject, Other(), ("reconstruction",), config=SMALL
    )
    return results, planted.encode(params, x)[1]


def test_latents_that_a_code_has_no_room_for_are_counted(subject, store, monkeypatch):
    sae = planted.make_sae(planted.random_params())
    encode = type(sae).encode

    def cut_three(self, acts_bd):
        code = encode(self, acts_bd)
        return dataclasses.replace(code, n_cut=code.n_cut + 3)

    monkeypatch.setattr(type(sae), "encode", cut_three)
    # Batches of another shape than elsewhere here: no earlier trace stands in.
    config = dataclasses.replace(SMALL, batch_rows=3 * T)
    results = evaluate(sae, subject, store, ("reconstruction",), config=config)
    assert _values(results)["l0_cut"] == 3


@pytest.mark.parametrize("which", ["store", "holed"])
def test_averaging_compares_both_weights_over_the_same_rows(subject, which, request):
    store = request.getfixturevalue(which)
    config = dataclasses.replace(SMALL, rows=store.rows("heldout"))
    averaged, last = planted.random_params(), planted.random_params()
    last["b_dec_d"] = last["b_dec_d"] + 0.2
    saes = [planted.make_sae(params) for params in (averaged, last)]
    apart = [
        _values(evaluate(sae, subject, store, ("reconstruction",), config=config))
        for sae in saes
    ]
    values = _values(
        evaluate(saes[0], subject, store, ("averaging",), config=config, raw=saes[1])
    )
    assert values["nmse_raw_average"] == pytest.approx(apart[0]["nmse_raw"])
    assert values["nmse_raw_last"] == pytest.approx(apart[1]["nmse_raw"])
    gain = apart[1]["nmse_raw"] - apart[0]["nmse_raw"]
    assert values["averaging_gain"] == pytest.approx(gain) and abs(gain) > 0.001


@pytest.mark.parametrize("which", ["store", "holed"])
def test_downstream_is_that_of_numpy(subject, which, request):
    store, params = request.getfixturevalue(which), planted.random_params()
    sae = planted.make_sae(params)
    config = dataclasses.replace(SMALL, rows=1)
    results = evaluate(sae, subject, store, ("downstream",), config=config)
    tokens_bt, is_real_bt, _ = planted.find_positions(store)
    is_read_bt = is_real_bt[:, :-1] & is_real_bt[:, 1:]
    acts_btd = planted.rows_of(subject, tokens_bt)
    mean_btd = np.broadcast_to(store.statistics(SITE).mean_d, acts_btd.shape)
    kinds = {
        "clean": acts_btd,
        "sae": planted.encode(params, acts_btd)[1],
        "mean": mean_btd,
        "zero": 0 * acts_btd,
    }
    for name, new_btd in kinds.items():
        kinds[name] = planted.put_at_rows(store, tokens_bt, new_btd, acts_btd)
    log_p = {k: planted.log_predictions(subject, x)[:, :-1] for k, x in kinds.items()}
    ce = {
        k: -np.take_along_axis(p, tokens_bt[:, 1:, None], axis=-1)[is_read_bt].mean()
        for k, p in log_p.items()
    }
    kl = np.exp(log_p["clean"]) * (log_p["clean"] - log_p["sae"])
    want = {
        "ce_clean": ce["clean"],
        "ce_sae": ce["sae"],
        "ce_mean_ablated": ce["mean"],
        "ce_zero_ablated": ce["zero"],
        "delta_ce": ce["sae"] - ce["clean"],
        "kl": kl.sum(-1)[is_read_bt].mean(),
        "recovered_from_mean": (ce["mean"] - ce["sae"]) / (ce["mean"] - ce["clean"]),
        "recovered_from_zero": (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"]),
    }
    values = _values(results)
    assert values.keys() == want.keys()
    for name, value in want.items():
        assert values[name] == pytest.approx(value, rel=1e-4), name
    measured = results["metrics"]["downstream"]
    assert measured["kl"]["samples"] == is_read_bt.sum()
    kl_s, read_s = np.sum(kl.sum(-1), axis=1, where=is_read_bt), is_read_bt.sum(axis=1)
    ci95 = ratio_figure(kl_s, read_s.astype(float), 0, "")["ci95"]
    assert measured["kl"]["ci95"] == pytest.approx(ci95, rel=1e-3)
    by_position = measured["by_position"]
    assert by_position["x"] == list(range(1, T))
    next_bt1 = tokens_bt[:, 1:, None]
    sae_bt, clean_bt = (
        -np.take_along_axis(log_p[kind], next_bt1, axis=-1)[..., 0]
        for kind in ("sae", "clean")
    )
    for name, want_bt in {"kl": kl.sum(-1), "delta_ce": sae_bt - clean_bt}.items():
        got_t = by_position["ys"][name]
        want_t = want_bt.mean(axis=0, where=is_read_bt)
        np.testing.assert_allclose(got_t, want_t, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_positions", [64, 65, 255, 4095])
def test_positions_are_grouped_where_there_are_many(n_positions):
    values_st = np.random.default_rng(0).normal(size=(3, n_positions))
    every_st = np.ones(values_st.shape, bool)
    curve = downstream.group_by_position({"kl": values_st}, every_st)
    x, kl = np.array(curve["x"]), np.array(curve["ys"]["kl"])
    if n_positions == 64:
        assert len(x) == 64
        return
    # A group's mean position says where it ends: groups are runs without a gap.
    edges = [0]
    for centre in x:
        edges.append(round(2 * centre - edges[-1] - 1))
    assert 20 <= len(x) <= 32 and edges[-1] == n_positions
    sizes = np.diff(edges)
    assert sizes[0] == 1 and (np.diff(sizes) >= -1).all()
    for first, last, mean in zip(edges, edges[1:], kl):
        assert mean == pytest.approx(values_st[:, first:last].mean())


@pytest.mark.parametrize("n_positions", [9, 200])
def test_positions_of_which_few_count(n_positions):
    """A group is the mean of what counts in it, at the mean of where that is."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, n_positions - 60 if n_positions > 60 else 8, size=5)
    counts_st = np.arange(n_positions) < lengths[:, None]
    values_st = np.where(counts_st, rng.normal(size=counts_st.shape), 0)
    curve = downstream.group_by_position({"kl": values_st}, counts_st)
    whole = downstream.group_by_position({"kl": values_st}, values_st == values_st)
    first, groups = 0, []
    for centre in whole["x"]:
        last = round(2 * centre - first - 1)
        chosen_st = counts_st[:, first:last]
        if chosen_st.any():
            position = np.nonzero(chosen_st)[1].mean() + first + 1
            groups.append((position, values_st[:, first:last][chosen_st].mean()))
        first = last
    assert len(groups) < len(whole["x"])
    np.testing.assert_allclose(list(zip(curve["x"], curve["ys"]["kl"])), groups)


def test_a_perfect_sae(subject, store):
    sae = planted.make_sae(planted.perfect_params(), k=D)
    values = _values(evaluate(sae, subject, store, config=SMALL))
    assert values["nmse"] == values["nmse_raw"] == values["mse_over_power"] == 0
    assert values["cosine"] == pytest.approx(1, abs=1e-6)
    assert values["kl"] == pytest.approx(0, abs=1e-6)
    assert values["recovered_from_mean"] == pytest.approx(1, abs=1e-6)
    assert values["recovered_from_zero"] == pytest.approx(1, abs=1e-6)
    assert values["n_dead"] == L - 2 * D


def test_an_sae_that_returns_a_constant(subject, store):
    mean_d = store.statistics(SITE).mean_d
    data_mean_d = planted.heldout_rows(store).reshape(-1, D).mean(0)
    at_data_mean = planted.make_sae(planted.constant_params(data_mean_d))
    values = _values(evaluate(at_data_mean, subject, store, config=SMALL))
    assert values["nmse"] == pytest.approx(1, rel=1e-5)
    assert values["l0"] == 0 and values["dead_fraction"] == 1
    at_train_mean = planted.make_sae(planted.constant_params(mean_d))
    values = _values(evaluate(at_train_mean, subject, store, config=SMALL))
    assert values["recovered_from_mean"] == pytest.approx(0, abs=1e-6)
    at_zero = planted.make_sae(planted.constant_params(np.zeros(D)))
    values = _values(evaluate(at_zero, subject, store, config=SMALL))
    assert values["recovered_from_zero"] == pytest.approx(0, abs=1e-6)
    assert values["mse_over_power"] == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("which", ["store", "holed"])
def test_sharded_equals_one_device(subject, which, request):
    store, params, results = request.getfixturevalue(which), planted.random_params(), {}
    config = dataclasses.replace(SMALL, rows=store.rows("heldout"))
    for shape in (None, (2, 4)):
        sae = planted.make_sae(params, kind="center_unit_norm", mesh_shape=shape)
        results[shape] = evaluate(sae, subject, store, config=config)
    one, eight = (_values(results[shape]) for shape in (None, (2, 4)))
    for name, value in one.items():
        assert eight[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    histograms = [r["metrics"]["density"]["densities"] for r in results.values()]
    assert histograms[0] == histograms[1]


def test_only_heldout_rows_are_read(subject, store):
    context = open_context(planted.make_sae(planted.random_params()), subject, store)
    heldout = set(store.sequences("heldout").tolist())
    drawn = {n: set(choose_sequences(context, n).tolist()) for n in (5, 12, 10**9)}
    assert len(drawn[5]) == 5 and drawn[5] < drawn[12] < heldout == drawn[10**9]
    for rows, n_contexts in ((1, 1), (T, 1), (T + 1, 2), (10**9, len(heldout))):
        assert len(choose_row_sequences(context, rows)) == n_contexts
    other = dataclasses.replace(context, seed=1)
    assert set(choose_sequences(other, 5).tolist()) != drawn[5]


def test_as_many_contexts_are_read_as_have_the_rows_asked_for(subject, holed):
    context = open_context(planted.make_sae(planted.random_params()), subject, holed)
    heldout, is_row_st = holed.sequences("heldout"), planted.find_positions(holed)[2]
    rows_of = dict(zip(heldout.tolist(), is_row_st.sum(axis=1).tolist()))
    drawn = np.random.default_rng(context.seed).permutation(heldout).tolist()
    for rows in range(1, holed.rows("heldout") + 1):
        chosen = choose_row_sequences(context, rows).tolist()
        assert chosen == sorted(drawn[: len(chosen)])
        total = sum(rows_of[sequence] for sequence in chosen)
        assert total >= rows > total - rows_of[drawn[len(chosen) - 1]]
    assert choose_row_sequences(context, 10**9).tolist() == heldout.tolist()


def test_results_are_json_and_a_table(subject, store):
    sae = planted.make_sae(planted.random_params())
    results = evaluate(sae, subject, store, config=SMALL)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    table = format_table(results)
    assert max(len(line) for line in table.splitlines()) <= 80
    assert (results["architecture"], results["sparsity"]) == ("topk", {"k": K})
    assert table.startswith(
        f"topk, k {K}\n{L} latents at {SITE} of planted, 336 held-out rows\n"
    )
    assert "fewer rows than the 200,000 wanted" in table
    for name in _values(results):
        assert f"\n  {name} " in table


def test_a_table_names_what_stands_in_for_k(subject, store):
    sae = planted.make_sae(planted.random_params())
    results = evaluate(sae, subject, store, (), config=SMALL) | {
        "architecture": "jumprelu",
        "sparsity": {"sparsity_coefficient": 0.004, "target_l0": 20.0},
    }
    first = format_table(results).splitlines()[0]
    assert first == "jumprelu, sparsity_coefficient 0.004, target_l0 20"


def test_an_error_ends_the_progress_line(subject, store, monkeypatch):
    terminal, device_get = io.StringIO(), jax.device_get
    terminal.isatty = lambda: True

    def fail(arrays):
        if "measure:" in terminal.getvalue():
            raise KeyboardInterrupt
        return device_get(arrays)

    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(jax, "device_get", fail)
    sae = planted.make_sae(planted.random_params())
    with pytest.raises(KeyboardInterrupt) as stopped:
        evaluate(sae, subject, store, config=SMALL, progress=True)
    # While the error's frames live, as when it is told.
    assert stopped.tb and terminal.getvalue().endswith("\n")


def test_intervals_cover_95_percent():
    """Contexts whose rows are all alike: an interval over rows would cover far less."""
    rng = np.random.default_rng(0)
    covered = {"mean": 0, "ratio": 0}
    for _ in range(1000):
        values_st = np.repeat(rng.normal(3, 1, size=(60, 1)), 20, axis=1)
        figure = mean_figure(values_st, values_st != np.inf, "rows")
        covered["mean"] += abs(figure["value"] - 3) <= figure["ci95"]
        below_s = rng.uniform(1, 3, size=60)
        figure = ratio_figure(below_s * rng.normal(0.5, 0.1, 60), below_s, 60, "rows")
        covered["ratio"] += abs(figure["value"] - 0.5) <= figure["ci95"]
    assert all(920 < n < 970 for n in covered.values()), covered


def test_an_interval_is_that_of_the_mean():
    values_n = np.array([1.0, 2.0, 4.0, 9.0])
    want = 3.182446 * values_n.std(ddof=1) / np.sqrt(4)  # Student's t, 3 degrees
    figure = average_figure(values_n, "tasks")
    assert (figure["value"], figure["ci95"]) == (4, pytest.approx(want))
    assert average_figure([1.0], "tasks")["ci95"] is None


def test_a_plot_that_is_not_finite_is_refused(subject, store, monkeypatch):
    monkeypatch.setattr(
        METRICS["density"], "compute", lambda *_: {"densities": {"edges": [0, np.inf]}}
    )
    sae = planted.make_sae(planted.random_params())
    with pytest.raises(ValueError, match="density.densities.edges = inf is not finite"):
        evaluate(sae, subject, store, ("density",), config=SMALL)


def test_refusals(subject, store, tmp_path):
    sae = planted.make_sae(planted.random_params())

    def refuses(match, sae=sae, subject=subject, store=store, **rest):
        with pytest.raises(ValueError, match=match) as error:
            evaluate(sae, subject, store, config=SMALL, **rest)
        assert "\n" not in str(error.value)

    refuses("unknown metric 'densty': did you mean 'density'", metrics=("densty",))
    other = dataclasses.replace(subject, identity="1" * 64, name="other")
    refuses("harvested from subject planted .0000.*not from other .1111", subject=other)
    refuses("subject torch does not run in JAX", subject=SimpleNamespace(name="torch"))
    empty = planted.write_store(tmp_path / "empty", subject, heldout=False)
    refuses("has no held-out rows", store=empty)
    refuses("on a mesh .*not", mesh=make_mesh(MeshConfig(2, 4)))
    broken = planted.random_params()
    broken["b_dec_d"][0] = np.nan
    refuses("reconstruction.nmse.value = nan", sae=planted.make_sae(broken))

    class Narrow:
        site, d_model = SITE, D - 1

    refuses(f"rows of width {D}, the SAE reads rows of width {D - 1}", sae=Narrow())
    with pytest.raises(ValueError, match="rows = 0: must be at least 1"):
        EvaluateConfig(rows=0)


def test_one_compilation_for_each_program(subject, store, monkeypatch):
    """Padding keeps one shape, so the last batch compiles nothing."""
    sae, traced = planted.make_sae(planted.random_params()), []
    decode = type(sae).decode

    def counting(self, code):
        traced.append(code.values.shape)
        return decode(self, code)

    monkeypatch.setattr(type(sae), "decode", counting)
    config = dataclasses.replace(SMALL, batch_rows=5 * T, batch_sequences=5)
    evaluate(sae, subject, store, config=config)
    assert traced == [(5 * T, K), (5, T, K)]  # the pass over rows, and the splice
