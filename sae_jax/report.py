"""The report of a run: one HTML file that opens from disk and needs no network.

It holds the table of figures, the curves of training, the histogram of firing
densities, and for a sample of latents the text they fire on. Plots are inline SVG that
takes its colours from the page, so light and dark both read well.
"""

import importlib.resources
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from jax.sharding import Mesh
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator

from sae_jax.config import CHOOSE_K
from sae_jax.evals import EvaluateConfig, evaluate, format_name, format_value
from sae_jax.files import write_whole
from sae_jax.mesh import make_mesh
from sae_jax.run import CONFIG_FILE, METRICS_FILE, load, read_config, read_step
from sae_jax.store import Store, open_store
from sae_jax.subjects import Subject, load_subject
from sae_jax.viewer import LatentView, top_contexts
from sae_jax.writers import read_json_lines

DEFAULT_SUBJECT = "default"
EVALUATION_FILE = "evaluation.json"
REPORT_FILE = "report.html"

# Figures whose values open the report, and what every figure means.
_HEADLINES = ("recovered_from_mean", "nmse_raw", "l0", "dead_fraction")
_MEANINGS = {
    "nmse": "squared error over that of the mean row, in the SAE's space",
    "nmse_raw": "the same in activation space",
    "mse_over_power": "squared error over squared norm, mean over rows",
    "fvu_batch": "squared error over that of each batch's mean row",
    "cosine": "between row and reconstruction",
    "shrinkage": "length of reconstructions: below 1 where they are too short",
    "l0": "latents above 0 on a row",
    "l0_cut": "further ones, which sae.max_active leaves out of a code",
    "n_dead": "latents that fire on none of the rows read",
    "dead_fraction": "their share of all latents",
    "ce_clean": "cross-entropy of the subject, nats a token",
    "ce_sae": "with the reconstruction in place of the rows",
    "ce_mean_ablated": "with the mean row in their place",
    "ce_zero_ablated": "with zeros in their place",
    "delta_ce": "ce_sae less ce_clean",
    "kl": "from clean predictions to those on the reconstruction, nats",
    "recovered_from_mean": "share of the loss of mean ablation that the SAE recovers",
    "recovered_from_zero": "the same against zero ablation, which flatters",
}
_AUXK_MEANING = (
    "the share of the residual that the dead latents leave unexplained: 1 is all of "
    "it, and 0 says that none is dead"
)
# What `aux_loss` is while training; other architectures have none.
_AUX_LOSS_MEANINGS = dict.fromkeys(CHOOSE_K, _AUXK_MEANING) | {
    "gated": "the error of a reconstruction from the gate's values, not the magnitudes"
}
# Scalars of metrics.jsonl that are drawn over rows, and whether on a log scale.
_CURVES = {"nmse": True, "aux_loss": False, "n_dead": False, "l0": False}

