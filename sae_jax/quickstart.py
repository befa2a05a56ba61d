"""The quickstart: from the text on this machine to a report, in minutes on a laptop.

    text -> subject model -> store -> SAE -> evaluation -> report.html

The default subject reads the source of the running Python's standard library; an SAE
of 16 latents per dimension learns its residual stream. A harvest or a training that an
earlier quickstart began in the same folder goes on where it was, or is left as it is.
"""

from pathlib import Path

from sae_jax.config import DataConfig, OptimizerConfig, SaeConfig, TrainConfig
from sae_jax.evals import format_table
from sae_jax.evaluation import REPORT_FILE, evaluate_run
from sae_jax.harvest import harvest
from sae_jax.loop import train
from sae_jax.subjects import load_subject
from sae_jax.text import standard_library

FOLDER = "quickstart"
SITE = "resid_post.3"
MAX_ROWS = 1_100_000  # both splits; a fifth of the documents is held out


def get_config(store: str | Path = f"{FOLDER}/store") -> TrainConfig:
    """The quickstart's training run."""
    return TrainConfig(
        sae=SaeConfig(n_latents=4096, k=32),
        optimizer=OptimizerConfig(learning_rate=3e-3, ema_decay=0.98),
        data=DataConfig(store=str(store), batch_rows=2048),
        rows=800_000,
        dead_after_rows=20_000,
        log_every_steps=5,
        checkpoint_every_steps=100,
    )


def quickstart(folder: str | Path = FOLDER) -> Path:
    """Runs all parts; prints the table; returns the path of the report."""
    folder = Path(folder)
    harvest(
        load_subject(),
        standard_library(),
        folder / "store",
        [SITE],
        max_rows=MAX_ROWS,
    )
    train(get_config(folder / "store"), folder / "run")
    results = evaluate_run(folder / "run")
    print(format_table(results))
    return folder / "run" / REPORT_FILE
