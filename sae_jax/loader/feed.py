"""What training asks for its rows: of stores here, of a subject in `sae_jax.stream`."""

import dataclasses
import hashlib
import json
from collections.abc import Generator, Sequence
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from sae_jax.config import DataConfig
from sae_jax.loader.batches import check_loader, find_orders, train_batches
from sae_jax.loader.mixing import (
    choose_window_chunks,
    describe_mixing,
    measure_mixing,
)
from sae_jax.loader.place import n_loading_processes
from sae_jax.loader.sources import (
    find_sources,
    list_stores,
    mix_statistics,
    sample_sources,
)
from sae_jax.store import Statistics, Store, open_store


_MEASURED_STEPS = (0, 1000)
_MOST_MEASURED_ROWS = 2**14  # some tenths of a second, and 128 MB, for each step


class Feed(Protocol):
    """Where the rows of a run come from.

    `data` is the run's config with every field that was left open, `site` where its
    rows were read, `width` D, and `identity` a hash of what the rows are made of.
    `site` and `width` are known at once; whatever else is first asked for may take
    hours, so a run is checked by these alone before.
    """

    site: str
    width: int

    @property
    def data(self) -> DataConfig: ...

    @property
    def identity(self) -> str: ...

    def __str__(self) -> str: ...

    def describe(self) -> str:
        """How batches are mixed, one line."""

    def epochs(self, n_rows: int) -> float:
        """How often so many rows go through it; of several sources, through the one
        that is gone through most."""

    def statistics(self) -> Statistics:
        """Of all its rows."""

    def sample(self, n_rows: int, seed: int) -> np.ndarray:
        """Some of its rows, float32 [n, D]."""

    def batches(
        self, start_step: int, n_steps: int
    ) -> Generator[jax.Array, None, None]:
        """The batches [B, D] bfloat16 of these steps, over the mesh's data axis."""


def find_width(data: DataConfig) -> int:
    """D of the rows that `data.store` names; fails as `StoreFeed` does."""
    stores = [open_store(path) for path in list_stores(data)]
    first = find_sources(data, stores)[0]
    return first.store.width(first.site)


class StoreFeed:
    """Batches from the stores that `data.store` names; a `Feed`.

    Raises FileNotFoundError or ValueError, one line, for stores that are not there, do
    not fit each other, or cannot fill batches.
    """

    def __init__(
        self,
        data: DataConfig,
        mesh: Mesh,
        seed: int,
        stores: Sequence[Store] | None = None,
    ):
        if stores is None:
            if not data.store:
                raise ValueError(
                    "data.store is not set: give the folder of a store, or a "
                    "stream.subject to read without one"
                )
            stores = [open_store(path) for path in list_stores(data)]
        self._mesh, self._seed = mesh, seed
        self._sources = find_sources(data, stores)
        check_loader(self._sources, data, n_loading_processes(mesh, data.batch_rows))
        first = self._sources[0]
        self.width = first.store.width(first.site)
        sites = [source.site for source in self._sources]
        if len(stores) == len(sites) and len(set(sites)) == 1:
            sites = sites[:1]
        self.site = ",".join(sites)
        self.data = dataclasses.replace(
            data,
            site=self.site,
            store=",".join(store.path for store in stores),
            window_chunks=choose_window_chunks(self._sources, data),
            heldout_every=_find_heldout(stores, data.heldout_every),
        )
        self.identity = ",".join(_identify(store) for store in stores)

    def __str__(self) -> str:
        return ", ".join(map(str, self._sources))

    def describe(self) -> str:
        orders = find_orders(self._sources, self.data, self._seed)
        lengths = [source.store.context_length for source in self._sources]
        expected = describe_mixing(orders, self.data, lengths)
        is_local = all(source.store.is_local for source in self._sources)
        if not is_local or self.data.batch_rows > _MOST_MEASURED_ROWS:
            return expected  # each row of a batch may be a read or a request
        mixing = measure_mixing(self._sources, self.data, orders, _MEASURED_STEPS)
        return f"{expected}; measured: {mixing}"

    def epochs(self, n_rows: int) -> float:
        lane_rows = n_rows / self.data.lanes
        return max(
            len(source.lanes) * lane_rows / source.store.rows("train")
            for source in self._sources
        )

    def statistics(self) -> Statistics:
        return mix_statistics(self._sources)

    def sample(self, n_rows: int, seed: int) -> np.ndarray:
        return sample_sources(self._sources, n_rows, seed)

    def batches(
        self, start_step: int, n_steps: int
    ) -> Generator[jax.Array, None, None]:
        return train_batches(
            self._sources, self.data, self._mesh, self._seed, start_step, n_steps
        )


def _find_heldout(stores: Sequence[Store], wanted: int | None) -> int:
    """What all stores hold out; else some would train on what others hold out."""
    first = stores[0].manifest.heldout_every if wanted is None else wanted
    for store in stores:
        if store.manifest.heldout_every != first:
            raise ValueError(
                f"{store.path} holds out one document in "
                f"{store.manifest.heldout_every}, and not {first} as "
                + ("data.heldout_every says" if wanted else stores[0].path)
                + ": harvest it with that heldout_every"
            )
    return first


def _identify(store: Store) -> str:
    """A hash of what the manifest says, less the path that the subject was read at."""
    values = dataclasses.asdict(store.manifest)
    values["subject"] = store.manifest.subject["identity"]
    text = json.dumps(values, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
