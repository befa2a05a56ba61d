"""Training rows straight from a subject, for runs whose store would not fit.

The text is packed once, into the run's folder, and the subject runs over it as training
goes on. A window of contexts is read at a time into a buffer on the devices, from which
batches are drawn, in the order that `sae_jax.loader.order` gives a store whose chunks
are whole contexts. So the rows of a step depend on the seed and the step alone, and a
run that was stopped reads its window again and goes on with the same bits.

Device memory: 2 V W R D bytes for V lanes, a window of W contexts of each and R rows in
a context, divided by the number of devices. Unless data.window_chunks is set, this is a
million rows, or fewer if they mix as well as `sae_jax.loader.mixing` asks.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Generator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from sae_jax import processes
from sae_jax.config import DataConfig, TrainConfig
from sae_jax.harvest import (
    HELDOUT_EVERY,
    ROWS_PER_SHARD,
    plan_store,
    wait_for_text,
    write_text,
)
from sae_jax.loader.mixing import choose_window, describe_mixing
from sae_jax.loader.order import SAMPLE, Order, make_rng
from sae_jax.mesh import DATA, fetch
from sae_jax.store import Folder, Manifest, Statistics, StoreWriter, Text, statistics
from sae_jax.stream.buffer import Buffer
from sae_jax.subjects import Subject, load_subject
from sae_jax.text import open_corpus, standard_library
from sae_jax.text.hub import PREFIX

TEXT_FOLDER = "text"
_MOST_ROWS = 2**20
_STATISTICS_ROWS = 2**16


class Stream:
    """Batches from a subject; a `sae_jax.loader.Feed`.

    Raises ValueError or FileNotFoundError, one line, for a subject, a text, a site or a
    mesh that cannot be. The text is packed, which may take hours, when `data`,
    `identity` or rows are first asked for, and is refused then if it has too little.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh, workdir: Path):
        self._config, self._mesh = config.stream, mesh
        self._seed, self._asked = config.seed, config.data
        if config.data.site is None:
            raise ValueError("data.site is not set: say where to read, as resid_post.3")
        _check_lanes(config.data.lanes, mesh)
        self._paths = _list_texts(config.stream.text)
        self._subject = load_subject(config.stream.subject, mesh=mesh)
        self.site = config.data.site
        self.width = self._subject.width(self.site)
        self._folder = Folder(workdir / TEXT_FOLDER)
        self._planned = _plan(self._subject, config)
        self._skip = int(config.stream.exclude_special)
        self._rows = self._planned.context_length - self._skip  # of a context
        lanes = config.data.lanes
        self._at_once = max(1, config.stream.batch_contexts // lanes)  # of a lane

    def __str__(self) -> str:
        return f"{self.site} of subject {self._subject.name!r}, without a store"

    @functools.cached_property
    def data(self) -> DataConfig:
        return dataclasses.replace(
            self._asked,
            window_chunks=self._order.window_chunks,
            heldout_every=self._manifest.heldout_every,
        )

    @property
    def identity(self) -> str:
        """What the rows are made of, but not where the subject or the text lies."""
        values = dataclasses.asdict(self._manifest)
        values["subject"] = [values["subject"][key] for key in ("identity", "dtype")]
        parts = repr((sorted(values.items()), self.site))
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    def describe(self) -> str:
        order = self._order
        n_rows = order.n_lanes * order.most_rounds * self._rows
        size = 2 * n_rows * self.width / self._mesh.size / 1e9
        return (
            f"{describe_mixing([order], self._asked, [self._rows])}; {size:.2g} GB of "
            "a device hold the window"
        )

    def epochs(self, n_rows: int) -> float:
        return n_rows / (len(self._sequences) * self._rows)

    def statistics(self) -> Statistics:
        """Of some rows, the same for all runs with this seed; kept beside the text."""
        name = f"statistics/{self.site}.npz"
        data = self._folder.read(name)
        processes.wait_for_all("statistics")  # all read the file, or all make it
        if data is None:
            acts_nd, positions_n = self._read_sample(_STATISTICS_ROWS, self._seed)
            sums = statistics.add_up(
                acts_nd, positions_n, self._manifest.context_length
            )
            if not statistics.is_finite(sums):
                raise ValueError(
                    f"{self} gave an activation that is infinite or not a number: the "
                    "subject's weights or its dtype cannot be right"
                )
            data = statistics.to_bytes(statistics.finish(sums))
            if processes.is_first():
                self._folder.write(name, data)
        return statistics.read_statistics(data)

    def sample(self, n_rows: int, seed: int) -> np.ndarray:
        return self._read_sample(n_rows, seed)[0].astype(np.float32)

    def batches(
        self, start_step: int, n_steps: int
    ) -> Generator[jax.Array, None, None]:
        order, lanes = self._order, self._asked.lanes
        lane_rows = self._asked.batch_rows // lanes
        buffer = Buffer(
            self._mesh, lanes, order.most_rounds, self._at_once, self._rows, self.width
        )
        filled = -1
        for step in range(start_step, start_step + n_steps):
            batch, n_done = None, 0
            while n_done < lane_rows:
                at = step * lane_rows + n_done
                window = order.window_of(at)
                if window != filled:
                    self._fill(buffer, order, window)
                    places_vn = np.stack([
                        order.rows(window, lane) for lane in range(lanes)
                    ])
                    filled = window
                first = at - order.rounds(window).start * self._rows
                part = places_vn[:, first : first + lane_rows - n_done]
                batch = buffer.take(part, n_done, lane_rows, batch)
                n_done += part.shape[1]
            assert batch is not None
            yield batch

    @functools.cached_property
    def _manifest(self) -> Manifest:
        """Of the text, which is packed if it is not yet."""
        corpus = standard_library()
        if self._paths:
            corpus = open_corpus(self._paths, self._config.text_field)
        processes.note("hashing the text")
        planned = dataclasses.replace(self._planned, corpus=corpus.identity)
        if not processes.is_first():
            return wait_for_text(self._folder, planned)
        with contextlib.closing(StoreWriter(self._folder, planned)) as writer:
            if not writer.manifest.is_packed:
                write_text(self._subject, corpus, writer, on_rows=_note_packing)
            return writer.manifest

    @functools.cached_property
    def _text(self) -> Text:
        return Text(self._folder, self._manifest)

    @functools.cached_property
    def _sequences(self) -> np.ndarray:
        return self._text.sequences("train")

    @functools.cached_property
    def _order(self) -> Order:
        data, n_contexts = self._asked, len(self._sequences)
        if n_contexts < data.lanes:
            raise ValueError(
                f"the text gives {n_contexts} train contexts for data.lanes = "
                f"{data.lanes}: lower data.lanes to at most that, or give more text"
            )
        order = Order(n_contexts, self._rows, data.lanes, 1, self._seed)
        window_chunks = data.window_chunks
        if window_chunks is None:
            most = max(1, _MOST_ROWS // (self._rows * data.lanes))
            window_chunks = min(most, choose_window(order, data, self._rows))
        return dataclasses.replace(order, window_chunks=window_chunks)

    def _fill(self, buffer: Buffer, order: Order, window: int) -> None:
        """Reads the window's contexts, some of each lane at a time."""
        chunks = [order.chunks(window, lane) for lane in range(order.n_lanes)]
        contexts_vn = self._sequences[np.array(chunks)]
        for first in range(0, contexts_vn.shape[1], self._at_once):
            part = contexts_vn[:, first : first + self._at_once]
            missing = self._at_once - part.shape[1]
            part = np.pad(part, ((0, 0), (0, missing)), mode="edge")
            acts_btd = self._capture(part.ravel())
            buffer.write(acts_btd, first, self._skip)

    def _capture(self, sequences: np.ndarray) -> jax.Array:
        tokens_bt = self._text.read("tokens", sequences)
        return self._subject.capture(tokens_bt, (self.site,))[self.site]

    def _read_sample(self, n_rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of contexts drawn by the seed, bfloat16 [n, D], and their positions."""
        rng = make_rng(seed, SAMPLE)
        n_batch = self._at_once * self._asked.lanes
        # From many contexts some rows each.
        n_contexts = min(len(self._sequences), max(64, n_rows // 64))
        drawn = np.sort(rng.permutation(self._sequences)[:n_contexts])
        each = -(-n_rows // n_contexts)
        acts, positions = [], []
        for first in range(0, n_contexts, n_batch):
            part = drawn[first : first + n_batch]
            acts_btd = fetch(self._capture(np.resize(part, n_batch)))
            for acts_td in acts_btd[: len(part)]:
                n = min(each, self._rows)
                chosen = self._skip + np.sort(rng.permutation(self._rows)[:n])
                acts.append(acts_td[chosen])
                positions.append(chosen)
        return np.concatenate(acts)[:n_rows], np.concatenate(positions)[:n_rows]


def _check_lanes(lanes: int, mesh: Mesh) -> None:
    n_data = mesh.shape[DATA]
    if lanes % n_data:
        raise ValueError(
            f"data.lanes = {lanes} is not a multiple of mesh.data = {n_data}: each "
            "device reads lanes of its own; raise data.lanes"
        )


def _list_texts(text: str) -> list[str]:
    """What `stream.text` names; FileNotFoundError for what is not there."""
    paths = [path.strip() for path in text.split(",")] if text else []
    for path in paths:
        if not path.startswith(PREFIX) and not Path(path).exists():
            raise FileNotFoundError(
                f"stream.text names {path!r}, and there is no such file or folder: "
                "give text files or folders of them, with commas"
            )
    return paths


def _plan(subject: Subject, config: TrainConfig) -> Manifest:
    """Of the text, less what tells which text it is: that takes reading it all."""
    stream = config.stream
    bos = stream.bos or ("none" if subject.bos_id is None else "document")
    return plan_store(
        subject,
        (),
        corpus="",
        context_length=stream.context_length,
        max_rows=None,
        bos=bos,
        heldout_every=config.data.heldout_every or HELDOUT_EVERY,
        rows_per_shard=ROWS_PER_SHARD,
        rows_per_chunk=1,
        seed=config.seed,
    )


def _note_packing(n_rows: int) -> None:
    processes.note(f"packing row {n_rows:,} of the text")
