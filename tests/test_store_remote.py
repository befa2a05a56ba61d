"""Stores in a bucket, on a real server on loopback that can be cut off."""

import errno

import gcs_server
import numpy as np
import pytest
import stores
from numbered_stores import (
    NAMES,
    ROWS,
    SITES,
    T,
    begin,
    gather_rows,
    make_blocks,
    make_manifest,
)
from s3_server import bucket, server  # noqa: F401

from sae_jax.config import DataConfig
from sae_jax.inspection import inspect
from sae_jax.loader import StoreFeed
from sae_jax.mesh import single_device_mesh
from sae_jax.store import Folder, Text, open_store
from sae_jax.store.checked import CheckedFiles, Piece
from sae_jax.store.verify import verify

pytest.importorskip("moto")


def write_store(path):
    blocks = make_blocks(ROWS, SITES)
    return open_store(stores.write(path, make_manifest(SITES), blocks, NAMES))


def read_all(path):
    files = Folder(path)
    return {name: files.read(name) for name in files.list() if ".lock" not in name}


def test_a_bucket_holds_the_same_bytes_as_a_disk(bucket, tmp_path):  # noqa: F811
    store = write_store(bucket)
    local = write_store(tmp_path / "store")
    assert read_all(bucket) == read_all(tmp_path / "store")
    assert store.path == bucket and store.manifest == local.manifest
    for site in SITES:
        rows = [part.read_ranges(site, [(0, 160)]) for part in (store, local)]
        assert rows[0].tobytes() == rows[1].tobytes()
    sequences = store.sequences("heldout")[::-1]
    acts = [part.read_contexts("mlp_act.1", sequences)[0] for part in (store, local)]
    assert acts[0].tobytes() == acts[1].tobytes()
    assert store.document_name(1) == "d"


@pytest.fixture
def google(monkeypatch):
    started = gcs_server.Server()
    started.set_environment(monkeypatch)
    yield started
    started.close()


def test_google_cloud_storage_holds_the_same_bytes(google, tmp_path):
    """Written with a stop, and read into batches."""
    path = "gs://bucket/store"
    writer = begin(path)
    stores.write_shards(writer, gather_rows(), [0, 1])
    writer.close()
    write_store(path)
    write_store(tmp_path / "store")
    assert read_all(path) == read_all(tmp_path / "store")
    batches = [read_batches(place) for place in (path, tmp_path / "store")]
    assert len(batches[0]) == 5 and batches[0] == batches[1]


def read_batches(path):
    data = DataConfig(str(path), site="mlp_act.1", batch_rows=16, lanes=2)
    feed = StoreFeed(data, single_device_mesh(), seed=0)
    return [np.asarray(batch).tobytes() for batch in feed.batches(0, 5)]


def test_google_cloud_storage_that_denies_has_no_damage(google):
    path = "gs://bucket/store"
    store = write_store(path)
    # Who may not list is answered as if there were no files.
    for right, message in (("get", "check the credentials"), ("list", "right to list")):
        google.denied.add(right)
        for read in (lambda: open_store(path), lambda: inspect(path, verify=True)):
            with pytest.raises(PermissionError, match=message) as error:
                read()
            assert "delete" not in str(error.value)
        if right == "get":
            with pytest.raises(PermissionError, match=message):
                store.read_ranges("mlp_act.1", [(0, 16)])
        google.denied.clear()
    google.denied.add("write")
    with pytest.raises(PermissionError, match="check the credentials"):
        begin("gs://bucket/other")


def test_faults_in_a_bucket_are_named(bucket):  # noqa: F811
    with pytest.raises(FileNotFoundError, match=f"no store at '{bucket}'"):
        open_store(bucket)
    write_store(bucket)
    files = Folder(bucket)
    name = "acts/mlp_act.1/c/1/0/0"
    data = files.read(name)
    for damaged in (data[:100] + bytes([data[100] ^ 1]) + data[101:], data[:-9]):
        files.write(name, damaged)
        with pytest.raises(ValueError, match=f"damaged shard {bucket}/{name}"):
            open_store(bucket).read_ranges("mlp_act.1", [(64, 64)])
    files.delete(name)
    with pytest.raises(ValueError, match=f"{bucket}/{name} is missing"):
        open_store(bucket)
    with pytest.raises(OSError, match="no such bucket"):
        Folder("s3://elsewhere/store").write("manifest.json", b"")


