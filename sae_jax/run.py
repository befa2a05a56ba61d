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
from sae_jax.store import Folder

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
WEIGHTS = ("ema", "raw")


def load(path: str | Path, mesh: Mesh | None = None, weights: str = "ema") -> Sae:
    """A trained SAE, ready to `encode` and `decode`.

    Only its parameters are read, which the host holds once while they are copied to
    the devices. Where these are the CPU's own, that is up to twice their size.

    Args:
        path: a run folder (its last checkpoint), or `run/checkpoints/<step>`; on a
            disk, or at gs:// or s3://.
        mesh: where its latents live; one device when not given.
        weights: `ema`, the average over the last steps, or `raw`, as trained.

    Raises:
        FileNotFoundError: there is no checkpoint at `path`.
        ValueError: it is damaged; names what to delete.
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
    The Path of a bucket has lost a slash: only `Folder` reads it.
    """
    path = Path(path)
    if not Folder(path).is_local:
        return _locate_in_bucket(path)
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
    path, text = name_file(workdir, CONFIG_FILE), read_config_text(workdir)
    return configs.from_json(TrainConfig, text, path)


def read_config_text(workdir: str | Path) -> str:
    """The file itself; FileNotFoundError if there is none."""
    data = Folder(workdir).read(CONFIG_FILE)
    if data is None:
        path = name_file(workdir, CONFIG_FILE)
        raise FileNotFoundError(f"{path} does not exist: is {workdir} a run folder?")
    return data.decode()


def name_file(workdir: str | Path, name: str) -> str:
    """A file of a run folder as people know it."""
    return Folder(workdir).name_file(name)


def _locate_in_bucket(path: Path) -> tuple[Path, int]:
    is_checkpoint = path.parent.name == FOLDER and path.name.isdigit()
    workdir = path.parent.parent if is_checkpoint else path
    folder = Folder(path)
    steps = Checkpoints(workdir, is_read_only=True).steps
    if is_checkpoint and int(path.name) not in steps:
        raise FileNotFoundError(
            f"no whole checkpoint at {folder}: there are those of the steps "
            f"{', '.join(map(str, steps)) or 'none'}"
        )
    if not steps and folder.read(CONFIG_FILE) is None:
        raise FileNotFoundError(
            f"{folder}: neither a run folder nor one of its checkpoints"
        )
    if not steps:
        raise FileNotFoundError(
            f"{folder}: no whole checkpoint yet; the run has not saved its first"
        )
    return workdir, int(path.name) if is_checkpoint else steps[-1]
