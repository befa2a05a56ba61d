"""The report: whole in one file, escaped, and true to the results."""

import json
import re
from html.parser import HTMLParser

import planted
import pytest
from planted import SITE, K, L, T

from sae_jax import plots, report
from sae_jax.config import to_json
from sae_jax.evals import MEANINGS, EvaluateConfig, evaluate, format_value
from sae_jax.evals.figures import make_curve
from sae_jax.viewer import LatentView, TopContext, top_contexts
from synthetic import make_config

SMALL = EvaluateConfig(rows=336, batch_rows=4 * T, sequences=8, batch_sequences=4)
METRICS_ROWS = [
    {"rows": 10.0 * i, "nmse": 1 / i, "aux_loss": 0.0, "n_dead": 0, "l0": 3.0}
    for i in range(1, 9)
]
VOID = {"meta", "path", "use", "rect", "circle"}


class _Page(HTMLParser):
    """Checks that tags nest, and gathers what the tests ask about."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with its store, subject and SAE."""
    folder = tmp_path_factory.mktemp("report")
    subject = planted.make_subject()
    store = planted.write_store(folder / "store", subject)
    run_dir = folder / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text(to_json(make_config(folder / "store")))
    lines = [json.dumps(row) + "\n" for row in METRICS_ROWS]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    return run_dir, planted.make_sae(planted.random_params()), subject, store


@pytest.fixture(scope="module")
def page(run):
    run_dir, sae, subject, store = run
    results = evaluate(sae, subject, store, config=SMALL)
    views = top_contexts(sae, subject, store, 5, config=SMALL)
    path = run_dir / "report.html"
    config = (run_dir / "config.json").read_text()
    assert report.write_report(path, results, views, METRICS_ROWS, config) == path
    return path.read_text(encoding="utf-8"), results, views


def test_the_page_needs_nothing_from_outside(page):
    text, _, _ = page
    parsed = _Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    assert not {"script", "link", "img", "iframe"} & set(parsed.tags)
    names = {name for name, _ in parsed.attributes}
    assert not any(name == "src" or name.startswith("on") for name in names)
    assert all(
        value.startswith("#") for name, value in parsed.attributes if "href" in name
    )
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0
    used = {v[1:] for n, v in parsed.attributes if "href" in n}
    used |= set(re.findall(r"url\(#([^)]*)\)", text))
    assert used <= set(ids)


def test_text_is_escaped_and_whitespace_is_seen(page):
    text, _, views = page
    shown = [token for view in views for c in view.contexts for token in c.tokens]
    assert {"<script>", "\n", "\t", "&", '"'} <= set(shown)
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert "held<out>" not in text and "held&lt;out&gt;.txt" in text
    marks = re.findall(r"<mark[^>]*>(.*?)</mark>", text)
    assert "↵" in marks and "⇥" in marks


def test_every_figure_latent_and_plot_is_there(page):
    text, results, views = page
    parsed = _Page(text)
    for metric in results["metrics"].values():
        for name, figure in metric.items():
            if "value" in figure:
                assert name in parsed.text
                assert format_value(figure["value"]) in parsed.text
    assert "fewer rows than the 200,000" in re.sub(r"\s+", " ", parsed.text)
    # In the title and in the heading.
    assert parsed.text.count(f"topk, k {K}: {L} latents at {SITE}") == 2
    for view in views:
        assert f"latent {view.latent}" in parsed.text
    assert parsed.tags.count("svg") == 7  # four curves, three plots
    assert '"dead_after_rows"' in parsed.text


def test_shading_follows_the_activation(page, tmp_path):
    _, results, _ = page
    (tmp_path / "config.json").write_text("{}")
    context = TopContext("a.txt", 0, 1, 1, ("x", "y", "z"), (0.5, 2.0, 0.0))
    view = LatentView(3, 0.01, (context,))
    path = report.write_report(tmp_path / "report.html", results, [view], [])
    text = path.read_text(encoding="utf-8")
    assert '<mark style="--a:0.33" title="0.5">x</mark>' in text
    assert '<mark class="peak" style="--a:1.00" title="2">y</mark>z</code>' in text
    assert "fires on 1 % of rows, at most 2" in re.sub(r"\s+", " ", text)


def test_the_same_input_gives_the_same_page(run, page):
    run_dir, (text, results, views) = run[0], page
    config = (run_dir / "config.json").read_text()
    path = report.write_report(
        run_dir / "again.html", results, views, METRICS_ROWS, config
    )
    assert path.read_text(encoding="utf-8") == text


def test_an_axis_that_has_a_zero_is_not_logarithmic():
    x, ys = [0, 1, 10], {"a": [1, 2, 3]}
    log, linear = (
        plots.draw("plot", make_curve(x, ys, "x", "y", x_log=is_log))
        for is_log in (True, False)
    )
    assert log == linear


def test_a_run_that_has_not_trained_has_no_curves(run, page, tmp_path):
    _, results, _ = page
    (tmp_path / "config.json").write_text("{}")
    results = results | {"metrics": {}}
    text = report.write_report(tmp_path / "page", results).read_text(encoding="utf-8")
    assert "<svg" not in text and "What latents fire on" not in text


def test_every_figure_says_what_it_means(page):
    _, results, _ = page
    shown = {
        name
        for figures in results["metrics"].values()
        for name, figure in figures.items()
        if "value" in figure
    }
    assert {"shrinkage", "l0_cut"} < shown < set(MEANINGS)


@pytest.mark.parametrize(
    "architecture, meaning",
    [
        ("topk", "aux_loss is the share of the residual that the dead"),
        ("batch_topk", "aux_loss is the share of the residual that the dead"),
        ("gated", "aux_loss is the error of a reconstruction from the gate"),
        ("relu", None),
    ],
)
def test_aux_loss_is_told_as_its_run_has_it(page, tmp_path, architecture, meaning):
    _, results, _ = page
    (tmp_path / "config.json").write_text("{}")
    rows = METRICS_ROWS
    if meaning is None:
        rows = [{k: v for k, v in row.items() if k != "aux_loss"} for row in rows]
    results = results | {"architecture": architecture, "metrics": {}}
    path = report.write_report(tmp_path / "page", results, [], rows)
    text = path.read_text(encoding="utf-8")
    told = " ".join(_Page(text).text.split())
    assert "n_dead counts" in told
    assert meaning in told if meaning else "aux_loss" not in told
