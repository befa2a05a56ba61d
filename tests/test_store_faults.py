"""Stores that are damaged, or whose writing stops: nothing of it is ever read."""

import errno
import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
import stores
from numbered_stores import (
    NAMES,
    PER_SHARD,
    ROWS,
    SITES,
    begin,
    gather_rows,
    list_shard_files,
    make_blocks,
    make_manifest,
    read_folder,
    write_store,
)

from sae_jax.store import Folder, StoreWriter, open_store


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(path):
    return write_store(path, ROWS, SITES)


def test_a_deleted_or_short_shard_is_named_on_open(store, path):
    files = list_shard_files(path)
    assert len(files) == 5 * 5
    for file in files:
        contents = file.read_bytes()
        file.unlink()
        is_text = file.relative_to(path).parts[0] in ("tokens", "documents")
        cure = "restore the file" if is_text else "delete it, .* which makes it anew"
        with pytest.raises(ValueError, match=f"missing; {cure}") as error:
            open_store(path)
        assert str(file) in str(error.value)
        for other in (contents[:-1], contents + b"0"):
            file.write_bytes(other)
            size = f"has {len(other)} bytes, not"
            with pytest.raises(ValueError, match=size) as error:
                open_store(path)
            assert str(file) in str(error.value)
        file.write_bytes(contents)
    open_store(path)


@pytest.mark.parametrize(
    "name, cure",
    [("acts/mlp_act.1", "delete it, .* makes it anew"), ("tokens", "restore the file")],
)
def test_damaged_metadata_is_one_line_with_its_cure(store, path, name, cure):
    file = path / name / "zarr.json"
    contents = file.read_bytes()
    for damage in (contents[:-20], contents.replace(b"int32", b"int16"), b"", None):
        file.unlink() if damage is None else file.write_bytes(damage)
        if damage == contents:
            continue
        with pytest.raises(ValueError, match=f"{file}: .*; {cure}") as error:
            open_store(path).read_tokens([0])
        assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_store_without_its_manifest_is_not_written_anew(store, path, tmp_path):
    (path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="is missing; restore the file, or "):
        open_store(path)
    with pytest.raises(FileNotFoundError, match="is missing; write one with sae-jax"):
        open_store(tmp_path)


@pytest.mark.parametrize("place", [0, 1000, -1])
def test_a_flipped_byte_is_an_error_that_names_the_file(store, path, place):
    for name in ("acts/mlp_act.1", "tokens", "documents", "positions"):
        (file,) = [f for f in list_shard_files(path / name) if "/c/1/" in str(f)]
        contents = bytearray(file.read_bytes())
        contents[place % len(contents) if place < 0 else place % 100] ^= 1
        file.write_bytes(contents)
        again = open_store(path)
        cure = "restore the file" if name in ("tokens", "documents") else "delete it"
        with pytest.raises(ValueError, match=f"checksum is wrong; {cure}") as error:
            if name == "tokens":
                again.read_tokens([8, 9])
            elif name == "documents":
                again.read_documents([8, 9])
            elif name == "positions":
                again.read_positions([(64, 16)])
            else:
                again.read_ranges("mlp_act.1", [(0, 128)])
        assert str(error.value).startswith(f"damaged shard {file}: ")
        assert "\n" not in str(error.value)


def test_a_shard_deleted_after_open_is_never_zeros(store, path):
    file = path / "acts/mlp_act.1/c/1/0/0"
    file.unlink()
    with pytest.raises(ValueError, match="damaged shard .*: it is missing") as error:
        store.read_ranges("mlp_act.1", [(64, 16)])
    assert str(file) in str(error.value)


def test_a_damaged_record_is_named(store, path):
    record = path / "shards/1/mlp_act.1.npz"
    record.write_bytes(record.read_bytes()[:-9])
    manifest = path / "manifest.json"
    values = json.loads(manifest.read_text()) | {"complete": False, "statistics": {}}
    manifest.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="cannot read .*shards/1/mlp_act.1.npz"):
        begin(path).finish()


def test_what_a_stopped_packing_left_is_deleted(store, path, tmp_path, monkeypatch):
    stopped = tmp_path / "stopped"
    monkeypatch.setattr(StoreWriter, "_write_block", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        begin(stopped)
    monkeypatch.undo()
    left = stopped / "tokens/c/99/0"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"left")
    write_store(stopped, ROWS, SITES)
    assert read_folder(stopped) == read_folder(path)