# Colours that no plot uses, replaced in the SVG by those of the page.
_PAGE_COLOURS = {"#010203": "currentColor", "#040506": "var(--accent)"}
_INK, _ACCENT = _PAGE_COLOURS
_PLOT_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sae_jax",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def evaluate_run(
    run_dir: str | Path,
    store: str | Path | None = None,
    subject: str | None = None,
    weights: str = "ema",
    config: EvaluateConfig | None = None,
    mesh: Mesh | None = None,
    seed: int = 0,
    report: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluates a run; leaves evaluation.json and report.html in its folder.

    Args:
        run_dir: the run folder.
        store: the activation store; the one the run was trained on when not given.
        subject: the subject model; the one the store was harvested from.
        weights: `ema` or `raw`.
        config: how much to evaluate on.
        mesh: where the SAE is loaded; when not given, its latents are spread over as
            many devices as divide them.
        seed: draws the held-out contexts and the latents to show.
        report: whether to write report.html.
        progress: whether to show progress lines.

    Returns:
        The results, as `sae_jax.evals.evaluate` gives them.
    """
    run_dir = Path(run_dir)
    run = read_config(run_dir)
    opened = open_store(store) if store else _open_store_of(run_dir, run.data.store)
    model = _load_subject(subject, opened)
    mesh = mesh or make_mesh(n_latents=run.sae.n_latents)
    sae = load(run_dir, mesh, weights)
    results = evaluate(sae, model, opened, seed=seed, config=config, progress=progress)
    results |= {"weights": weights, "step": read_step(run_dir), "n_steps": run.n_steps}
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    write_whole(run_dir / EVALUATION_FILE, text)
    if report:
        views = top_contexts(
            sae, model, opened, seed=seed, config=config, progress=progress
        )
        write_report(run_dir, results, views, read_json_lines(run_dir / METRICS_FILE))
    return results


def write_report(
    run_dir: str | Path,
    results: Mapping[str, Any],
    views: Sequence[LatentView],
    metrics_rows: Sequence[Mapping[str, float]],
) -> Path:
    """Writes report.html to the run folder; returns its path."""
    run_dir = Path(run_dir)
    figures = {
        name: figure
        for metric in results["metrics"].values()
        for name, figure in metric.items()
        if "value" in figure
    }
    density = results["metrics"].get("density")
    page = _load_template().render(
        results=results,
        name=format_name(results),
        headlines={name: figures[name] for name in _HEADLINES if name in figures},
        meanings=_MEANINGS,
        aux_loss_meaning=_AUX_LOSS_MEANINGS.get(results["architecture"]),
        curves={
            name: _draw_curve(name, metrics_rows, is_log)
            for name, is_log in _CURVES.items()
            if any(name in row for row in metrics_rows)
        },
        histogram=density and _draw_histogram(**density["histogram"]),
        views=views,
        config=(run_dir / CONFIG_FILE).read_text(encoding="utf-8"),
    )
    write_whole(run_dir / REPORT_FILE, page)
    return run_dir / REPORT_FILE


def _open_store_of(run_dir: Path, store: str) -> Store:
    """The store that the run was trained on; its path may be relative."""
    try:
        return open_store(store)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no store at {store!r}, which {run_dir / CONFIG_FILE} names: give its "
            "folder with --store, or start where the run was trained"
        ) from error


def _load_subject(subject: str | None, store: Store) -> Subject:
    """The subject asked for, or the store's own where that is in the package."""
    own = store.manifest.subject["name"]
    if subject is None and own != DEFAULT_SUBJECT:
        raise ValueError(
            f"{store.path} was harvested from subject {own!r}, which is not in the "
            "package: name its folder with --subject"
        )
    return load_subject(subject or DEFAULT_SUBJECT)


def _load_template() -> jinja2.Template:
    file = importlib.resources.files("sae_jax").joinpath("report.html")
    source = file.read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["zip"] = zip
    environment.filters["value"] = format_value
    environment.filters["visible"] = _show_whitespace
    return environment.from_string(source)


def _show_whitespace(token: str) -> str:
    """A token on one line: line ends become a sign, tabs an arrow."""
    return token.replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥")


def _draw_curve(
    name: str, metrics_rows: Sequence[Mapping[str, float]], is_log: bool
) -> Markup:
    points = [(row["rows"], row[name]) for row in metrics_rows if name in row]

    def draw(axes: Axes) -> None:
        # Not clipped: a line at zero lies on the axis.
        axes.plot(
            *zip(*points, strict=True), color=_ACCENT, linewidth=1.5, clip_on=False
        )
        axes.set_xlabel("rows")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if is_log and min(value for _, value in points) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_minor_formatter("{x:g}")
        else:
            axes.set_ylim(0, 1.1 * max(value for _, value in points) or 1)

    return _draw(name, draw)


def _draw_histogram(log10_edges: Sequence[float], counts: Sequence[int]) -> Markup:
    def draw(axes: Axes) -> None:
        axes.stairs(counts, log10_edges, fill=True, color=_ACCENT)
        axes.set_xlabel("log10 of the share of rows that a latent fires on")
        axes.set_ylabel("latents")

    return _draw("firing density", draw)


def _draw(title: str, draw: Any) -> Markup:
    """One plot as inline SVG, sized by the page."""
    with matplotlib.rc_context(_PLOT_STYLE):
        figure = Figure(figsize=(4.2, 2.4), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        draw(axes)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # Inside HTML an SVG needs no namespaces, and its size comes from the view box.
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for stand_in, colour in _PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    # The ids of one plot must not be those of another.
    prefix = title.replace(" ", "-") + "-"
    return Markup(re.sub(r'( id="|href="#|url\(#)', rf"\1{prefix}", svg))
