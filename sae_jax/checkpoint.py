"""Checkpoints of everything a step reads, by Orbax, written in the background.

    run/checkpoints/<step>/   params  ema  optimizer  counters  meta

Each is an item of its own, so that parameters can be restored alone and onto any mesh.
`meta` holds the step, the config, the normalisation and the site, and a checksum of
itself and of every array, taken on the devices: what is read is what was saved, or an
error. A checkpoint appears under its name only once it is whole; one torn by a kill is
never chosen, and one that was damaged later is refused, not passed over. In a bucket
`sae_jax.bucket` writes them, with the same items.
"""

import contextlib
import dataclasses
import functools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding

from sae_jax import config as configs
from sae_jax import bucket, files, optim
from sae_jax import state as states
from sae_jax.bucket import BucketManager
from sae_jax.checksum import sum_bits
from sae_jax.config import TrainConfig
from sae_jax.normalize import Normalization
from sae_jax.state import Setup, TrainState
from sae_jax.store import Folder

FOLDER = "checkpoints"
_ITEMS = ("params", "ema", "optimizer", "counters")
# How tensorstore tells of files that are not as they were written.
_DAMAGED = re.compile("(DATA_LOSS|FAILED_PRECONDITION|NOT_FOUND|OUT_OF_RANGE): ")
_DETAILS = re.compile(r" \[\w+(\[\d+\])?='")  # at the end of its text
_Trees = dict[str, dict[str, Any]]  # by item, and by name in it