def test_a_bucket_is_verified(bucket, server, tmp_path):  # noqa: F811
    write_store(bucket)
    write_store(tmp_path / "store")
    found, local = (inspect(p, verify=True) for p in (bucket, tmp_path / "store"))
    assert found.bytes == local.bytes and found.splits == local.splits
    # Each document of the store is in both splits.
    assert found.faults == local.faults
    assert {name.partition("/")[0] for name in found.faults} == {
        "documents",
        "documents.json",
    }
    files = Folder(bucket)
    for name in ("acts/mlp_act.1/c/1/0/0", "tokens/c/0/0"):
        data = files.read(name)
        files.write(name, data[:100] + bytes([data[100] ^ 1]) + data[101:])
    files.delete("positions/c/2/0/0")
    faults = inspect(bucket, verify=True).faults
    assert faults["positions/c/2/0/0"] == "is missing"
    for name in ("acts/mlp_act.1/c/1/0/0", "tokens/c/0/0"):
        assert faults[name] == "is damaged: its checksum is wrong"
    server.shut()
    try:
        with pytest.raises(OSError, match="cannot be reached"):
            inspect(bucket, verify=True)
    finally:
        server.open()


def test_a_bucket_that_denies_has_no_damage(bucket, server):  # noqa: F811
    """Rights that end while a store is written, read or verified."""
    denied, folder = f"{bucket}: access denied .*check the credentials", Folder(bucket)
    with server.denying(), pytest.raises(PermissionError, match=denied):
        begin(bucket)
    writer = begin(bucket)
    with server.denying(), pytest.raises(PermissionError, match=denied):
        stores.write_shards(writer, gather_rows(), [0, 1])
    writer.close()
    store = write_store(bucket)
    manifest = store.manifest
    files = CheckedFiles(folder, manifest)
    with server.denying():
        for read in (
            lambda: store.read_ranges("mlp_act.1", [(0, 16)]),
            lambda: store.read_tokens([0]),
            lambda: store.statistics("mlp_act.1"),
            lambda: open_store(bucket),
            lambda: Text(folder, manifest).read("tokens", [0]),
            lambda: list(files.read([Piece("tokens", 0, 0, 1)])),
            lambda: verify(files),
        ):
            with pytest.raises(PermissionError, match=denied) as error:
                read()
            assert "delete" not in str(error.value)
            assert "\n" not in str(error.value)
    opened = CheckedFiles(folder, manifest)
    assert next(opened.read([Piece("tokens", 0, 0, 1)])).shape == (1, T)
    with server.denying(), pytest.raises(PermissionError, match=denied):
        list(opened.read([Piece("tokens", 1, 0, 1)]))
    assert not files.faults and not opened.faults


def test_a_server_that_goes_away_is_one_line_and_nothing_is_lost(
    bucket, server, tmp_path  # noqa: F811
):
    """Cut off after the text, after some shards, and while the store is read."""
    writer = begin(bucket)
    stores.write_shards(writer, gather_rows(), [0, 1])
    server.shut()
    try:
        with pytest.raises(OSError, match=f"{bucket} cannot be reached") as error:
            stores.write_shards(writer, gather_rows(), [2, 3, 4])
        assert error.value.errno == errno.EHOSTUNREACH
        assert "\n" not in str(error.value) and "secret" not in str(error.value)
        writer.close()
        with pytest.raises(OSError, match="cannot be reached"):
            open_store(bucket)
    finally:
        server.open()
    with pytest.raises(ValueError, match="still being written"):
        open_store(bucket)
    store = write_store(bucket)
    write_store(tmp_path / "store")
    assert read_all(bucket) == read_all(tmp_path / "store")
    store = open_store(bucket)
    server.shut()
    try:
        with pytest.raises(OSError, match="cannot be reached"):
            store.read_ranges("mlp_act.1", [(0, 16)])
    finally:
        server.open()
    assert len(store.read_ranges("mlp_act.1", [(0, 16)])) == 16
