"""Training, told from top to bottom.

    open store -> check everything -> new state, or the last checkpoint
    -> for each step: next batch, dispatch, look at the step before
    -> checkpoint now and then -> final checkpoint

The loop dispatches step n and only then waits for step n - 1: the device always has
work, and never more than one step waits behind the one that runs.
"""

import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from sae_jax import checkpoint, files, header, interrupt, optim, processes, resume
from sae_jax import config as configs
from sae_jax import mesh as meshes
from sae_jax.checkpoint import Checkpoints
from sae_jax.config import TrainConfig
from sae_jax.loader import Feed, StoreFeed, find_width
from sae_jax.mirror import Mirror
from sae_jax.plan import choose_mesh
from sae_jax.progress import Progress
from sae_jax.resample import Resampling
from sae_jax.run import CONFIG_FILE, METRICS_FILE
from sae_jax.state import Setup, TrainState
from sae_jax.step import Metrics, check, make_step, prepare
from sae_jax.store import Folder
from sae_jax.stream import Stream
from sae_jax.writers import JsonLinesWriter, TensorBoardWriter, Writer, Writers


class NonFiniteLoss(FloatingPointError):
    """Training met a value that is not finite, and stopped."""


def train(
    config: TrainConfig,
    workdir: str | Path,
    writer: Writer | None = None,
    profile_steps: tuple[int, int] | None = None,
) -> TrainState:
    """Trains one SAE, or goes on with the run in `workdir`.

    Args:
        config: the run.
        workdir: the run folder, on a disk or at gs:// or s3://; see README.md for what
            it will hold.
        writer: also gets the metrics, beside `metrics.jsonl` and TensorBoard.
        profile_steps: profiles the steps from the first up to the second number.

    Returns:
        The final state.

    Raises:
        ValueError: a bad config, store or mesh; nothing was started.
        NonFiniteLoss: the loss is not finite; names step, term and last checkpoint.
        KeyboardInterrupt: Ctrl-C came; the step at hand was saved first.
        Preempted: SIGTERM came, to this or another process; likewise.
    """
    processes.check_joined()
    config = configs.checked(config)
    folder = Folder(workdir)
    mesh, why = _choose_mesh(config)
    feed = _open_feed(config, mesh, Path(workdir))
    complete = check(config, mesh, feed)
    mirror = Mirror(folder)
    profile = _Profile(mirror.path / "profile", profile_steps, config.n_steps)

    with contextlib.ExitStack() as stack:
        if processes.is_first() and folder.is_local:
            files.make_writable(folder.path / checkpoint.FOLDER)
            stack.enter_context(files.lock_folder(folder.path))
        resume.check_shared(folder)
        setup = prepare(complete, mesh, feed)
        if processes.is_first() and folder.is_local:
            checkpoint.check_space(folder.path, setup)
        checkpoints = Checkpoints(workdir, config.checkpoints_kept)
        stack.callback(checkpoints.close)
        start, train_state = resume.start_or_resume(setup, feed, checkpoints)
        stack.enter_context(mirror.guarded(checkpoints.check_writer))
        if processes.is_first():
            folder.write(CONFIG_FILE, configs.to_json(setup.config))
            mirror.fetch(METRICS_FILE)
            print(header.describe(config, setup, feed, start, why), file=sys.stderr)
        writers = _open_writers(mirror.path, start, writer)
        stack.callback(writers.close)
        stack.callback(profile.close)
        batches = feed.batches(start, config.n_steps - start)
        stack.callback(batches.close)
        resampling = Resampling(setup, feed)
        return _run(
            setup,
            train_state,
            start,
            batches,
            resampling,
            checkpoints,
            writers,
            mirror,
            profile,
        )


def _run(
    setup: Setup,
    train_state: TrainState,
    start: int,
    batches: Generator[jax.Array, None, None],
    resampling: Resampling,
    checkpoints: Checkpoints,
    writers: Writer,
    mirror: Mirror,
    profile: "_Profile",
) -> TrainState:
    config = setup.config
    # One compilation for each K of the annealing.
    step_at = functools.cache(lambda k: make_step(setup.with_k(k)))
    pending: tuple[int, Metrics] | None = None
    with (
        interrupt.deferred() as stop,
        contextlib.closing(_Report(setup, writers, checkpoints)) as report,
    ):
        for step in range(start + 1, config.n_steps + 1):
            processes.note(f"step {step}", step - 1)
            profile.at(step, pending)
            with report.loading():
                acts_bd = next(batches)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                train_step = step_at(config.k_at(step - 1))
                train_state, metrics = train_step(train_state, acts_bd)
            if pending:
                report.step(*pending)
            pending = (step, metrics)
            train_state = resampling.after(step, train_state)
            is_last = step == config.n_steps or stop.is_wanted(step)
            if is_last or step % config.checkpoint_every_steps == 0:
                report.step(*pending)  # a state is saved only once it was looked at
                pending = None
                processes.note(f"saving step {step}", step)
                mirror.send()
                checkpoints.save(step, train_state, setup)
            if is_last:
                break
        checkpoints.wait()
    if start < config.n_steps and step < config.n_steps:
        raise stop.error(
            f"stopped after step {step} of {config.n_steps}, which is saved: the same "
            "command goes on from there"
        )
    return train_state


