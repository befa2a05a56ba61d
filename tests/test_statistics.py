"""Statistics of a store: float64, and the same bits however many processes wrote it."""

import ml_dtypes
import numpy as np
import pytest
import stores

from sae_jax.store import Contexts, Folder, StoreWriter, open_store, statistics
from sae_jax.store.records import merge_records

T, WIDTH, PER_SHARD, PER_CHUNK = 16, 24, 512, 32
SITE = "resid_post.0"
N_ROWS = 9 * PER_SHARD + 5 * PER_CHUNK


def _write(path, acts_nd, n_processes=1):
    """A store of these train rows, whose shards are written in an odd order."""
    manifest = stores.make_manifest({SITE: WIDTH}, T, PER_SHARD, PER_CHUNK)
    tokens = np.zeros((len(acts_nd) // T, T), np.int32)
    n = manifest.contexts_per_shard
    blocks = [
        Contexts("train", tokens[i : i + n], tokens[i : i + n])
        for i in range(0, len(tokens), n)
    ]
    for process in range(n_processes):
        with StoreWriter(Folder(path), manifest, process, n_processes) as writer:
            if not writer.manifest.is_packed:
                writer.write_text(stores.Blocks(blocks, ["a"]))
            acts = {"train": {SITE: acts_nd}}
            stores.write_shards(writer, acts, writer.missing_shards()[::-1])
            is_last = writer.finish()
    assert is_last
    return path


@pytest.fixture(scope="module")
def acts_nd():
    """Rows with an outlier dimension, another with a mean of 1,000, and a constant."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((N_ROWS, WIDTH))
    rows[:, 3] *= 300
    rows[:, 5] += 1000
    rows[:, 6] = 3
    return rows.astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("n_processes", [2, 4, 7])
def test_the_bits_are_those_of_one_process(acts_nd, tmp_path, n_processes):
    one = _write(tmp_path / "one", acts_nd)
    many = _write(tmp_path / "many", acts_nd, n_processes)
    name = f"statistics/{SITE}.npz"
    assert (one / name).read_bytes() == (many / name).read_bytes()
    assert open_store(one).manifest == open_store(many).manifest


def test_statistics_are_those_of_numpy_over_all_rows(acts_nd, tmp_path):
    found = open_store(_write(tmp_path / "store", acts_nd)).statistics(SITE)
    rows = acts_nd.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    size = np.sqrt((rows**2).mean(0))  # a mean may be near zero by itself
    assert (np.abs(found.mean_d - rows.mean(0)) <= 1e-12 * size).all()
    np.testing.assert_allclose(found.second_moment_d, size**2, rtol=1e-12)
    assert (np.abs(found.variance_d - rows.var(0)) <= 1e-12 * size**2).all()
    assert found.variance_d[6] == 0
    assert found.mean_norm == pytest.approx(norms.mean(), rel=1e-12)
    assert found.mean_square_norm == pytest.approx((norms**2).mean(), rel=1e-12)
    by_position = norms.reshape(-1, T)
    np.testing.assert_allclose(found.norm_t, by_position.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.largest_norm_t, by_position.max(0), rtol=1e-15)


def test_merging_leaves_nothing_to_the_order_of_arrival(acts_nd, tmp_path, monkeypatch):
    path = _write(tmp_path / "store", acts_nd)
    folder, manifest = Folder(path), open_store(path).manifest
    shards = range(len(manifest.row_shards))
    merged = [
        statistics.to_bytes(merge_records(folder, manifest, SITE, order))
        for order in (shards, reversed(shards))
    ]
    assert merged[0] == merged[1]
    # All are asked for at once: in a bucket each takes long to come.
    monkeypatch.setattr(Folder, "read", None)
    again = merge_records(folder, manifest, SITE, shards)
    assert statistics.to_bytes(again) == merged[0]


@pytest.mark.parametrize("ratio, tolerance", [(1e2, 1e-10), (1e4, 1e-6)])
def test_a_mean_far_above_the_spread_leaves_the_variance(ratio, tolerance):
    """E[x^2] - mean^2 in float64: at a mean of 1e4 deviations some 1e-8 is lost."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((60_000, 4))
    rows = noise + ratio
    sums = statistics.Sums.empty(4, 1)
    for part in np.array_split(rows, 7):
        sums = sums + statistics.add_up(part, np.zeros(len(part), int), 1)
    variance_d = statistics.finish(sums).variance_d
    expected = (rows - ratio).var(0)
    np.testing.assert_allclose(variance_d, expected, rtol=tolerance)


def test_any_flipped_bit_of_a_file_is_an_error_or_harmless():
    sums = statistics.add_up(np.ones((2, 3)), np.array([0, 1]), 4)
    data = statistics.to_bytes(sums)
    n_refused = 0
    for place in range(0, 8 * len(data), 5):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        try:
            found = statistics.read_sums(bytes(damaged))
        except (KeyError, OSError, TypeError, ValueError):
            n_refused += 1
        else:
            assert statistics.to_bytes(found) == data
    assert n_refused > 8 * len(data) // 5 // 2


def test_bfloat16_rows_of_a_mean_far_above_the_spread():
    """The sums of such rows and of their squares are exact."""
    for rare in (3, 40):
        rows = np.full((60_000, 1), 256, ml_dtypes.bfloat16)
        rows[:: 60_000 // rare] = 258
        share = (rows == 258).mean()
        sums = statistics.add_up(rows, np.zeros(len(rows), int), 1)
        variance = statistics.finish(sums).variance_d[0]
        assert 256 / variance**0.5 > 4e3
        assert variance == pytest.approx(4 * share * (1 - share), rel=1e-6)
