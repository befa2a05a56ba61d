"""Loss as equivalent compute: planted laws, bounds, intervals, refusals."""

import dataclasses

import numpy as np
import planted
import pytest

from sae_jax.evals import EvaluateConfig, equivalent_compute, evaluate
from sae_jax.evals.context import open_context
from sae_jax.evals.downstream import Nats, measure_nats
from sae_jax.evals.family import ComputeLaw, fit_law, read_family

SMALL = EvaluateConfig(sequences=21, batch_sequences=4)


@pytest.fixture(scope="module")
def subject():
    return planted.make_subject()


@pytest.fixture(scope="module")
def store(subject, tmp_path_factory):
    return planted.write_store(tmp_path_factory.mktemp("family") / "store", subject)


@pytest.fixture(scope="module")
def context(subject, store):
    """One whose losses are measured once for all tests here."""
    sae = planted.make_sae(planted.random_params())
    context = open_context(sae, subject, store)
    nats = measure_nats(context, SMALL)
    assert nats.mean("sae") > nats.mean("clean") + 0.2
    return context


def _write(path, law, computes):
    lines = [f"{compute:.17g},{law.loss_of(compute):.17g}" for compute in computes]
    path.write_text("\n".join(["compute,loss", *lines]) + "\n")
    return str(path)


def _law_through(context, share, exponent=0.3, floor=None):
    """A law by which ce_clean takes 1000, and ce_sae this share of it."""
    nats = measure_nats(context, SMALL)
    ce_sae, ce_clean = nats.mean("sae"), nats.mean("clean")
    # (ce_sae - E) = share^-b (ce_clean - E)
    ratio = share**-exponent
    floor = (ratio * ce_clean - ce_sae) / (ratio - 1)
    assert 0 < floor < ce_clean
    return ComputeLaw(floor, (ce_clean - floor) * 1000**exponent, exponent)


def _compute(context, path):
    measured = equivalent_compute.compute(
        context, dataclasses.replace(SMALL, family=str(path))
    )
    values = {name: part["value"] for name, part in measured.items() if "value" in part}
    assert all(np.isfinite(list(values.values())))
    assert values.keys() <= equivalent_compute.MEANINGS.keys()
    return measured, values


@pytest.mark.parametrize("unit", [1.0, 1e22])
@pytest.mark.parametrize(
    ("floor", "scale", "exponent"),
    [(1.7, 40.0, 0.3), (0.0, 12.0, 0.05), (0.5, 3.0, 1.5)],
)
def test_a_planted_law_is_found_and_inverted(floor, scale, exponent, unit):
    law = ComputeLaw(floor, scale * unit**exponent, exponent)
    computes_n = unit * np.array([1e2, 3e2, 1e3, 5e3, 2e4])
    found = fit_law(computes_n, law.loss_of(computes_n))
    got = found.floor, found.scale, found.exponent
    want = law.floor, law.scale, law.exponent
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    for compute in (computes_n[0], 777 * unit, computes_n[-1]):
        loss = law.loss_of(compute)
        assert law.compute_of(loss) == pytest.approx(compute, rel=1e-9)
        assert found.compute_of(loss) == pytest.approx(compute, rel=1e-6)
    assert law.compute_of(floor) == law.compute_of(floor - 0.1) == np.inf


def test_no_law_is_better_than_the_one_found():
    """Among laws on a fine grid, of losses that follow none."""
    computes_n = np.geomspace(1, 1e3, 7)
    noise_n = np.random.default_rng(0).normal(0, 0.02, 7)
    losses_n = (1.2 + 3 * computes_n**-0.4) * np.exp(noise_n)

    def error(floor, scale, exponent):
        law = ComputeLaw(floor, scale, exponent)
        return np.sum((law.loss_of(computes_n) / losses_n - 1) ** 2)

    law = fit_law(computes_n, losses_n)
    least = error(*dataclasses.astuple(law))
    grid = np.linspace(0.9, 1.1, 21)
    tried = [
        error(law.floor * f, law.scale * s, law.exponent * e)
        for f in grid
        for s in grid
        for e in grid
    ]
    assert least <= min(tried) and fit_law(computes_n, losses_n) == law
    # Losses that no floor explains: the law keeps to E >= 0.
    straight_n = 5 - 0.5 * np.log(computes_n)
    assert fit_law(computes_n, straight_n).floor == 0


def test_the_share_is_the_planted_one(context, tmp_path):
    law = _law_through(context, 0.1)
    measured, values = _compute(
        context, _write(tmp_path / "f.csv", law, np.geomspace(10, 2000, 6))
    )
    assert values["equivalent_compute"] == pytest.approx(100, rel=1e-6)
    assert values["equivalent_compute_share"] == pytest.approx(0.1, rel=1e-6)
    assert values["family_floor"] == pytest.approx(law.floor, rel=1e-6)
    assert values["family_exponent"] == pytest.approx(0.3, rel=1e-6)
    assert values["family_fit_error"] < 1e-9
    assert (values["family_points"], values["family_extrapolation"]) == (6, 1)
    assert len(measured["family"]["rows"]) == 6
    points = measured["loss_by_compute"]["points"]
    assert np.array(points["law"])[:, 1] == pytest.approx(
        law.loss_of(np.array(points["law"])[:, 0]), rel=1e-6
    )
    nats = measure_nats(context, SMALL)
    (at_sae,), (at_clean,) = points["with the SAE"], points["subject"]
    assert at_sae == pytest.approx([100, nats.mean("sae")], rel=1e-6)
    assert at_clean == pytest.approx([1000, nats.mean("clean")], rel=1e-6)


