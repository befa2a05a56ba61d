"""Stores: what is written is read back, and nothing that is damaged is read at all."""

import dataclasses
import errno
import json
import os
import shutil
from collections import namedtuple

import ml_dtypes
import numpy as np
import pytest
import stores

from sae_jax.files import lock_folder
from sae_jax.store import (
    Contexts,
    Folder,
    Manifest,
    Stored,
    StoreWriter,
    Text,
    find_manifest,
    open_store,
)
from sae_jax.store import folder as folders

T, PER_SHARD, PER_CHUNK = 8, 64, 16
NAMES = ["a", "b", "c"]


def make_manifest(sites, **fields):
    return stores.make_manifest(sites, T, PER_SHARD, PER_CHUNK, **fields)


def make_blocks(rows, sites):
    """Blocks of contexts of each split, whose rows tell their number in the split:
    columns 0 to 2 are its base-256 digits. Held-out blocks come in between."""
    blocks = []
    for split, n_rows in rows.items():
        row = np.arange(n_rows)
        rng = np.random.default_rng(len(split))
        digits = np.stack([row % 256, row // 256 % 256, row // 65536], 1)
        acts = {}
        for site, width in sites.items():
            acts[site] = rng.standard_normal((n_rows, width)).astype(ml_dtypes.bfloat16)
            acts[site][:, :3] = digits.astype(ml_dtypes.bfloat16)
        tokens = (row + 1000 * (split == "heldout")).reshape(-1, T).astype(np.int32)
        for start in range(0, n_rows, PER_SHARD):
            part = slice(start, start + PER_SHARD)
            context = slice(start // T, (start + PER_SHARD) // T)
            shard = {site: values[part] for site, values in acts.items()}
            block = split, shard, tokens[context], tokens[context] % 3
            blocks.append((start, block))
    return [block for _, block in sorted(blocks, key=lambda pair: pair[0])]


def row_ids(acts):
    """The rows that `make_blocks` numbered."""
    digits = np.asarray(acts)[..., :3].astype(np.int64)
    return digits @ np.array([1, 256, 65536])


def write_store(path, rows, sites=None, **fields):
    sites = sites or {"resid_post.0": 4}
    manifest = make_manifest(sites, **fields)
    return open_store(stores.write(path, manifest, make_blocks(rows, sites), NAMES))


def read_folder(path):
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and not file.name.startswith(".lock")
    }


SITES = {"resid_post.0": 4, "mlp_act.1": 6}
ROWS = {"train": 2 * PER_SHARD + 32, "heldout": PER_SHARD + 16}


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


def test_contexts_are_read_in_any_order(store):
    for split in ROWS:
        sequences = np.random.default_rng(0).permutation(store.sequences(split))[:5]
        acts, is_row = store.read_contexts("mlp_act.1", sequences)
        assert acts.shape == (5, T, 6) and is_row.all()
        tokens = store.read_tokens(sequences)
        np.testing.assert_array_equal(row_ids(acts), tokens % 1000)
    with pytest.raises(ValueError, match="no context"):
        store.read_tokens([len(store.sequences("train")) + 99])
    for index, shard in enumerate(store.manifest.text_shards):
        if shard["contexts"] < PER_SHARD // T:  # the next is in the file, as zeros
            with pytest.raises(ValueError, match="no context"):
                store.read_tokens([index * PER_SHARD // T + shard["contexts"]])


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


@pytest.mark.parametrize("excluded_ids", [[], [3]])
def test_padding_and_excluded_tokens_are_no_rows(path, excluded_ids):
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, size=(20, T)).astype(np.int32)
    documents = np.where(rng.random((20, T)) < 0.2, -1, 0).astype(np.int32)
    is_kept = (documents >= 0) & ~np.isin(tokens, excluded_ids)
    acts = rng.standard_normal((20, T, 4)).astype(ml_dtypes.bfloat16)
    manifest = make_manifest(
        {"resid_post.0": 4}, excluded_ids=excluded_ids, contexts_per_shard=7
    )
    with StoreWriter(Folder(path), manifest) as writer:
        blocks = [
            Contexts("train", tokens[i : i + 7], documents[i : i + 7])
            for i in range(0, 20, 7)
        ]
        writer.write_text(stores.Blocks(blocks, ["a"], PER_CHUNK, excluded_ids))
        stores.write_shards(writer, {"train": {"resid_post.0": acts[is_kept]}})
        writer.finish()
    store = open_store(path)
    n_rows = is_kept.sum() // PER_CHUNK * PER_CHUNK
    assert store.rows("train") == n_rows < is_kept.sum()
    rows = store.read_ranges("resid_post.0", store.shards("train"))
    assert rows.tobytes() == acts[is_kept][:n_rows].tobytes()
    np.testing.assert_array_equal(
        store.read_positions(store.shards("train")), np.argwhere(is_kept)[:n_rows]
    )
    is_stored = is_kept & (np.cumsum(is_kept).reshape(20, T) <= n_rows)
    order = rng.permutation(20)
    found, is_row = store.read_contexts("resid_post.0", order)
    np.testing.assert_array_equal(is_row, is_stored[order])
    expected = np.where(is_stored[..., None], acts, 0).astype(ml_dtypes.bfloat16)
    assert found.tobytes() == expected[order].tobytes()


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


def list_shard_files(path):
    return sorted(
        file for file in path.rglob("*") if "/c/" in str(file) and file.is_file()
    )


def test_a_deleted_or_short_shard_is_named_on_open(store, path):
    files = list_shard_files(path)
    assert len(files) == 5 * 5
    for file in files:
        contents = file.read_bytes()
        file.unlink()
        with pytest.raises(ValueError, match="missing") as error:
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


@pytest.mark.parametrize("place", [0, 1000, -1])
def test_a_flipped_byte_is_an_error_that_names_the_file(store, path, place):
    for name in ("acts/mlp_act.1", "tokens", "documents", "positions"):
        (file,) = [f for f in list_shard_files(path / name) if "/c/1/" in str(f)]
        contents = bytearray(file.read_bytes())
        contents[place % len(contents) if place < 0 else place % 100] ^= 1
        file.write_bytes(contents)
        again = open_store(path)
        with pytest.raises(ValueError, match="damaged shard") as error:
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
    with pytest.raises(ValueError, match="damaged shard") as error:
        store.read_ranges("mlp_act.1", [(64, 16)])
    assert str(file) in str(error.value)


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


def test_refuses_a_folder_that_is_not_a_store(tmp_path):
    manifest = make_manifest({"resid_post.0": 4})
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="not a store and not empty.*thesis.tex"):
        StoreWriter(Folder(tmp_path), manifest)
    with pytest.raises(ValueError, match="is a file"):
        StoreWriter(Folder(tmp_path / "thesis.tex"), manifest)
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / "figures").mkdir()
    with pytest.raises(ValueError, match="not a store and not empty.*figures"):
        StoreWriter(Folder(tmp_path), manifest)


def test_another_setting_is_named(store, path):
    for change, message in (
        ({"seed": 1}, "begun with seed = 0, this harvest has 1"),
        ({"dtype": "int8"}, "begun with dtype = 'bfloat16'"),
        ({"packing": "padded"}, "begun with packing = 'joined'"),
    ):
        with pytest.raises(ValueError, match=message):
            StoreWriter(Folder(path), make_manifest(SITES, **change))


# What is found out in a harvest; all the rest are settings.
FOUND = {"version", "n_documents", "rows", "dropped_tokens", "text_shards"}
FOUND |= {"is_packed", "complete", "statistics"}
OTHER_SETTINGS = {
    "subject": {"name": "planted", "identity": "1", "dtype": "float32"},
    "tokenizer": "1",
    "corpus": "1",
    "sites": {"resid_post.0": 4},
    "dtype": "int8",
    "context_length": 4,
    "packing": "padded",
    "bos": "context",
    "bos_id": 3,
    "excluded_ids": [3],
    "heldout_every": 4,
    "max_rows": 99,
    "seed": 1,
    "rows_per_shard": 128,
    "rows_per_chunk": 32,
    "contexts_per_shard": 4,
}


def test_every_setting_counts(store, path):
    fields = {field.name for field in dataclasses.fields(Manifest)}
    assert fields == OTHER_SETTINGS.keys() | FOUND
    for name, value in OTHER_SETTINGS.items():
        other = dataclasses.replace(make_manifest(SITES), **{name: value})
        told = "another text" if name == "corpus" else f"{name} = "
        with pytest.raises(ValueError, match=f"was begun with {told}"):
            StoreWriter(Folder(path), other)


def begin(path, process=0, n_processes=1):
    """A writer of a store whose text is packed."""
    writer = StoreWriter(Folder(path), make_manifest(SITES), process, n_processes)
    if not writer.manifest.is_packed:
        blocks = [Contexts(s, t, d) for s, _, t, d in make_blocks(ROWS, SITES)]
        writer.write_text(stores.Blocks(blocks, NAMES))
    return writer


def gather_rows():
    blocks = make_blocks(ROWS, SITES)
    return {
        split: {
            site: np.concatenate([acts[site] for s, acts, *_ in blocks if s == split])
            for site in SITES
        }
        for split in ROWS
    }


@pytest.mark.parametrize("n_processes", [2, 4, 7])
def test_several_processes_write_the_store_of_one(store, path, tmp_path, n_processes):
    shared = tmp_path / "shared"
    writers = [begin(shared, i, n_processes) for i in range(n_processes)]
    missing = [writer.missing_shards() for writer in writers]
    assert sorted(sum(missing, [])) == list(range(5))
    for writer in writers[::-1]:
        with pytest.raises(ValueError, match="still being written"):
            open_store(shared)
        stores.write_shards(writer, gather_rows())
        is_last = writer is writers[0]
        assert writer.finish() == is_last
    assert read_folder(shared) == read_folder(path)


def test_a_part_is_written_by_one_process_at_a_time(store, path, tmp_path):
    shared = tmp_path / "shared"
    first = begin(shared)
    stores.write_shards(first, gather_rows(), [0])
    with pytest.raises(ValueError, match="in use by another process: wait") as error:
        begin(shared)
    assert str(shared) in str(error.value) and "\n" not in str(error.value)
    begin(shared, 1, 2).close()  # another part
    first.close()
    write_store(shared, ROWS, SITES)
    assert read_folder(shared) == read_folder(path)
    begin(shared).close()  # the last one has let go


def test_a_folder_with_only_a_lock_is_empty(tmp_path):
    lock_folder(tmp_path).close()
    begin(tmp_path).close()


class Stop(Exception):
    pass


@pytest.mark.parametrize("n_written", range(0, 16))
def test_stopped_at_any_file_and_resumed_is_byte_identical(
    store, path, tmp_path, monkeypatch, n_written
):
    """test_harvest has the same for a process that is killed."""
    write, n_left = Folder.write, n_written

    def stop(*arguments):
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise Stop
        write(*arguments)

    stopped = tmp_path / "stopped"
    monkeypatch.setattr(Folder, "write", stop)
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


def test_what_another_wrote_before_the_lock_is_seen(path, monkeypatch):
    def lock(*arguments):
        monkeypatch.undo()
        begin(path).close()
        return lock_folder(*arguments)

    monkeypatch.setattr("sae_jax.store.writer.lock_folder", lock)
    with StoreWriter(Folder(path), make_manifest(SITES)) as writer:
        assert writer.manifest.is_packed
    assert find_manifest(Folder(path)).is_packed


def test_a_closed_writer_writes_no_more(path, monkeypatch):
    """The lock is let go when what was begun has ended."""
    waited = []

    class Write:
        def exception(self):
            with pytest.raises(ValueError, match="in use"):
                lock_folder(path)
            waited.append(self)

    writer = begin(path)
    monkeypatch.setattr(writer, "_start_write", lambda *_: Write())
    stores.write_shards(writer, gather_rows(), [0])
    writer.close()
    assert len(waited) == len(SITES) + 1
    lock_folder(path).close()


def test_a_shard_has_the_rows_that_were_planned(path):
    with begin(path) as writer:
        with pytest.raises(ValueError, match="shard 1 has 63 rows, not 64"):
            writer.write_shard(1, {}, np.zeros((63, 2), np.int32))


@pytest.mark.parametrize("n_written", [0, 1, 2, 3, 9])
def test_a_full_disk_is_one_line_and_resumable(
    store, path, tmp_path, monkeypatch, n_written
):
    full = tmp_path / "full"
    write, n_left = Folder.write, n_written

    def fail(*arguments):
        nonlocal n_left
        n_left -= 1
        if n_left < 0:
            raise OSError(errno.ENOSPC, "no room")
        write(*arguments)

    monkeypatch.setattr(Folder, "write", fail)
    with pytest.raises(OSError, match="the disk of .* is full") as error:
        write_store(full, ROWS, SITES)
    assert error.value.errno == errno.ENOSPC and "\n" not in str(error.value)
    monkeypatch.undo()
    write_store(full, ROWS, SITES)
    assert read_folder(full) == read_folder(path)


def test_tensorstore_says_that_a_disk_is_full():
    text = "RESOURCE_EXHAUSTED: Error writing local file [os_error_code='28']"
    assert folders.is_full_disk(ValueError(text))
    assert not folders.is_full_disk(ValueError("[os_error_code='2']"))
    for number in (errno.ENOSPC, errno.EDQUOT):  # no room, or no more for this user
        assert folders.is_full_disk(OSError(number, ""))


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


def test_a_damaged_record_is_named(store, path):
    record = path / "shards/1/mlp_act.1.npz"
    record.write_bytes(record.read_bytes()[:-9])
    manifest = path / "manifest.json"
    values = json.loads(manifest.read_text()) | {"complete": False, "statistics": {}}
    manifest.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="cannot read .*shards/1/mlp_act.1.npz"):
        begin(path).finish()


