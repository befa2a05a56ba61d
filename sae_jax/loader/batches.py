"""From sources to batches: the rows of every lane, step by step, on the mesh."""

from collections.abc import Generator, Sequence
from contextlib import closing

import jax
from jax.sharding import Mesh

from sae_jax.config import DataConfig
from sae_jax.loader.mixing import choose_window_chunks
from sae_jax.loader.order import Order
from sae_jax.loader.place import find_lanes, n_loading_processes, place
from sae_jax.loader.sources import Source
from sae_jax.loader.windows import Rows, Windows, buffer_bytes, join


def train_batches(
    sources: Sequence[Source],
    data: DataConfig,
    mesh: Mesh,
    seed: int,
    start_step: int,
    n_steps: int,
) -> Generator[jax.Array, None, None]:
    """The batches [B, D] of steps `start_step` to `start_step + n_steps`.

    Each is bfloat16, its rows over the mesh's data axis, and the next one is on its
    way to the devices when one is given. Raises ValueError as `check_loader` does.
    """
    check_loader(sources, data, n_loading_processes(mesh, data.batch_rows))
    lanes = find_lanes(mesh, data.batch_rows, data.lanes)
    rows = load_rows(sources, data, lanes, seed, start_step, start_step + n_steps)
    with closing(rows):
        # One ahead and no more: a CPU mesh with many steps in flight may stop for ever.
        waiting: jax.Array | None = None
        for part in rows:
            batch, waiting = waiting, place(part, data.batch_rows, mesh)
            if batch is not None:
                yield batch
        if waiting is not None:
            yield waiting


def load_rows(
    sources: Sequence[Source],
    data: DataConfig,
    lanes: Sequence[int],
    seed: int,
    start_step: int,
    stop_step: int,
) -> Generator[Rows, None, None]:
    """The rows of these lanes, in host memory, step by step."""
    orders = find_orders(sources, data, seed)
    ours = [[v - s.lanes.start for v in lanes if v in s.lanes] for s in sources]
    _check_memory(sources, orders, [len(lanes) for lanes in ours])
    lane_rows = data.batch_rows // data.lanes
    streams = [
        Windows(source, order, lanes).steps(lane_rows, start_step, stop_step)
        for source, order, lanes in zip(sources, orders, ours, strict=True)
        if lanes
    ]
    try:
        for parts in zip(*streams, strict=True):
            yield join(parts, axis=0)
    finally:
        for stream in streams:
            stream.close()


def find_orders(
    sources: Sequence[Source], data: DataConfig, seed: int
) -> list[Order]:
    """The order of each source."""
    window_chunks = choose_window_chunks(sources, data)
    return [
        Order(
            n_chunks=source.n_chunks,
            rows_per_chunk=source.store.manifest.rows_per_chunk,
            n_lanes=len(source.lanes),
            window_chunks=window_chunks,
            seed=seed,
            source=index,
        )
        for index, source in enumerate(sources)
    ]


def check_loader(
    sources: Sequence[Source], data: DataConfig, n_processes: int
) -> None:
    """ValueError, one line, unless every lane of every process has rows to give."""
    for source in sources:
        n_chunks, n_lanes = source.n_chunks, len(source.lanes)
        if source.store.rows("train") == 0:
            raise ValueError(
                f"{source.store.path} has no train rows, only "
                f"{source.store.rows('heldout')} held-out rows, which training "
                "refuses: harvest with a larger heldout_every"
            )
        if n_chunks < n_lanes:
            lanes = "data.lanes" if len(sources) == 1 else f"{n_lanes} of the lanes"
            raise ValueError(
                f"{source} has {n_chunks} train chunks for {lanes} = {data.lanes}: "
                f"lower data.lanes to at most {data.lanes * n_chunks // n_lanes}, or "
                "harvest more text"
            )
        n_rows = n_chunks * source.store.manifest.rows_per_chunk
        batch_rows = data.batch_rows * n_lanes // data.lanes
        if n_rows < batch_rows:
            raise ValueError(
                f"{source} has {n_rows} train rows in whole chunks, less than the "
                f"{batch_rows} of a batch: lower data.batch_rows, or harvest more text"
            )
    if data.lanes % n_processes:
        raise ValueError(
            f"data.lanes = {data.lanes} is not a multiple of the {n_processes} "
            "processes that load: every process takes the same number of lanes"
        )


def _check_memory(
    sources: Sequence[Source], orders: Sequence[Order], n_lanes: Sequence[int]
) -> None:
    kept = sum(order.kept_bytes for order in orders)
    windows = sum(map(buffer_bytes, sources, orders, n_lanes))
    available = _available_memory()
    if available is not None and windows + kept > available:
        window_chunks = max(order.most_rounds for order in orders)
        fitting = max(1, window_chunks * (available - kept) // windows)
        raise ValueError(
            f"two windows of data.window_chunks = {window_chunks}, and the order of "
            f"all chunks, take {(windows + kept) / 1e9:.1f} GB, and "
            f"{available / 1e9:.1f} GB of memory are free: set data.window_chunks = "
            f"{fitting}, which mixes less, or harvest with a smaller rows_per_chunk"
        )


def _available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            values = dict(line.split(":") for line in file)
        return int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