@pytest.mark.parametrize("shortest", [15, 2])
def test_intervals_are_those_of_resampled_contexts(context, tmp_path, shortest):
    """Of losses that vary little, so that the law is straight over their interval."""
    rng = np.random.default_rng(0)
    clean_st = 4 + 0.1 * rng.normal(size=(40, 1)) + 0.1 * rng.normal(size=(40, 15))
    sae_st = clean_st + 0.5 + 0.03 * rng.normal(size=(40, 1))
    counts_st = np.arange(15) < rng.integers(shortest, 16, size=(40, 1))
    by_kind = {"clean": clean_st * counts_st, "sae": sae_st * counts_st}
    (key,) = context.measured
    steady = {key: Nats(by_kind, counts_st)}
    context = dataclasses.replace(context, measured=steady)
    law = _law_through(context, 0.1)
    path = _write(tmp_path / "f.csv", law, np.geomspace(10, 2000, 6))
    measured, _ = _compute(context, path)
    drawn = []
    for _ in range(4000):
        chosen = rng.integers(40, size=40)
        at_sae, at_clean = (
            law.compute_of(values_st[chosen].mean(where=counts_st[chosen]))
            for values_st in (sae_st, clean_st)
        )
        drawn.append((at_sae, at_sae / at_clean))
    want = 1.96 * np.log10(drawn).std(axis=0)
    for name, spread in zip(("equivalent_compute", "equivalent_compute_share"), want):
        figure = measured[f"log10_{name}"]
        assert figure["value"] == pytest.approx(np.log10(measured[name]["value"]))
        assert figure["ci95"] == pytest.approx(spread, rel=0.1)
        assert figure["samples"] == counts_st.sum()


def test_beyond_the_family_there_are_bounds(context, tmp_path):
    law = _law_through(context, 0.1)

    def compute(first, last):
        path = _write(tmp_path / "f.csv", law, np.geomspace(first, last, 4))
        return _compute(context, path)[1]

    # The smallest model is better than ce_sae, which is at 100.
    values = compute(200, 5000)
    assert not {"equivalent_compute", "equivalent_compute_share"} & values.keys()
    assert values["equivalent_compute_at_most"] == 200
    assert values["equivalent_share_at_most"] == pytest.approx(0.2, rel=1e-6)
    # It is better than ce_clean too, at which the law was not fitted.
    values = compute(1500, 5000)
    assert values["equivalent_compute_at_most"] == 1500
    assert "equivalent_share_at_most" not in values
    # The largest model is worse than ce_clean, which is at 1000.
    values = compute(10, 250)
    assert values["equivalent_compute_share"] == pytest.approx(0.1, rel=1e-4)
    assert values["family_extrapolation"] == pytest.approx(4, rel=1e-4)
    # No model of the family comes down to ce_sae, whatever its compute.
    ce_sae = measure_nats(context, SMALL).mean("sae")
    above = ComputeLaw(ce_sae + 0.1, 3.0, 0.5)
    values = _compute(context, _write(tmp_path / "f.csv", above, [1, 10, 99]))[1]
    assert values["equivalent_compute_at_least"] == 99
    assert not {"equivalent_compute", "equivalent_compute_share"} & values.keys()
    assert values["family_extrapolation"] == 1


def test_without_a_family_there_is_nothing_and_with_one_nothing_is_run_twice(
    subject, store, tmp_path, context
):
    sae, metrics = context.sae, ("downstream", "equivalent_compute")
    results = evaluate(sae, subject, store, metrics, config=SMALL)
    assert results["metrics"]["equivalent_compute"] == {}
    law = _law_through(context, 0.1)
    path = _write(tmp_path / "f.csv", law, [10, 100, 1000])
    ready = dataclasses.replace(context, subject=None, sae=None)
    assert "equivalent_compute_share" in _compute(ready, path)[1]


def test_a_family_in_any_order_with_names_and_blank_lines(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text(
        "\ufeffname, loss ,compute\nbig,2.5,1e3\n\n,3.5,10\nb,3.1,1e2\nc,2.9,100\n",
        encoding="utf-8",
    )
    family = read_family(path)
    assert family.names == ["line 4", "b", "c", "big"]
    assert family.computes_n.tolist() == [10, 100, 100, 1000]
    assert family.losses_n.tolist() == [3.5, 3.1, 2.9, 2.5]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: no column 'compute'"),
        ("compute,los\n1,2\n", "line 1: no column 'loss'"),
        ("compute,loss\n1,3\n2\n", "line 3: 1 fields, the header has 2"),
        ("compute,loss\n1,3\n2,x\n", "line 3: loss is 'x': give a number above 0"),
        ("compute,loss\n1,3\n\n-2,2\n", "line 4: compute is '-2'"),
        ("compute,loss\n1,nan\n", "line 2: loss is 'nan'"),
        ("compute,loss\n1,3\n2,2\n2,2.1\n", "models of 2 different computes: .* 3 or"),
        ("compute,loss\n1,3\n4,2\n2,2\n", "line 3: loss 2 at compute 4 is not below 2"),
    ],
)
def test_what_is_no_family_is_refused(tmp_path, text, words):
    path = tmp_path / "family.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        read_family(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no file '.*other.csv': family names"):
        read_family(tmp_path / "other.csv")
