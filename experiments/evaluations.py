"""The whole evaluation over sizes and sparsities, beside four baselines.

    sae-jax harvest --site=resid_post.3 --max_rows=1100000 --out=store/
    python experiments/evaluations.py --store=store/ --out=evaluations/

Nine TopK SAEs of 512, 2,048 and 8,192 latents at K = 8, 32, 128 have the suite `core`,
those of K = 32 and the baselines `paper`. What they measured is in docs/evaluation.md
(jax 0.10.2, CPU). Cost: training took 4 minutes at 2,048 latents and 8 to 14 at 8,192,
`paper` 4 to 7 minutes, all on 2 cores with much else to do; a stopped sweep goes on.
"""

from collections.abc import Iterator
from pathlib import Path

from absl import app, flags
from runs import print_header, print_row

import sae_jax
from sae_jax import baselines
from sae_jax.compare import compare, list_names
from sae_jax.config import DataConfig, OptimizerConfig, SaeConfig, TrainConfig
from sae_jax.evals import SUITES, evaluate, format_value
from sae_jax.evals.figures import Figure
from sae_jax.evaluation import EVALUATION_FILE, evaluate_run
from sae_jax.saes import Sae
from sae_jax.store import Store

_STORE = flags.DEFINE_string("store", "store", "the activation store")
_OUT = flags.DEFINE_string("out", "evaluations", "where runs and results are kept")

SIZES, SPARSITIES = (512, 2048, 8192), (8, 32, 128)
K_OF_PAPER = 32  # whose SAEs have the suite `paper`; the others have `core`


def get_config(
    n_latents: int = 2048, k: int = 32, seed: int = 0, store: str = "store"
) -> TrainConfig:
    """One run of 781 steps of 2,048 rows; the rate falls as 1 / sqrt(L)."""
    rows = 1_600_000
    return TrainConfig(
        sae=SaeConfig(n_latents=n_latents, k=k),
        optimizer=OptimizerConfig(
            learning_rate=3e-3 * (4096 / n_latents) ** 0.5,
            decay_rows=rows // 5,
            ema_decay=0.98,
        ),
        data=DataConfig(store=store, batch_rows=2048),
        rows=rows,
        dead_after_rows=40_000,
        seed=seed,
        log_every_steps=20,
        checkpoint_every_steps=400,
        checkpoints_kept=1,
    )


def main(argv: list[str]) -> None:
    """Trains what is missing, measures what is missing, and prints the table."""
    del argv
    out, store = Path(_OUT.value), sae_jax.open_store(_STORE.value)
    folders = []
    for n_latents in SIZES:
        for k in SPARSITIES:
            folder = out / f"L{n_latents}_k{k}"
            sae_jax.train(get_config(n_latents, k, store=_STORE.value), folder)
            suite = "paper" if k == K_OF_PAPER else "core"
            evaluate_run(folder, suite=suite)
            folders.append(folder)
    for name, sae in make_baselines(store):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / EVALUATION_FILE
        subject = sae_jax.load_subject()
        evaluate(sae, subject, store, SUITES["paper"], progress=True, file=file)
        folders.append(folder)
    rows = compare(folders, out)
    names = list_names(rows)
    print_header(("SAE", *names))
    for row in rows:
        print_row((row.name, *(format_figure(row.figures.get(n)) for n in names)))


def format_figure(figure: Figure | None) -> str:
    """Value ± its 95 % interval; nothing where it was not measured."""
    if figure is None:
        return ""
    value, ci95 = figure["value"], figure["ci95"]
    return format_value(value) + (f" ± {format_value(ci95)}" if ci95 else "")


def make_baselines(store: Store) -> Iterator[tuple[str, Sae]]:
    """Each for K = 32; where there is a size to choose, of 2,048 latents."""
    site, config = store.site(None), get_config(store=_STORE.value)
    k, n_latents = config.sae.k, config.sae.n_latents
    yield f"pca_k{k}", baselines.components(store, site, k)
    yield f"channels_k{k}", baselines.channels(store, site, k)
    yield f"random_k{k}", baselines.random_dictionary(store, site, n_latents, k)
    yield f"untrained_k{k}", baselines.untrained(config, store)


if __name__ == "__main__":
    app.run(main)