def test_names_of_another_number_are_refused(store, path):
    (path / "documents.json").write_text(json.dumps(NAMES[:2]))
    with pytest.raises(ValueError, match="documents.json has 2 names, the store 3"):
        open_store(path).document_name(0)


def test_rows_are_found_without_reading_every_text(store, path):
    text = Text(Folder(path), find_manifest(Folder(path)))
    selection = text.select("heldout", 60, 10)
    rows = np.arange(60, 70) + 1000
    np.testing.assert_array_equal(selection.tokens[selection.is_wanted], rows)
    assert len(selection.sequences) == 2
    edge = text.select("heldout", PER_SHARD - 1, 2)  # the last of a file, and the next
    assert edge.tokens[edge.is_wanted].tolist() == [PER_SHARD + 999, PER_SHARD + 1000]


@pytest.mark.parametrize(
    "url, message",
    [
        ("ftp://host/a", "not at ftp:"),
        ("s3://", "give s3://BUCKET/FOLDER"),
        ("gs://bucket/../a", "give gs://BUCKET/FOLDER"),
    ],
)
def test_addresses_that_are_no_folder(url, message):
    with pytest.raises(ValueError, match=message):
        Folder(url)


@pytest.mark.parametrize(
    "text, expected, message",
    [
        ("HTTP response code: 403 with body: no", PermissionError, "the credentials"),
        ("PERMISSION_DENIED: no", PermissionError, "the credentials"),
        ("HTTP 404 with body: NoSuchBucket", FileNotFoundError, "no such bucket"),
        ("CURL error Could not connect", OSError, "cannot be reached"),
        ("UNAVAILABLE: 503", OSError, "cannot be reached"),
        ("DATA_LOSS: 1", ValueError, "DATA_LOSS: 1"),
    ],
)
def test_what_a_service_says_is_told_plainly(text, expected, message):
    bucket = Folder("gs://bucket/a")
    with pytest.raises(expected, match=message) as error:
        folders.raise_plainly(bucket, ValueError(text))
    assert type(error.value) is expected or expected is OSError
    assert expected is ValueError or str(bucket) in str(error.value)


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, {}),
        ({"AWS_REGION": "a", "AWS_DEFAULT_REGION": "b"}, {"aws_region": "a"}),
        ({"AWS_DEFAULT_REGION": "b"}, {"aws_region": "b"}),
        (
            {"AWS_ENDPOINT_URL_S3": "http://a/", "AWS_ENDPOINT_URL": "http://b"},
            {"endpoint": "http://a", "aws_region": "us-east-1"},
        ),
        (
            {"AWS_ENDPOINT_URL": "http://b", "AWS_REGION": "a"},
            {"endpoint": "http://b", "aws_region": "a"},
        ),
        (
            {"AWS_ACCESS_KEY_ID": "key"},
            {"aws_credentials": {"type": "environment"}},
        ),
    ],
)
def test_the_usual_variables_count(variables, expected):
    assert folders._configure_s3(variables) == expected


def test_a_server_that_says_nothing_is_not_waited_for(monkeypatch):
    names = [f"TENSORSTORE_CURL_LOW_SPEED_{s}" for s in ("TIME_SECONDS", "LIMIT_BYTES")]
    for name in names:
        monkeypatch.setenv(name, "7")
    Folder("s3://bucket/a")
    assert [os.environ[name] for name in names] == ["7", "7"]  # as it was asked for
    for name in names:
        monkeypatch.delenv(name)
    Folder("s3://bucket/a")
    assert [os.environ[name] for name in names] == ["30", "1"]
