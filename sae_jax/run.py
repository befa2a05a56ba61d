"""The run folder: what a run leaves behind, and opening its SAE.

    config.json  metrics.jsonl  tensorboard/  checkpoints/<step>/
    evaluation.json  report.html
"""

from pathlib import Path

import jax
from jax.sharding import Mesh

from sae_jax import config as configs
from sae_jax import mesh as meshes
from sae_jax.checkpoint import FOLDER, Checkpoints
from sae_jax.config import TrainConfig, nearest_name
from sae_jax.saes import Sae

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
WEIGHTS = ("ema", "raw")


def load(path: str | Path, mesh: Mesh | None = None, weights: str = "ema") -> Sae:
    """A trained SAE, ready to `encode` and `decode`.

    Args:
        path: a run folder (its last checkpoint), or `run/checkpoints/<step>`.
        mesh: where its latents live; one device when not given.
        weights: `ema`, the average over the last steps, or `raw`, as trained.

    Raises:
        FileNotFoundError: there is no checkpoint at `path`.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights = {weights!r}: {nearest_name(weights, WEIGHTS)}")
    workdir, step = locate(path)
    checkpoints = Checkpoints(workdir, is_read_only=True)
    try:
        setup = checkpoints.meta(step).setup(mesh or meshes.single_device_mesh())
        params = checkpoints.restore_params(step, setup, weights)
    finally:
        checkpoints.close()
    return jax.jit(setup.sae, donate_argnums=0)(params)


def locate(path: str | Path) -> tuple[Path, int]:
    """The run folder and the steps that the checkpoint at `path` has done.

    Of a run folder, this is its last whole checkpoint. FileNotFoundError for neither.
    """
    path = Path(path)
    if path.parent.name == FOLDER and path.name.isdigit() and path.is_dir():
        return path.parent.parent, int(path.name)
    if path.parent.name == FOLDER and path.parent.is_dir():
        steps = sorted(int(p.name) for p in path.parent.iterdir() if p.name.isdigit())
        raise FileNotFoundError(
            f"no checkpoint {path.name} in {path.parent}: it has those of the steps "
            f"{', '.join(map(str, steps)) or 'none'}"
        )
    if not (path / FOLDER).is_dir():
        raise FileNotFoundError(
            f"{path}: neither a run folder (no {FOLDER}/ in it) nor one of its "
            "checkpoints"
        )
    checkpoints = Checkpoints(path, is_read_only=True)
    try:
        step = checkpoints.latest_step
    finally:
        checkpoints.close()
    if step is None:
        raise FileNotFoundError(
            f"{path}: no whole checkpoint yet; the run has not saved its first"
        )
    return path, step


def read_config(workdir: str | Path) -> TrainConfig:
    """The config that a run folder was trained with."""
    path = Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: is {workdir} a run folder?")
    return configs.from_json(TrainConfig, path.read_text(encoding="utf-8"), path)