class Stop(Exception):
    pass


@pytest.mark.parametrize("n_written", range(0, 16))
def test_stopped_at_any_file_and_resumed_is_byte_identical(
    store, path, tmp_path, monkeypatch, n_written
):
    """test_harvest has the same for a process that is killed."""
    stopped = tmp_path / "stopped"
    stores.fail_after(monkeypatch, Folder, "write", n_written, Stop)
    with pytest.raises(Stop):
        write_store(stopped, ROWS, SITES)
    monkeypatch.undo()
    with pytest.raises((FileNotFoundError, ValueError)):
        open_store(stopped)
    write_store(stopped, ROWS, SITES)
    assert read_folder(stopped) == read_folder(path)


def test_what_a_stopped_write_left_is_not_merged(store, path, tmp_path):
    stopped = tmp_path / "stopped"
    writer = begin(stopped)
    stores.write_shards(writer, gather_rows(), [0, 1])
    writer._commit()
    writer.close()
    torn = stopped / "acts/mlp_act.1/c/2/0/0"  # a shard that is partly filled
    torn.parent.mkdir(parents=True, exist_ok=True)
    torn.write_bytes(b"torn")
    write_store(stopped, ROWS, SITES)
    assert read_folder(stopped) == read_folder(path)


def test_a_shard_that_could_not_be_written_is_not_recorded(store, path, tmp_path):
    stopped = tmp_path / "stopped"
    writer = begin(stopped)
    in_the_way = stopped / "acts/mlp_act.1/c/0/0/0"
    (in_the_way / "folder").mkdir(parents=True)
    with pytest.raises((OSError, ValueError)):
        stores.write_shards(writer, gather_rows(), [0, 1])
    writer.close()
    assert not list(stopped.glob("shards/*"))
    shutil.rmtree(in_the_way)
    write_store(stopped, ROWS, SITES)
    assert read_folder(stopped) == read_folder(path)


@pytest.mark.parametrize("n_written", [0, 1, 2, 3, 9])
def test_a_full_disk_is_one_line_and_resumable(
    store, path, tmp_path, monkeypatch, n_written
):
    full = tmp_path / "full"
    no_room = OSError(errno.ENOSPC, "no room")
    stores.fail_after(monkeypatch, Folder, "write", n_written, no_room)
    with pytest.raises(OSError, match="the disk of .* is full") as error:
        write_store(full, ROWS, SITES)
    assert error.value.errno == errno.ENOSPC and "\n" not in str(error.value)
    monkeypatch.undo()
    write_store(full, ROWS, SITES)
    assert read_folder(full) == read_folder(path)


def test_too_little_space_is_said_before_rows_are_written(path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10**4))
    with pytest.raises(OSError, match="needs 1 MB more, the disk .* has 0 MB free"):
        write_store(path, {"train": 8192})
    assert not list(path.glob("acts/*/c"))


def test_space_is_asked_for_what_is_still_to_write(store, path, tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    stopped = tmp_path / "stopped"
    with begin(stopped) as writer:
        stores.write_shards(writer, gather_rows(), [0, 1])
        writer._commit()
    names = [str(file.relative_to(path)) for file in list_shard_files(path)]
    is_left = {
        name: not name.startswith(("tokens", "documents"))
        and name.split("/c/")[1][0] in "234"
        for name in names
    }
    needed = sum((path / name).stat().st_size for name in names if is_left[name])
    for free in (needed, needed - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, free))
        if free == needed:
            begin(stopped).close()
            continue
        with pytest.raises(OSError, match="needs 1 MB more"):
            begin(stopped)


def test_values_that_are_not_numbers_are_refused(path):
    blocks = make_blocks({"train": PER_SHARD}, {"resid_post.0": 4})
    blocks[0][1]["resid_post.0"][5, 2] = np.nan
    for dtype in ("bfloat16", "int8"):
        manifest = make_manifest({"resid_post.0": 4}, dtype=dtype)
        with pytest.raises(ValueError, match="site resid_post.0"):
            stores.write(path / dtype, manifest, blocks, NAMES)
