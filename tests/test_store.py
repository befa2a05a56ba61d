"""Stores: what is written is read back, and what is no store is refused."""

import json

import ml_dtypes
import numpy as np
import pytest
import stores
from numbered_stores import (
    NAMES,
    PER_SHARD,
    ROWS,
    SITES,
    T,
    make_blocks,
    make_manifest,
    row_ids,
    write_store,
)

from sae_jax.store import Stored, open_store


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(path):
    return write_store(path, ROWS, SITES)


def test_round_trip(store):
    assert store.sites == list(SITES)
    assert store.rows("train") == ROWS["train"]
    assert store.shards("train") == [(0, 64), (64, 64), (128, 32)]
    assert store.shards("heldout") == [(192, 64), (256, 16)]
    blocks = make_blocks(ROWS, SITES)
    for split in ROWS:
        ranges = store.shards(split)
        for site, width in SITES.items():
            assert store.width(site) == width
            rows = store.read_ranges(site, ranges)
            assert rows.dtype == ml_dtypes.bfloat16
            written = [acts[site] for part, acts, *_ in blocks if part == split]
            assert rows.tobytes() == np.concatenate(written).tobytes()
        sequences = store.sequences(split)
        tokens = np.concatenate([block[2] for block in blocks if block[0] == split])
        np.testing.assert_array_equal(store.read_tokens(sequences), tokens)
        np.testing.assert_array_equal(store.read_documents(sequences), tokens % 3)
        positions = store.read_positions(ranges).reshape(-1, T, 2)
        assert (positions[..., 0] == sequences[:, None]).all()
        assert (positions[..., 1] == np.arange(T)).all()
    assert store.document_name(2) == "c"


def test_a_read_may_cross_shards_but_not_leave_the_rows(store):
    rows = store.read_ranges("resid_post.0", [(60, 80)])
    np.testing.assert_array_equal(row_ids(rows), np.arange(60, 140))
    for start, n in ((158, 3), (-1, 4), (272, 1), (320, 1)):
        with pytest.raises(ValueError, match="no rows"):
            store.read_ranges("resid_post.0", [(start, n)])


def test_reads_into_a_buffer(store):
    buffer = np.zeros((32, 4), ml_dtypes.bfloat16)
    assert store.read_ranges("resid_post.0", [(64, 16), (0, 16)], buffer) is buffer
    np.testing.assert_array_equal(row_ids(buffer), [*range(64, 80), *range(16)])
    with pytest.raises(ValueError, match="buffer"):
        store.read_ranges("resid_post.0", [(0, 16)], buffer)


def test_int8_is_not_read_into_another_dtype(path):
    store = write_store(path, {"train": 16}, dtype="int8")
    with pytest.raises(ValueError, match="buffer is float32 .*, not bfloat16"):
        store.read_ranges("resid_post.0", [(0, 16)], np.zeros((16, 4), np.float32))


def test_statistics_are_those_of_the_train_rows(store):
    for site in SITES:
        acts = store.read_ranges(site, store.shards("train")).astype(np.float64)
        norms = np.linalg.norm(acts, axis=1)
        statistics = store.statistics(site)
        assert statistics.rows == len(acts) == ROWS["train"]
        np.testing.assert_allclose(statistics.mean_d, acts.mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics.variance_d, acts.var(0), rtol=1e-9)
        np.testing.assert_allclose(
            statistics.second_moment_d, (acts**2).mean(0), rtol=1e-12
        )
        assert statistics.mean_norm == pytest.approx(norms.mean(), rel=1e-12)
        square = (norms**2).mean()
        assert statistics.mean_square_norm == pytest.approx(square, rel=1e-12)
        by_position = norms.reshape(-1, T)
        np.testing.assert_allclose(statistics.norm_t, by_position.mean(0), rtol=1e-12)
        np.testing.assert_array_equal(statistics.largest_norm_t, by_position.max(0))


def test_site_names(store, tmp_path):
    with pytest.raises(ValueError, match="more than one site: .*resid_post.0, mlp_act"):
        store.site()
    with pytest.raises(ValueError, match="no site 'resid_post.7'"):
        store.site("resid_post.7")
    assert write_store(tmp_path / "one", {"train": 16}).site() == "resid_post.0"


def test_a_store_may_be_wholly_held_out(path):
    store = write_store(path, {"heldout": 32})
    assert store.shards("train") == [] and len(store.sequences("train")) == 0
    statistics = store.statistics("resid_post.0")
    assert statistics.rows == 0 and statistics.mean_d.shape == (4,)
    assert row_ids(store.read_ranges("resid_post.0", [(0, 32)]))[-1] == 31


def test_zeros_are_data(path):
    zeros = np.zeros((PER_SHARD // T, T), np.int32)
    acts = {"resid_post.0": np.zeros((PER_SHARD, 4), ml_dtypes.bfloat16)}
    manifest = make_manifest({"resid_post.0": 4})
    stores.write(path, manifest, [("train", acts, zeros, zeros)], NAMES)
    assert not open_store(path).read_ranges("resid_post.0", [(0, PER_SHARD)]).any()


def test_int8_rows_are_within_half_a_scale(path, tmp_path):
    store = write_store(path, ROWS, SITES, dtype="int8")
    exact = write_store(tmp_path / "exact", ROWS, SITES)
    for site in SITES:
        ranges = [(200, 30), *store.shards("train")]
        rows = exact.read_ranges(site, ranges).astype(np.float32)
        stored = np.empty(rows.shape, np.int8)
        scales = np.empty(len(rows), np.float32)
        store.read_stored(site, ranges, stored, scales)
        np.testing.assert_allclose(scales, np.abs(rows).max(1) / 127, rtol=1e-6)
        error = np.abs(stored * scales[:, None] - rows)
        assert (error <= 0.5001 * scales[:, None]).all() and error.any()
        read = store.read_ranges(site, ranges)
        expected = (stored * scales[:, None]).astype(ml_dtypes.bfloat16)
        assert read.tobytes() == expected.tobytes()
        mean_d = store.read_ranges(site, store.shards("train")).astype(float).mean(0)
        np.testing.assert_allclose(store.statistics(site).mean_d, mean_d, rtol=1e-12)
    zero = Stored.encode(np.zeros((2, 4), ml_dtypes.bfloat16), "int8")
    assert not zero.decode().any()


def test_refuses_what_is_not_a_complete_store(store, path, tmp_path):
    with pytest.raises(FileNotFoundError, match="no store at"):
        open_store(tmp_path / "nowhere")
    file = path / "manifest.json"
    text = file.read_text()
    for change, message in (
        ({"complete": False}, "still being written .5 of 5 shards"),
        ({"complete": False, "is_packed": False}, "its text is not packed"),
        ({"version": 9}, "version 9, .* upgrade sae_jax"),
        ({"version": 1}, "version 1, .* delete the folder and harvest again"),
        ({"surprise": 1}, "not a store's manifest"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"sites": {"../elsewhere.0": 4}}, "no site is called"),
        ({"sites": {"../../escape": 4}}, "no site is called '../../escape'"),
    ):
        file.write_text(json.dumps(json.loads(text) | change))
        with pytest.raises(ValueError, match=message) as error:
            open_store(path)
        assert str(path) in str(error.value)
    file.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="not a store's manifest"):
        open_store(path)
