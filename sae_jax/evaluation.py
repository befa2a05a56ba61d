"""From an SAE on disk to evaluation.json and report.html."""

import hashlib
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from sae_jax.checkpoint import FOLDER
from sae_jax.evals import EvaluateConfig, evaluate
from sae_jax.mesh import make_mesh
from sae_jax.mirror import Mirror
from sae_jax.report import write_report
from sae_jax.run import (
    CONFIG_FILE,
    METRICS_FILE,
    load,
    locate,
    name_file,
    read_config,
    read_config_text,
)
from sae_jax.store import Folder, Store, open_store
from sae_jax.subjects import Subject, load_subject
from sae_jax.viewer import top_contexts
from sae_jax.writers import read_json_lines

DEFAULT_SUBJECT = "default"
EVALUATION_FILE = "evaluation.json"
REPORT_FILE = "report.html"


def evaluate_run(
    path: str | Path,
    store: str | Path | None = None,
    subject: str | None = None,
    weights: str = "ema",
    suite: str = "core",
    config: EvaluateConfig | None = None,
    mesh: Mesh | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    fresh: bool = False,
    report: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluates a run; leaves evaluation.json and report.html.

    An evaluation that was stopped goes on with the metrics it had not done.

    Args:
        path: the run folder, or one of its checkpoints.
        store: the activation store; the one the run was trained on when not given.
        subject: the subject model; the one the store was harvested from.
        weights: `ema` or `raw`.
        suite: a name of `sae_jax.evals.SUITES`.
        config: how much to evaluate on.
        mesh: where the SAE is loaded; when not given, its latents are spread over as
            many devices as divide them.
        seed: draws the held-out contexts and the latents to show.
        out: the folder of the results; when not given, the run folder, and for a
            checkpoint `evaluations/<step>` in it.
        fresh: whether to measure again what evaluation.json has.
        report: whether to write report.html.
        progress: whether to show progress lines.

    Returns:
        The results, as `sae_jax.evals.evaluate` gives them.
    """
    workdir, step = locate(path)
    run = read_config(workdir)
    opened = open_store(store) if store else _open_store_of(workdir, run.data.store)
    _check_heldout(run.data.heldout_every, opened)
    model = _load_subject(subject, opened)
    mesh = mesh or make_mesh(n_latents=run.sae.n_latents)
    checkpoint = workdir / FOLDER / str(step)
    sae = load(checkpoint, mesh, weights)
    config_text = read_config_text(workdir)
    metrics = Mirror(Folder(workdir))
    metrics.fetch(METRICS_FILE)
    with Mirror(Folder(find_out(path, out))) as left:
        left.path.mkdir(parents=True, exist_ok=True)
        if fresh:
            (left.path / EVALUATION_FILE).unlink(missing_ok=True)
        else:
            left.fetch(EVALUATION_FILE)
        results = evaluate(
            sae,
            model,
            opened,
            suite,
            seed=seed,
            config=config,
            progress=progress,
            raw=load(checkpoint, mesh, "raw") if weights == "ema" else None,
            about={
                "run": hashlib.sha256(config_text.encode()).hexdigest()[:16],
                "weights": weights,
                "step": step,
                "n_steps": run.n_steps,
            },
            file=left.path / EVALUATION_FILE,
        )
        if report:
            write_report(
                left.path / REPORT_FILE,
                results,
                top_contexts(
                    sae, model, opened, seed=seed, config=config, progress=progress
                ),
                read_json_lines(metrics.path / METRICS_FILE),
                config_text,
            )
    return results


def find_out(path: str | Path, out: str | Path | None = None) -> Path:
    """The folder of the results: `out`, or what `path` gives when that is None.

    As in `sae_jax.run.locate`, the Path of a bucket is for `Folder` alone.
    """
    if out is not None:
        return Path(out)
    workdir, step = locate(path)
    is_run = Path(path) == workdir
    return workdir if is_run else workdir / "evaluations" / str(step)


def _open_store_of(run_dir: Path, store: str) -> Store:
    """The store that the run was trained on; its path may be relative."""
    if not store or "," in store:
        trained = "on several stores" if store else "without a store"
        raise ValueError(
            f"{Folder(run_dir)} was trained {trained}: name one of its site and "
            "subject with --store"
        )
    try:
        return open_store(store)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no store at {store!r}, which {name_file(run_dir, CONFIG_FILE)} names: "
            "give its folder with --store, or start where the run was trained"
        ) from error


def _check_heldout(trained_without: int | None, store: Store) -> None:
    """ValueError if the store holds out documents that the run was trained on."""
    heldout_every = store.manifest.heldout_every
    if trained_without and heldout_every % trained_without:
        raise ValueError(
            f"{store.path} holds out one document in {heldout_every}, and the run was "
            f"trained on all but one in {trained_without}, so on some of these: "
            f"harvest with --heldout_every={trained_without}"
        )


def _load_subject(subject: str | None, store: Store) -> Subject:
    """The subject asked for, or the store's own where that is in the package."""
    own = store.manifest.subject["name"]
    if subject is None and own != DEFAULT_SUBJECT:
        raise ValueError(
            f"{store.path} was harvested from subject {own!r}, which is not in the "
            "package: name its folder with --subject"
        )
    return load_subject(subject or DEFAULT_SUBJECT)