class _Mismatch(Exception):
    """A checksum is not the one that was saved."""


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
        directory = self._folder.path.resolve()
        # Floats hardly shrink: to compress them is most of the time of a save.
        arrays = {n: ocp.PyTreeCheckpointHandler(use_compression=False) for n in _ITEMS}
        handlers = arrays | {"meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            directory, options=options, item_handlers=handlers
        )

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
        trees = {name: _as_tree(getattr(state, name)) for name in _ITEMS}
        meta = {
            "step": step,
            "config": json.loads(configs.to_json(setup.config)),
            "normalization": dataclasses.asdict(setup.normalization),
            "site": setup.site,
            "store_identity": setup.store_identity,
            "checksums": _sum_bits(trees),
        }
        meta["checksum"] = _sum_json(meta)
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        arguments = ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items)
        with self._failure_in_one_line():
            self._manager.save(step, args=arguments)

    def restore(self, step: int, setup: Setup) -> TrainState:
        """The state after `step` steps, placed as `setup` says."""
        target = states.abstract(setup)
        wanted = {name: _as_tree(getattr(target, name)) for name in _ITEMS}
        trees = self._read(step, wanted)
        return TrainState(
            **{n: _like(getattr(target, n), trees[n]) for n in _ITEMS}
        )

    def restore_params(self, step: int, setup: Setup, weights: str) -> optim.Params:
        """Parameters alone: `raw` as trained, or `ema`, their average."""
        item = {"raw": "params", "ema": "ema"}[weights]
        params = self._read(step, {item: states.abstract(setup).params})[item]
        if weights == "raw":
            return params
        decay = setup.config.optimizer.ema_decay
        read = jax.jit(optim.ema_read, static_argnums=(1, 2, 3), donate_argnums=0)
        return read(params, decay, step, tuple(setup.unit_norm))

    def meta(self, step: int) -> Meta:
        """What the checkpoint of this step says about itself."""
        raw, source = self._read_meta(step), self.name(step)
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

    def _read(self, step: int, targets: _Trees) -> _Trees:
        """These items, each array placed as its target says, as they were saved."""
        expected = self._read_meta(step)["checksums"]
        trees = {}
        for item, target in targets.items():
            how = ocp.checkpoint_utils.construct_restore_args(target)
            read = ocp.args.Composite(**{item: ocp.args.PyTreeRestore(target, how)})
            with self._damage_in_one_line(step, item):
                trees[item] = self._manager.restore(step, args=read)[item]
        for item, sums in _sum_bits(trees).items():
            for name, total in sums.items():
                with self._damage_in_one_line(step, f"{item}/{name}"):
                    _check(total, expected[item][name])
        return trees

    def _read_meta(self, step: int) -> dict[str, Any]:
        read = ocp.args.Composite(meta=ocp.args.JsonRestore())
        with self._damage_in_one_line(step, "meta"):
            meta = self._manager.restore(step, args=read)["meta"]
            _check(_sum_json(meta), meta["checksum"])
        return meta

    @contextlib.contextmanager
    def _damage_in_one_line(self, step: int, what: str) -> Iterator[None]:
        path = f"{self.name(step)}/{what}"
        try:
            yield
        except jax.errors.JaxRuntimeError:  # of the devices, or of other processes
            raise
        except Exception as error:
            cause = error.__cause__ or error  # Orbax puts pages around some
            if _is_damage(cause, self._is_of_bucket):
                earlier = [other for other in self.steps if other < step]
                start = f"step {max(earlier)}" if earlier else "the beginning"
                raise ValueError(
                    f"{path} is missing or damaged ({_shorten(cause)}): delete "
                    f"{self.name(step)} to go on from {start}"
                ) from error
            if self._is_of_bucket:
                raise  # one line already, which names the cure
            raise OSError(
                f"{path} cannot be read ({_shorten(cause)}): {_cure(cause, 'read')}, "
                "and run the same command again"
            ) from error

    @contextlib.contextmanager
    def _failure_in_one_line(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if self._is_of_bucket:
                raise  # one line already, which names the cure
            names = [path.name for path in self._folder.path.glob("[0-9]*")]
            steps = [int(name) for name in names if name.isdigit()]
            start = f"step {max(steps)}, which is whole" if steps else "the beginning"
            raise OSError(
                f"{self._folder}: a checkpoint could not be written "
                f"({_shorten(error)}): {_cure(error, 'write')}, and run the same "
                f"command again; it goes on from {start}"
            ) from error


def _is_damage(error: BaseException, is_of_bucket: bool) -> bool:
    """Whether what was written is gone or changed, and reading it again is no cure."""
    if isinstance(error, _Mismatch | LookupError | AttributeError | TypeError):
        return True
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return True
    if is_of_bucket:  # it has told of everything else
        return False
    is_told = isinstance(error, ValueError) and bool(_DAMAGED.match(str(error)))
    return is_told or isinstance(error, FileNotFoundError)


def _shorten(error: BaseException) -> str:
    """The end of the first line, which tells most; tensorstore's are pages long."""
    if files.is_full_disk(error):
        return "the disk is full"
    text = f"no {error}" if isinstance(error, KeyError) else str(error).strip()
    line = _DETAILS.split((text or type(error).__name__).splitlines()[0])[0]
    return line if len(line) <= 200 else "..." + line[-200:]


def _cure(error: BaseException, action: str) -> str:
    if files.is_full_disk(error):
        return "make room"
    if files.has_no_right(error):
        return f"get the right to {action} there"
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


@functools.partial(jax.jit, static_argnums=1)
def _sum_leaves(
    leaves: list[jax.Array], shardings: tuple[NamedSharding, ...]
) -> list[jax.Array]:
    return list(map(sum_bits, leaves, shardings))


def _sum_bits(trees: _Trees) -> dict[str, dict[str, int]]:
    """The checksum of each array; to be called in all processes."""
    leaves, structure = jax.tree.flatten(trees)
    sums = _sum_leaves(leaves, tuple(leaf.sharding for leaf in leaves))
    return jax.tree.unflatten(structure, map(int, jax.device_get(sums)))


def _sum_json(fields: dict[str, Any]) -> int:
    """The checksum of all fields but `checksum`."""
    others = {name: value for name, value in fields.items() if name != "checksum"}
    return zlib.crc32(json.dumps(others, sort_keys=True).encode())


def _check(found: int, expected: int) -> None:
    if found != expected:
        raise _Mismatch(f"its checksum is {found}, not {expected}")


def _as_tree(item: Any) -> dict[str, Any]:
    """A flat dictionary by path: plain containers outlive the classes of today."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(item)
    return {_name(path): leaf for path, leaf in leaves}


def _like(target: Any, tree: dict[str, Any]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: tree[_name(path)], target)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
