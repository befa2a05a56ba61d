"""Stores: what is written is read back, and nothing that is damaged is read at all."""

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from sae_jax.files import lock_folder
from sae_jax.store import Manifest, Shard, StoreWriter, open_store, read_begun
from sae_jax.store import writer as store_writer

T, PER_SHARD, PER_CHUNK = 8, 64, 16


def make_manifest(rows, sites, per_shard=PER_SHARD, per_chunk=PER_CHUNK, t=T):
    """A plan for `rows` of each split, which need not fill their last shard."""
    return Manifest(
        subject={"name": "fake", "identity": "0"},
        tokenizer="0",
        corpus="0",
        sites=sites,
        context_length=t,
        heldout_every=5,
        max_rows=None,
        seed=0,
        rows_per_shard=per_shard,
        rows_per_chunk=per_chunk,
        n_documents=3,
        rows=rows,
        dropped_tokens={"train": 0, "heldout": 0},
        shards=[
            {"split": split, "rows": min(per_shard, n - start)}
            for split, n in rows.items()
            for start in range(0, n, per_shard)
        ],
    )


def make_shard(manifest, index, rng=None):
    """A shard whose rows tell their index: columns 0 to 2 are its base-256 digits."""
    n = manifest.shards[index]["rows"]
    t = manifest.context_length
    row = index * manifest.rows_per_shard + np.arange(n)
    acts = {}
    for site, width in manifest.sites.items():
        rng = rng or np.random.default_rng(index)
        acts[site] = rng.standard_normal((n, width)).astype(ml_dtypes.bfloat16)
        digits = np.stack([row % 256, row // 256 % 256, row // 65536], 1)
        acts[site][:, :3] = digits.astype(ml_dtypes.bfloat16)
    tokens = row.reshape(-1, t).astype(np.int32)
    return Shard(acts, tokens, tokens % 3)


def row_ids(acts):
    """The rows that `make_shard` numbered."""
    digits = np.asarray(acts)[..., :3].astype(np.int64)
    return digits @ np.array([1, 256, 65536])


def write_store(path, rows, sites=None, **sizes):
    manifest = make_manifest(rows, sites or {"resid_post.0": 4}, **sizes)
    with StoreWriter(path, manifest, ["a", "b", "c"]) as writer:
        for index in range(writer.manifest.shards_written, len(manifest.shards)):
            writer.write_shard(make_shard(manifest, index))
        writer.finish()
    return open_store(path)


def read_folder(path):
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


SITES = {"resid_post.0": 4, "mlp_act.1": 6}
ROWS = {"train": 2 * PER_SHARD + 24, "heldout": PER_SHARD + 8}


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "store", ROWS, SITES)


def test_round_trip(store):
    assert store.sites == list(SITES)
    assert store.rows("train") == ROWS["train"]
    assert store.shards("train") == [(0, 64), (64, 64), (128, 24)]
    assert store.shards("heldout") == [(192, 64), (256, 8)]
    assert store.chunks("train")[-2:] == [(112, 16), (128, 16)]
    shards = store.shards("train") + store.shards("heldout")
    for index, (start, n) in enumerate(shards):
        shard = make_shard(store.manifest, index)
        for site, width in SITES.items():
            assert store.width(site) == width
            rows = store.read(site, start, start + n)
            assert rows.dtype == ml_dtypes.bfloat16
            assert rows.tobytes() == shard.acts[site].tobytes()
        sequences = np.arange(start // T, (start + n) // T)
        np.testing.assert_array_equal(store.read_tokens(sequences), shard.tokens)
        np.testing.assert_array_equal(store.read_documents(sequences), shard.documents)
        positions = store._arrays["positions"][start : start + n].read().result()
        row = start + np.arange(n)
        np.testing.assert_array_equal(positions, np.stack([row // T, row % T], 1))
    assert store.document_name(2) == "c"


def test_a_read_may_cross_shards_but_not_leave_the_rows(store):
    np.testing.assert_array_equal(
        row_ids(store.read("resid_post.0", 60, 140)), np.arange(60, 140)
    )
    for start, stop in ((150, 153), (-1, 4), (264, 265), (320, 321)):
        with pytest.raises(ValueError, match="no rows"):
            store.read("resid_post.0", start, stop)


def test_reads_into_a_buffer(store):
    buffer = np.zeros((32, 4), ml_dtypes.bfloat16)
    assert store.read_ranges("resid_post.0", [(64, 16), (0, 16)], buffer) is buffer
    np.testing.assert_array_equal(row_ids(buffer), [*range(64, 80), *range(16)])
    with pytest.raises(ValueError, match="into"):
        store.read("resid_post.0", 0, 16, buffer)


def test_sequences_of_any_order(store):
    sequences = store.sequences("heldout")
    np.testing.assert_array_equal(sequences, np.arange(192 // T, 264 // T))
    order = np.random.default_rng(0).permutation(sequences)[:5]
    np.testing.assert_array_equal(store.read_tokens(order)[:, 0], order * T)
    with pytest.raises(ValueError, match="no rows"):
        store.read_tokens([19])  # in the unfilled part of the last train shard


def test_statistics_are_those_of_the_train_rows(store):
    for site in SITES:
        rows = [store.read(site, i, i + n) for i, n in store.shards("train")]
        acts = np.concatenate(rows).astype(np.float64)
        norms = np.linalg.norm(acts, axis=1)
        statistics = store.statistics(site)
        assert statistics.rows == len(acts) == ROWS["train"]
        np.testing.assert_allclose(statistics.mean_d, acts.mean(0), rtol=1e-12)
        assert statistics.mean_norm == pytest.approx(norms.mean(), rel=1e-12)
        square = (norms**2).mean()
        assert statistics.mean_square_norm == pytest.approx(square, rel=1e-12)


def test_site_names(store, tmp_path):
    with pytest.raises(ValueError, match="more than one site: .*resid_post.0, mlp_act"):
        store.site()
    with pytest.raises(ValueError, match="no site 'resid_post.7'"):
        store.site("resid_post.7")
    assert write_store(tmp_path / "one", {"train": 8}).site() == "resid_post.0"


def test_a_store_may_be_wholly_held_out(tmp_path):
    store = write_store(tmp_path, {"train": 0, "heldout": 24})
    assert store.shards("train") == [] and len(store.sequences("train")) == 0
    statistics = store.statistics("resid_post.0")
    assert statistics.rows == 0 and statistics.mean_d.shape == (4,)
    assert row_ids(store.read("resid_post.0", 0, 24))[-1] == 23


def test_zeros_are_data(tmp_path):
    manifest = make_manifest({"train": PER_SHARD}, {"resid_post.0": 4})
    writer = StoreWriter(tmp_path, manifest, ["a", "b", "c"])
    zeros = np.zeros((PER_SHARD // T, T), np.int32)
    acts = {"resid_post.0": np.zeros((PER_SHARD, 4), ml_dtypes.bfloat16)}
    writer.write_shard(Shard(acts, zeros, zeros))
    writer.finish()
    assert not open_store(tmp_path).read("resid_post.0", 0, PER_SHARD).any()


def list_shard_files(store):
    return sorted(file for file in store.path.rglob("c/*/0"))


def test_a_deleted_or_short_shard_is_named_on_open(store):
    files = list_shard_files(store)
    assert len(files) == 5 * 5
    for file in files:
        contents = file.read_bytes()
        file.unlink()
        with pytest.raises(ValueError, match="missing") as error:
            open_store(store.path)
        assert str(file) in str(error.value)
        file.write_bytes(contents[:-1])
        short = f"has {len(contents) - 1} bytes, not"
        with pytest.raises(ValueError, match=short) as error:
            open_store(store.path)
        assert str(file) in str(error.value)
        file.write_bytes(contents)
    open_store(store.path)


@pytest.mark.parametrize("place", [0, 1000, -1])
def test_a_flipped_byte_is_an_error_that_names_the_file(store, place):
    for name in ("acts/mlp_act.1", "tokens", "documents"):
        file = store.path / name / "c" / "1" / "0"
        contents = bytearray(file.read_bytes())
        contents[place % len(contents) if place < 0 else place % 100] ^= 1
        file.write_bytes(contents)
        again = open_store(store.path)
        with pytest.raises(ValueError, match="damaged shard") as error:
            if name == "tokens":
                again.read_tokens([8, 9])
            elif name == "documents":
                again.read_documents([8, 9])
            else:
                again.read("mlp_act.1", 0, 128)
        assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_a_shard_deleted_after_open_is_never_zeros(store):
    file = store.path / "acts/mlp_act.1/c/1/0"
    file.unlink()
    with pytest.raises(ValueError, match="damaged shard") as error:
        store.read("mlp_act.1", 64, 80)
    assert str(file) in str(error.value)


def test_refuses_what_is_not_a_complete_store(store, tmp_path):
    with pytest.raises(FileNotFoundError, match="no store at"):
        open_store(tmp_path / "nowhere")
    file = store.path / "manifest.json"
    text = file.read_text()
    for change, message in (
        ({"complete": False}, "still being written"),
        ({"version": 9}, "version 9"),
        ({"surprise": 1}, "not a store's manifest"),
        ({"sites": {"../elsewhere.0": 4}}, "no site is called"),
        ({"sites": {"../../escape": 4}}, "no site is called '../../escape'"),
    ):
        file.write_text(json.dumps(json.loads(text) | change))
        with pytest.raises(ValueError, match=message):
            open_store(store.path)
    file.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="not a store's manifest"):
        open_store(store.path)


def test_refuses_a_folder_that_is_not_a_store(tmp_path):
    manifest = make_manifest({"train": 8}, {"resid_post.0": 4})
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="not a store and not empty.*thesis.tex"):
        StoreWriter(tmp_path, manifest, [])
    with pytest.raises(ValueError, match="is a file"):
        StoreWriter(tmp_path / "thesis.tex", manifest, [])


def test_another_setting_is_named(store):
    manifest = make_manifest(ROWS, SITES)
    manifest.seed = 1
    with pytest.raises(ValueError, match="begun with seed = 0, this harvest has 1"):
        StoreWriter(store.path, manifest, [])


def test_a_second_writer_is_refused_until_the_first_ends(store, tmp_path):
    path = tmp_path / "shared"
    manifest = make_manifest(ROWS, SITES)
    first = StoreWriter(path, manifest, ["a", "b", "c"])
    first.write_shard(make_shard(manifest, 0))
    with pytest.raises(ValueError, match="in use by another process: wait") as error:
        StoreWriter(path, manifest, ["a", "b", "c"])
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    first.close()
    write_store(path, ROWS, SITES)
    assert read_folder(path) == read_folder(store.path)
    StoreWriter(path, manifest, ["a", "b", "c"]).close()  # the last one has let go


def test_a_folder_with_only_a_lock_is_empty(tmp_path):
    lock_folder(tmp_path).close()
    assert read_begun(tmp_path) is None


def test_remote_folders_are_refused():
    manifest = make_manifest({"train": 8}, {"resid_post.0": 4})
    for path in ("gs://bucket/store", Path("s3://bucket/store")):
        for use in (open_store, read_begun, lambda p: StoreWriter(p, manifest, [])):
            with pytest.raises(ValueError, match="local folders only"):
                use(path)


class Stop(Exception):
    pass


@pytest.mark.parametrize("n_replaced", range(9))
def test_stopped_at_any_file_and_resumed_is_byte_identical(
    store, tmp_path, monkeypatch, n_replaced
):
    """test_harvest has the same for a process that is killed."""
    replace, n_left = os.replace, n_replaced

    def stop(*arguments):
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise Stop
        replace(*arguments)

    path = tmp_path / "stopped"
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(Stop):
        write_store(path, ROWS, SITES)
    monkeypatch.undo()
    assert any(path.iterdir())
    with pytest.raises((FileNotFoundError, ValueError)):
        open_store(path)
    write_store(path, ROWS, SITES)
    assert read_folder(path) == read_folder(store.path)


def test_what_a_stopped_write_left_is_not_merged(store, tmp_path):
    path = tmp_path / "stopped"
    manifest = make_manifest(ROWS, SITES)
    writer = StoreWriter(path, manifest, ["a", "b", "c"])
    for index in (0, 1):
        writer.write_shard(make_shard(manifest, index))
    writer._commit()
    writer.close()
    torn = path / "acts/mlp_act.1/c/2/0"  # a shard that is partly filled
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"torn")
    write_store(path, ROWS, SITES)
    assert read_folder(path) == read_folder(store.path)


def test_a_full_disk_is_one_line_and_resumable(store, tmp_path, monkeypatch):
    path = tmp_path / "full"
    write_whole, n_left = store_writer.write_whole, 4

    def fail(file, data):
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_whole(file, data)

    monkeypatch.setattr(store_writer, "write_whole", fail)
    with pytest.raises(OSError, match="is full, with . of 5 shards written") as error:
        write_store(path, ROWS, SITES)
    assert error.value.errno == errno.ENOSPC and "\n" not in str(error.value)
    monkeypatch.undo()
    write_store(path, ROWS, SITES)
    assert read_folder(path) == read_folder(store.path)


def test_tensorstore_says_that_a_disk_is_full():
    text = "RESOURCE_EXHAUSTED: Error writing local file [os_error_code='28']"
    assert store_writer._is_full_disk(ValueError(text))
    assert not store_writer._is_full_disk(ValueError("[os_error_code='2']"))


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10**6))
    path = tmp_path / "a" / "b"
    with pytest.raises(OSError, match="needs 27 MB more, the disk .* has 1 MB free"):
        write_store(path, {"train": 10**6})
    assert not path.parent.exists()


def test_values_that_are_not_numbers_are_refused(tmp_path):
    manifest = make_manifest({"train": PER_SHARD}, {"resid_post.0": 4})
    shard = make_shard(manifest, 0)
    shard.acts["resid_post.0"][5, 2] = np.nan
    writer = StoreWriter(tmp_path, manifest, ["a", "b", "c"])
    with pytest.raises(ValueError, match="site resid_post.0"):
        writer.write_shard(shard)