class _Report:
    """Looks at every step's scalars: refuses what is not finite, writes some."""

    def __init__(self, setup: Setup, writers: Writer, checkpoints: Checkpoints):
        self._config = setup.config
        self._writers = writers
        self._checkpoints = checkpoints
        self._progress = Progress(
            setup.config.n_steps * setup.config.data.batch_rows,
            "rows",
            "train",
            is_shown=processes.is_first(),
        )
        self._last: tuple[int, float] | None = None
        self._loading_secs = 0.0

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """To be entered while the loop waits for a batch."""
        begin = time.monotonic()
        yield
        self._loading_secs += time.monotonic() - begin

    def step(self, step: int, metrics: Metrics) -> None:
        metrics = jax.device_get(metrics)
        scalars = {name: value.item() for name, value in metrics.items()}
        self._refuse_non_finite(step, scalars)
        rows = step * self._config.data.batch_rows
        self._progress.update(
            rows, nmse=scalars["nmse"], l0=scalars["l0"], n_dead=scalars["n_dead"]
        )
        is_last = step == self._config.n_steps
        if step % self._config.log_every_steps and not is_last:
            return
        self._writers.write(
            step,
            {"rows": rows}
            | scalars
            | {"learning_rate": float(optim.learning_rate_at(self._config, step - 1))}
            | self._rates(step),
        )

    def close(self) -> None:
        self._progress.close()

    def _rates(self, step: int) -> dict[str, float]:
        """Since the last line; the first has none, as they would be of compilation.

        The devices still do a step while the loop waits for a batch, so loading is the
        slower side only where its share comes near 1.
        """
        last, now = self._last, time.monotonic()
        loading, self._loading_secs = self._loading_secs, 0.0
        self._last = (step, now)
        if last is None:
            return {}
        rows, seconds = (step - last[0]) * self._config.data.batch_rows, now - last[1]
        return {"rows_per_second": rows / seconds, "loading_share": loading / seconds}

    def _refuse_non_finite(self, step: int, scalars: dict[str, float]) -> None:
        bad = [name for name, value in scalars.items() if not math.isfinite(value)]
        if not bad:
            return
        self._checkpoints.wait()
        good = self._checkpoints.latest_step
        where = self._checkpoints.name(good) if good else "none yet"
        raise NonFiniteLoss(
            f"step {step}: {', '.join(f'{n} = {scalars[n]}' for n in bad)}; "
            f"last good checkpoint: {where}"
        )


class _Profile:
    """Traces a window of steps into a folder that xprof and TensorBoard read."""

    def __init__(self, directory: Path, steps: tuple[int, int] | None, n_steps: int):
        self._directory = directory
        self._first, self._stop = steps or (0, 0)
        self._is_on = False
        if steps and not 0 < self._first < self._stop <= n_steps + 1:
            raise ValueError(
                f"profile_steps = {self._first},{self._stop}: give FIRST < STOP from "
                f"1 to {n_steps + 1}, as this run has {n_steps} steps"
            )

    def at(self, step: int, pending: object) -> None:
        """To be called before each step, with what the device may still work on."""
        if step == self._first:
            jax.profiler.start_trace(str(self._directory))
            self._is_on = True
        elif step == self._stop and self._is_on:
            jax.block_until_ready(pending)
            self.close()

    def close(self) -> None:
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()


def _choose_mesh(config: TrainConfig) -> tuple[Mesh, str]:
    """The mesh over all devices, and why it is this one."""
    sae = config.sae
    if sae.d_model is None and config.data.store:
        sae = dataclasses.replace(sae, d_model=find_width(config.data))
    device = jax.devices()[0]
    chosen, why = choose_mesh(
        dataclasses.replace(config, sae=sae),
        jax.device_count(),
        device.platform,
        device.device_kind,
        jax.process_count(),
    )
    return meshes.make_mesh(chosen, sae.n_latents), why


def _open_feed(config: TrainConfig, mesh: Mesh, workdir: Path) -> Feed:
    if config.stream.subject:
        return Stream(config, mesh, workdir)
    return StoreFeed(config.data, mesh, config.seed)


def _open_writers(path: Path, start: int, extra: Writer | None) -> Writers:
    if not processes.is_first():
        return Writers([])
    writers: list[Writer] = [
        JsonLinesWriter(path / METRICS_FILE, start),
        TensorBoardWriter(path / "tensorboard", start),
    ]
    return Writers(writers + ([extra] if extra else []))
