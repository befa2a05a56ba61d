"""Where a run starts: anew, or at its last checkpoint if that is of the same run."""

import dataclasses
import time

import jax

from sae_jax import config as configs
from sae_jax import processes, state
from sae_jax.checkpoint import Checkpoints, Meta
from sae_jax.loader import Feed
from sae_jax.state import Setup, TrainState
from sae_jax.store import Folder

_SAMPLE_ROWS = 8192  # enough for the median and the variance of a site
_TOKEN = ".processes"
# A resumed run may change these; any other difference would make it another run. More
# rows make it longer, unless the learning rate falls towards the end.
_MAY_CHANGE = (
    "mesh",
    "rows",
    "log_every_steps",
    "checkpoint_every_steps",
    "checkpoints_kept",
    "data.store",
    "data.microbatch_rows",
    "sae.exchange",
    "sae.capacity_factor",
)
_PREFIXES = tuple(f"{name}." for name in _MAY_CHANGE)


def start_or_resume(
    setup: Setup, feed: Feed, checkpoints: Checkpoints
) -> tuple[int, TrainState]:
    """The number of steps done, and the state after them.

    The folder is taken from whoever writes there once this run is not refused.
    """
    step = checkpoints.latest_step
    processes.check_same(
        config=configs.to_json(setup.config),
        store=setup.store_identity,
        checkpoint=step,
    )
    if step is None:
        checkpoints.take()
        processes.note("the first state")
        return 0, state.create(setup, feed.sample(_SAMPLE_ROWS, setup.config.seed))
    processes.note(f"reading the checkpoint of step {step}")
    path = checkpoints.name(step)
    _refuse_another_run(checkpoints.meta(step), setup, path)
    checkpoints.take()  # before it is read: until then it may be deleted
    return step, checkpoints.restore(step, setup)


def check_shared(folder: Folder) -> None:
    """ValueError unless what process 0 writes there is seen by all processes."""
    if jax.process_count() == 1:
        return
    number = processes.from_first(time.time_ns() % 2**31)
    if processes.is_first():
        folder.write(_TOKEN, str(number))
    processes.wait_for_all("token")
    is_seen = folder.read(_TOKEN) == str(number).encode()
    processes.wait_for_all("seen")
    if not is_seen:
        raise ValueError(
            f"{str(folder)!r} of process 0 is not the one of process "
            f"{jax.process_index()}: give a folder that all processes share, or gs:// "
            "or s3://"
        )
    if processes.is_first():
        folder.delete(_TOKEN)


def _refuse_another_run(meta: Meta, setup: Setup, path: str) -> None:
    """ValueError if the checkpoint is of a run that `setup` does not go on with."""
    was, now = dataclasses.asdict(meta.config), dataclasses.asdict(setup.config)
    for name, old, new in _differences(was, now):
        is_of_end = name == "rows" and bool(setup.config.optimizer.decay_rows)
        if is_of_end or not f"{name}.".startswith(_PREFIXES):
            may = "rows may not, as optimizer.decay_rows counts from the end"
            raise ValueError(
                f"{path}: this run has {name} = {old!r}, now {new!r} is asked: "
                "resume with the same config, or choose another workdir; "
                + (may if is_of_end else f"only {', '.join(_MAY_CHANGE)} may change")
            )
    if meta.store_identity != setup.store_identity:
        raise ValueError(
            f"{path}: this run was trained on another store than the one that is now "
            f"at {setup.config.data.store}: give that store, or another workdir"
        )
    if meta.step > setup.config.n_steps:
        raise ValueError(
            f"{path}: this run has done {meta.step} steps, rows = {setup.config.rows} "
            f"are {setup.config.n_steps}: raise rows, or choose another workdir"
        )


def _differences(old: dict, new: dict, prefix: str = "") -> list[tuple]:
    found = []
    for name in sorted(old.keys() | new.keys()):
        was, now = old.get(name), new.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            found += _differences(was, now, f"{prefix}{name}.")
        elif was != now:
            found.append((prefix + name, was, now))
    return found
