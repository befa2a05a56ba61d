"""Batches of rows in the order of training, from stores to the device mesh.

The rows of a step depend on the seed and the step alone (`order.py`), for any number of
processes, so a loader's state is the step. A batch of B rows is woven from V lanes: it
has B / V rows of lane 0, then those of lane 1, and so on. A process loads the lanes
that its devices hold, so that the arrays are the same, bit by bit, for any number of
processes. With several sources, sites of one store or of several, each fills some of
the lanes (`sources.py`) and has epochs of its own.

Host memory: two windows of all lanes, 2 V W R D bytes each in bfloat16 and V W R
(D + 4) in int8, divided by the number of processes (R rows in a chunk, W chunks in a
window); and beside them some batches. 2.1 GB for V = 8, W = 1024, R = 64, D = 1024.
Unless it is set, W is as small as mixing allows, and grows with the batch
(`mixing.py`).
"""

from sae_jax.loader.batches import (
    check_loader,
    find_orders,
    load_rows,
    train_batches,
)
from sae_jax.loader.feed import Feed, StoreFeed, find_width
from sae_jax.loader.mixing import (
    Mixing,
    choose_window_chunks,
    describe_mixing,
    expect_sequences,
    measure_mixing,
)
from sae_jax.loader.order import Order
from sae_jax.loader.place import find_lanes, n_loading_processes
from sae_jax.loader.sources import (
    Source,
    find_sources,
    list_stores,
    mix_statistics,
    sample_rows,
    sample_sources,
)

__all__ = [
    "Feed",
    "Mixing",
    "Order",
    "Source",
    "StoreFeed",
    "check_loader",
    "choose_window_chunks",
    "describe_mixing",
    "expect_sequences",
    "find_lanes",
    "find_orders",
    "find_sources",
    "find_width",
    "list_stores",
    "load_rows",
    "measure_mixing",
    "mix_statistics",
    "n_loading_processes",
    "sample_rows",
    "sample_sources",
    "train_batches",
]
