"""Checkpoints of everything a step reads, by Orbax, written in the background.

    run/checkpoints/<step>/   params  ema  optimizer  counters  meta

Each is an item of its own, so that parameters can be restored alone and onto any mesh.
`meta` holds the step, the config, the normalisation and the site. A checkpoint appears
under its name only once it is whole; one torn by a kill is never chosen. In a bucket
`sae_jax.bucket` writes them, with the same items.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from sae_jax import config as configs
from sae_jax import bucket, files, optim
from sae_jax import state as states
from sae_jax.bucket import BucketManager
from sae_jax.config import TrainConfig
from sae_jax.normalize import Normalization
from sae_jax.state import Setup, TrainState
from sae_jax.store import Folder
from sae_jax.store.folder import is_full_disk

FOLDER = "checkpoints"
_ITEMS = ("params", "ema", "optimizer", "counters")


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint says about itself."""

    step: int
    config: TrainConfig
    normalization: Normalization
    site: str
    store_identity: str

    def setup(self, mesh: Mesh) -> Setup:
        """The run of this checkpoint, on another mesh perhaps."""
        return Setup(
            self.config, self.normalization, mesh, self.site, self.store_identity
        )


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(
        self, workdir: str | Path, kept: int = 1, is_read_only: bool = False
    ):
        self._folder = Folder(Path(workdir) / FOLDER)
        self._manager: ocp.CheckpointManager | BucketManager
        self._is_of_bucket = bucket.is_manager_of(self._folder)
        if self._is_of_bucket:
            self._manager = BucketManager(self._folder, kept)
            return
        if is_read_only:
            options = ocp.CheckpointManagerOptions(create=False)
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=kept, cleanup_tmp_directories=True
            )
        directory = self._folder.path.absolute()
        self._manager = ocp.CheckpointManager(directory, options=options)

    @property
    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps of all whole checkpoints."""
        return sorted(self._manager.all_steps())

    def name(self, step: int) -> str:
        """Where the checkpoint of this step is, for messages."""
        return self._folder.name_file(str(step))

    def take(self) -> None:
        """Makes this run the one that writes here; on a disk its lock does that."""
        if isinstance(self._manager, BucketManager):
            self._manager.take()

    def check_writer(self) -> None:
        """ValueError if another run has taken the folder."""
        if isinstance(self._manager, BucketManager):
            self._manager.check_writer()

    def save(self, step: int, state: TrainState, setup: Setup) -> None:
        """Starts writing the state after `step` steps; returns before it is done."""
        meta = {
            "step": step,
            "config": json.loads(configs.to_json(setup.config)),
            "normalization": dataclasses.asdict(setup.normalization),
            "site": setup.site,
            "store_identity": setup.store_identity,
        }
        items: dict[str, Any] = {
            name: ocp.args.StandardSave(_as_tree(getattr(state, name)))
            for name in _ITEMS
        }
        arguments = ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items)
        with self._failure_in_one_line():
            self._manager.save(step, args=arguments)

    def restore(self, step: int, setup: Setup) -> TrainState:
        """The state after `step` steps, placed as `setup` says."""
        target = states.abstract(setup)
        items: dict[str, Any] = {
            name: ocp.args.StandardRestore(_as_tree(getattr(target, name)))
            for name in _ITEMS
        }
        trees = self._manager.restore(step, args=ocp.args.Composite(**items))
        return TrainState(
            **{n: _like(getattr(target, n), trees[n]) for n in _ITEMS}
        )

    def restore_params(self, step: int, setup: Setup, weights: str) -> optim.Params:
        """Parameters alone: `raw` as trained, or `ema`, their average."""
        target = states.abstract(setup).params
        item = {"raw": "params", "ema": "ema"}[weights]
        trees = self._manager.restore(
            step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(target)})
        )
        if weights == "raw":
            return trees[item]
        decay, unit_norm = setup.config.optimizer.ema_decay, setup.unit_norm

        @functools.partial(jax.jit, donate_argnums=0)
        def read(ema: optim.Params) -> optim.Params:
            return optim.ema_read(ema, decay, step, unit_norm)

        return read(trees[item])

    def meta(self, step: int) -> Meta:
        """What the checkpoint of this step says about itself."""
        read = ocp.args.Composite(meta=ocp.args.JsonRestore())
        raw = self._manager.restore(step, args=read)["meta"]
        source = self.name(step)
        return Meta(
            step=raw["step"],
            config=configs.from_json(TrainConfig, json.dumps(raw["config"]), source),
            normalization=Normalization(**raw["normalization"]),
            site=raw["site"],
            store_identity=raw["store_identity"],
        )

    def wait(self) -> None:
        """Returns when all that was saved is on disk."""
        with self._failure_in_one_line():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the threads that write."""
        with self._failure_in_one_line():
            self._manager.close()

    @contextlib.contextmanager
    def _failure_in_one_line(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if self._is_of_bucket:
                raise  # one line already, which names the cure
            # What Orbax tells of a full disk is pages long, and names no cure.
            cause = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            names = [path.name for path in self._folder.path.glob("[0-9]*")]
            steps = [int(name) for name in names if name.isdigit()]
            start = f"step {max(steps)}, which is whole" if steps else "the beginning"
            raise OSError(
                f"{self._folder}: a checkpoint could not be written ({cause}): "
                f"{_cure(error)}, and run the same command again; it goes on from "
                f"{start}"
            ) from error


def _cure(error: Exception) -> str:
    if is_full_disk(error):
        return "make room"
    if isinstance(error, PermissionError):
        return "get the right to write there"
    return "see to that"


def check_space(workdir: str | Path, setup: Setup) -> None:
    """Raises OSError when the disk cannot hold the checkpoints of this run."""
    leaves = jax.tree.leaves(states.abstract(setup))
    one = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    there = Path(workdir) / FOLDER
    held = sum(path.stat().st_size for path in there.rglob("*") if path.is_file())
    files.check_space(
        workdir,
        one * (setup.config.checkpoints_kept + 1) - held,  # the new beside the old
        f"{setup.config.checkpoints_kept} checkpoints and one being written",
        "make room, or lower checkpoints_kept",
    )


def _as_tree(item: Any) -> dict[str, Any]:
    """A flat dictionary by path: plain containers outlive the classes of today."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(item)
    return {_name(path): leaf for path, leaf in leaves}


def _like(target: Any, tree: dict[str, Any]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: tree[_name(path)], target)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
