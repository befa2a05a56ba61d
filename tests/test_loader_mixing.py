"""Mixing: windows by default see nearly the text that a uniform draw sees."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from sae_jax import loader
from sae_jax.config import DataConfig


class Text:
    """What of a store tells its text: documents of many lengths, one after another."""

    dtype, is_local = "bfloat16", True

    def __init__(self, n_chunks, rows_per_chunk, context_length, document_rows):
        self.path, self.context_length = f"text-{id(self)}", context_length
        self.manifest = SimpleNamespace(rows_per_chunk=rows_per_chunk)
        self._n_rows = n_chunks * rows_per_chunk
        rng = np.random.default_rng(0)
        ends = rng.exponential(document_rows, 2 * self._n_rows // document_rows + 99)
        self._ends = np.cumsum(1 + ends.astype(int))

    def site(self, name):
        return name or "resid_post.0"

    def width(self, site):
        return 4

    def rows(self, split):
        return self._n_rows

    def read_positions(self, ranges):
        rows = np.concatenate([np.arange(start, start + n) for start, n in ranges])
        return np.stack(np.divmod(rows, self.context_length), 1)

    def read_documents(self, sequences):
        rows = sequences[:, None] * self.context_length + np.arange(self.context_length)
        return np.searchsorted(self._ends, rows, side="right")


def measure(stores, data, n_steps=50):
    sources = loader.find_sources(data, stores)
    orders = loader.find_orders(sources, data, seed=0)
    per_epoch = orders[0].n_chunks * orders[0].rows_per_chunk // data.batch_rows
    steps = np.linspace(0, 3 * per_epoch, n_steps, dtype=int).tolist()
    mixing = loader.measure_mixing(sources, data, orders, steps)
    lengths = [store.context_length for store in stores]
    return mixing, loader.expect_sequences(orders, data, lengths), orders


TEXTS = {
    "contexts of many chunks": Text(8192, 16, 128, 300),
    "chunks of many contexts": Text(2048, 64, 8, 300),
    "documents of less than a chunk": Text(4096, 32, 64, 10),
    "long documents": Text(4096, 32, 64, 5000),
    "contexts and chunks that do not fit": Text(4099, 24, 100, 50),
    "few chunks": Text(64, 64, 128, 200),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("batch_rows, lanes", [(128, 8), (512, 4), (2048, 32)])
def test_batches_see_nearly_what_a_uniform_draw_sees(text, batch_rows, lanes):
    data = DataConfig(batch_rows=batch_rows, lanes=lanes)
    mixing, expected, _ = measure([text], data)
    assert expected[0] >= 0.9 * expected[1]
    assert mixing.sequences >= 0.89 * mixing.uniform_sequences
    assert mixing.documents >= 0.89 * mixing.uniform_documents
    found = (mixing.sequences, mixing.uniform_sequences)
    np.testing.assert_allclose(found, expected, rtol=0.03)
    assert str(mixing).startswith(f"{mixing.sequences:,.0f} sequences (")


def test_windows_are_no_larger_than_that_takes():
    data, text = DataConfig(batch_rows=256, lanes=8), TEXTS["long documents"]
    mixing, _, (order,) = measure([text], data)
    half = dataclasses.replace(data, window_chunks=order.window_chunks // 2)
    fewer, _, _ = measure([text], half)
    assert mixing.sequences >= 0.89 * mixing.uniform_sequences
    assert fewer.sequences < 0.85 * fewer.uniform_sequences
    assert order.windows_per_epoch > 2


def test_windows_grow_with_the_batch_up_to_the_whole_store():
    text, chunks = TEXTS["long documents"], []
    for batch_rows in (64, 256, 1024, 4096):
        data = DataConfig(batch_rows=batch_rows, lanes=8)
        sources = loader.find_sources(data, [text])
        chunks.append(loader.choose_window_chunks(sources, data))
    assert 1 < chunks[0] < chunks[1] < chunks[2] <= chunks[3] == 4096 // 8
    assert loader.choose_window_chunks(
        sources, dataclasses.replace(data, window_chunks=3)
    ) == 3


def test_mixed_sources_are_mixed_as_well():
    data = DataConfig(batch_rows=256, lanes=8, weights=(3, 1))
    stores = [TEXTS["long documents"], TEXTS["chunks of many contexts"]]
    mixing, expected, orders = measure(stores, data)
    assert mixing.sequences >= 0.89 * mixing.uniform_sequences
    found = (mixing.sequences, mixing.uniform_sequences)
    np.testing.assert_allclose(found, expected, rtol=0.03)
    line = loader.describe_mixing(orders, data, [128, 8])
    assert line.startswith("a batch of 256 rows is drawn from a window of ")
