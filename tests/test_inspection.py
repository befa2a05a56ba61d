"""Inspection: figures are those of plain NumPy, and every fault is found and named."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import stores
from numbered_stores import (
    NAMES,
    PER_CHUNK,
    ROWS,
    SITES,
    T,
    begin,
    gather_rows,
    make_blocks,
    make_manifest,
)

from sae_jax.inspection import describe, figures, inspect, page
from sae_jax.store import Contexts, Folder, StoreWriter, open_store, statistics

SITE = "resid_post.0"


def write(path, sites=SITES, rows=ROWS, change=None, **fields):
    """A store whose documents belong to one split each."""
    blocks = []
    for split, acts, tokens, _ in make_blocks(rows, sites):
        if change:
            change(split, acts)
        documents = np.full_like(tokens, 2) if split == "heldout" else tokens % 2
        blocks.append((split, acts, tokens, documents))
    return stores.write(path, make_manifest(sites, **fields), blocks, NAMES)


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "store")


def _flip(file, place):
    contents = bytearray(file.read_bytes())
    contents[place] ^= 1
    file.write_bytes(contents)


def test_what_the_store_is(path):
    found = inspect(path, verify=True)
    assert found.faults == {} and found.missing_shards == []
    assert found.manifest == open_store(path).manifest
    train, heldout = found.splits["train"], found.splits["heldout"]
    assert (train.rows, train.contexts, train.documents) == (160, 20, 2)
    assert (heldout.rows, heldout.contexts, heldout.documents) == (80, 10, 1)
    assert (train.shards, train.written, heldout.shards) == (3, 3, 2)
    sizes = {
        name: sum(f.stat().st_size for f in (path / name).rglob("0") if f.is_file())
        for name in found.bytes
    }
    assert found.bytes == sizes and len(sizes) == 5
    assert found.rows_written == 240
    assert found.bytes_per_row == sum(sizes.values()) / 240
    bytes_of_rows = 240 * (2 * sum(SITES.values()) + 2 * 4)
    assert found.bytes_verified == bytes_of_rows + 30 * T * 2 * 4


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_figures_are_those_of_the_train_rows(tmp_path, dtype):
    found = inspect(write(tmp_path / "store", dtype=dtype), verify=True)
    assert found.faults == {}
    store = open_store(tmp_path / "store")
    for name, width in SITES.items():
        site = found.sites[name]
        acts = store.read_ranges(name, store.shards("train")).astype(np.float64)
        norms, power = np.linalg.norm(acts, axis=1), (acts**2).sum(1).mean()
        assert site.width == width and site.statistics.rows == len(acts)
        near = dict(rel=1e-12)
        assert site.statistics.mean_norm == pytest.approx(norms.mean(), **near)
        assert site.root_mean_square_norm == pytest.approx(power**0.5, **near)
        mean_norm = np.linalg.norm(acts.mean(0))
        assert site.norm_of_mean == pytest.approx(mean_norm, **near)
        assert site.explained_by_mean == pytest.approx(mean_norm**2 / power, **near)
        variance_d = acts.var(0)
        order = np.argsort(-variance_d).tolist()
        assert [d for d, _ in site.largest_variances] == order[:5]
        assert [d for d, _ in site.smallest_variances] == order[:-6:-1]
        np.testing.assert_allclose(
            [variance for _, variance in site.largest_variances], variance_d[order[:5]]
        )
        np.testing.assert_allclose(site.sample_norms, norms, rtol=1e-12)
        assert site.n_constant == (variance_d == 0).sum() == 2  # digits that are zero


def test_planted_outliers_are_found(tmp_path):
    def plant(split, acts):
        for rows in acts.values():
            rows[:, :3] = 1  # and not the number of the row
        rows = acts[SITE]
        rows[::T] = (20 * rows[::T]).astype(ml_dtypes.bfloat16)
        rows[4::T] = (0.05 * rows[4::T]).astype(ml_dtypes.bfloat16)
        acts["mlp_act.1"][:, 5] = 30
        acts["mlp_act.1"][:, 4] = 0
        acts[SITE][10:11] *= ml_dtypes.bfloat16(1000)

    found = inspect(write(tmp_path / "store", change=plant))
    places = [place for place, _ in found.sites[SITE].outlier_positions]
    assert set(places) == {0, 2, 4}  # 2 of row 10, that of three shards
    assert found.sites[SITE].outlier_dimensions == []
    site = found.sites["mlp_act.1"]
    assert [d for d, _ in site.outlier_dimensions] == [5]
    assert site.n_constant == 5 and site.largest_variances[0][0] == 3
    rows = found.sites[SITE].outlier_rows
    largest = {(row.sequence, row.position, row.token) for row in rows[:3]}
    store = open_store(tmp_path / "store")
    rows_at = store.read_positions([(10, 1), (74, 1), (138, 1)])
    tokens = store.read_tokens(rows_at[:, 0])[np.arange(3), rows_at[:, 1]]
    assert largest == set(zip(*rows_at.T.tolist(), tokens.tolist()))
    assert all(row.ratio > 100 and row.text is None for row in rows[:3])
    n_rows = 160 // T * 2 + 3
    assert found.sites[SITE].n_outlier_rows == n_rows


def test_rules_of_outliers():
    norms = np.array([1, 1, 4, 0.25, 3.9, 0.26, np.nan, 0, 1, 1.0])
    assert [i for i, _ in figures.list_outliers(norms)] == [7, 2, 3]
    moments = np.array([1, 25, 24, 1, 1, 0, 30, 1, 1])
    assert figures.list_large(moments) == [(6, 30.0), (1, 25.0)]
    assert figures.list_outliers(np.zeros(3)) == []


def test_a_large_store_is_sampled_by_the_seed(tmp_path, monkeypatch):
    write(tmp_path / "store")
    monkeypatch.setattr(figures, "SAMPLE_ROWS", 3 * PER_CHUNK)
    samples = [
        inspect(tmp_path / "store", seed=seed).sites[SITE].sample_norms
        for seed in (0, 0, 1)
    ]
    assert len(samples[0]) == 3 * PER_CHUNK
    assert (samples[0] == samples[1]).all() and (samples[0] != samples[2]).any()


def test_tokens_are_told_by_the_store_s_subject_alone(tmp_path):
    class Subject:
        name, identity = "planted", "0"

        def decode_tokens(self, ids):
            return [f"<{token}>" for token in ids]

    def plant(split, acts):
        acts[SITE][:, :3] = 1
        acts[SITE][7] = 500

    write(tmp_path / "store", change=plant)
    row = inspect(tmp_path / "store", subject=Subject()).sites[SITE].outlier_rows[0]
    assert row.text == f"<{row.token}>" and row.position == 7
    Subject.identity = "1"
    with pytest.raises(ValueError, match="from subject planted .0., not from"):
        inspect(tmp_path / "store", subject=Subject())


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_every_damaged_file_is_named(tmp_path, dtype):
    path = write(tmp_path / "store", dtype=dtype)
    files = sorted(str(file.relative_to(path)) for file in path.rglob("c/**/*"))
    files = [file for file in files if (path / file).is_file()]
    assert len(files) == 5 * (5 if dtype == "bfloat16" else 7)
    for file in files:
        _flip(path / file, 1)
    damaged = dict.fromkeys(files, "is damaged: its checksum is wrong")
    assert inspect(path, verify=True).faults == damaged
    for place, name in enumerate(files):
        file = path / name
        if place % 2:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-1])
    found = inspect(path)  # sizes are seen without reading
    assert list(found.faults) == files
    assert [fault == "is missing" for fault in found.faults.values()] == [
        bool(place % 2) for place in range(len(files))
    ]
    assert all(split.documents is None for split in found.splits.values())
    assert found.faults == inspect(path, verify=True).faults


@pytest.mark.parametrize(
    "name",
    [
        "documents.json",
        f"acts/{SITE}/zarr.json",
        "tokens/zarr.json",
        "shards/1/mlp_act.1.npz",
        f"statistics/{SITE}.npz",
    ],
)
@pytest.mark.parametrize("is_missing", [True, False])
def test_other_files_are_named(path, name, is_missing):
    file = path / name
    contents = file.read_bytes()
    file.unlink()
    if not is_missing:
        file.write_bytes(contents[: len(contents) // 2])
    assert list(inspect(path, verify=True).faults) == [name]


def test_a_damaged_file_hides_no_other(path):
    """Also what follows in the same shard, and in the same file of text."""
    _flip(path / "tokens/c/1/0", 5)
    _flip(path / f"acts/{SITE}/c/0/0/0", 5)
    _rewrite_record(path / "shards/0/mlp_act.1.npz", "sum_d")
    _rewrite_record(path / f"shards/1/{SITE}.npz", "square_d")
    found = inspect(path, verify=True).faults
    assert set(found) >= {
        "tokens/c/1/0",
        f"acts/{SITE}/c/0/0/0",
        "shards/0/mlp_act.1.npz",
        f"shards/1/{SITE}.npz",
    }
    assert found["shards/0/mlp_act.1.npz"].endswith("rows of shard 0 give: sum_d")


def _rewrite_record(file, field):
    sums = statistics.read_sums(file.read_bytes())
    values = getattr(sums, field).copy()
    values[0] *= 1 + 1e-8
    changed = dataclasses.replace(sums, **{field: values})
    file.write_bytes(statistics.to_bytes(changed))


@pytest.mark.parametrize("field", ["mean_d", "second_moment_d", "mean_norm", "norm_t"])
def test_wrong_statistics_are_found(path, field):
    file = path / f"statistics/{SITE}.npz"
    values = statistics.read_statistics(file.read_bytes())
    wrong = getattr(values, field) * (1 + 1e-7)
    changed = dataclasses.replace(values, **{field: wrong})
    file.write_bytes(statistics.to_bytes(changed))
    assert inspect(path, verify=True).faults == {
        f"statistics/{SITE}.npz": f"is not what the rows give: {field}"
    }


def _edit(path, **changes):
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_wrong_manifest_is_found(path):
    manifest = json.loads((path / "manifest.json").read_text())
    summary = manifest["statistics"]
    summary[SITE]["mean_norm"] += 0.1
    _edit(path, statistics=summary)
    fault = inspect(path, verify=True).faults["manifest.json"]
    assert f"mean_norm {summary[SITE]['mean_norm']} for {SITE}" in fault
    _edit(path, rows={"train": 165, "heldout": 80})
    assert "has 165 train rows" in inspect(path, verify=True).faults["manifest.json"]


def _overwrite(path, name, first, values):
    """Writes rows of an array with checksums that are right."""
    folder = Folder(path)
    store = open_store(path)
    layouts = {**store._layouts, **store._text._layouts}
    n_text, n_rows = len(store.manifest.text_shards), len(store.manifest.row_shards)
    n_shards = n_rows if name in store._layouts else n_text
    array = layouts[name].open(folder, n_shards, is_new=True)
    if layouts[name].by_chunk:
        n = layouts[name].chunk_length
        for i, value in enumerate(values, first):
            array[i // n, i % n].write(value).result()
    else:
        array[first : first + len(values)].write(values).result()


def test_names_that_disagree_are_found(path):
    """With the split that they tell, and with what documents.json is."""
    file = path / "documents.json"
    for names, fault in (
        (["b", "a", "c"], "calls document 1 'a', which with heldout_every = 5 is held"),
        (["b", "d", "e"], "calls document 2 'e', .* is train, and .* are heldout"),
        (["b", 3, "c"], "is not a list of names"),
        ({"b": 0, "d": 1, "c": 2}, "is not a list of names"),
    ):
        file.write_text(json.dumps(names))
        found = inspect(path, verify=True).faults
        assert list(found) == ["documents.json"]
        assert re.match(fault, found["documents.json"])
    file.write_text(json.dumps(NAMES))
    _edit(path, heldout_every=1000)
    assert "heldout_every = 1000 is train" in inspect(path, True).faults[file.name]


def test_rows_of_other_positions_are_found(path):
    """A row that is there twice, so that another is missing."""
    positions = open_store(path).read_positions([(64, 64)])
    positions[5] = positions[4]
    _overwrite(path, "positions", 64, positions)
    place = tuple(open_store(path).read_positions([(68, 1)])[0].tolist())
    fault = inspect(path, verify=True).faults
    assert list(fault) == ["positions/c/1/0/0"]
    told = f"has 1 rows of other positions than the text: row 5 is {place}, not "
    assert fault["positions/c/1/0/0"].startswith(told)


def test_other_rows_than_were_added_up_are_found(path):
    rows = open_store(path).read_ranges(SITE, [(64, 64)])[::-1]
    _overwrite(path, f"acts/{SITE}", 64, rows)  # in another order
    fault = "is not what the rows of shard 1 give: norm_t, largest_t"
    assert inspect(path, verify=True).faults == {f"shards/1/{SITE}.npz": fault}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_found(tmp_path, bad):
    path = write(tmp_path / "store")
    rows = open_store(path).read_ranges(SITE, [(64, 64)])
    rows[[7, 30], 2] = bad
    _overwrite(path, f"acts/{SITE}", 64, rows)
    fault = "has rows that are not finite: row 7 is the first"
    found = inspect(path, verify=True)
    assert found.faults == {f"acts/{SITE}/c/1/0/0": fault}
    found.to_json()
    describe.format_inspection(found)
    path = write(tmp_path / "int8", dtype="int8")
    scales = np.full(64, bad, np.float32)
    _overwrite(path, f"scales/{SITE}", 64, scales)
    assert list(inspect(path, verify=True).faults) == [f"scales/{SITE}/c/1/0"]


def test_text_that_disagrees_is_found(path):
    documents = open_store(path).read_documents([0, 1])
    documents[0, 3] = -1  # a row fewer
    _overwrite(path, "documents", 0, documents)
    faults = inspect(path, verify=True).faults
    assert "give 63 rows, manifest.json has 64" in faults["tokens/c/0/0"]
    documents[0, 3] = 2  # of the other split
    _overwrite(path, "documents", 0, documents)
    (fault,) = inspect(path, verify=True).faults.values()
    assert "has document 2, of which another split has a part" in fault
    documents[0, 3] = 9
    _overwrite(path, "documents", 0, documents)
    found = inspect(path, verify=True)
    assert found.faults == {"documents/c/0/0": "has ids beyond the 3 there are"}
    assert found.splits["train"].documents is None


def test_padding_and_excluded_tokens_are_no_fault(tmp_path):
    path, rng = tmp_path / "store", np.random.default_rng(0)
    tokens = rng.integers(5, size=(20, T)).astype(np.int32)
    documents = np.where(rng.random((20, T)) < 0.2, -1, 0).astype(np.int32)
    is_kept = (documents >= 0) & (tokens != 3)
    is_kept[:, 6], documents[:, 6] = False, -1  # a position that is never a row
    acts = rng.standard_normal((20, T, 4)).astype(ml_dtypes.bfloat16)
    manifest = make_manifest({SITE: 4}, excluded_ids=[3], contexts_per_shard=7)
    with StoreWriter(Folder(path), manifest) as writer:
        blocks = [
            Contexts("train", tokens[i : i + 7], documents[i : i + 7])
            for i in range(0, 20, 7)
        ]
        writer.write_text(stores.Blocks(blocks, ["b"], PER_CHUNK, [3]))
        stores.write_shards(writer, {"train": {SITE: acts[is_kept]}})
        assert writer.finish()
    found = inspect(path, verify=True)
    assert found.faults == {}
    assert found.splits["train"].rows < is_kept.sum()
    assert found.splits["train"].documents == 1
    assert np.isnan(found.sites[SITE].statistics.norm_t[6])
    again = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert again["sites"][SITE]["statistics"]["norm_t"][6] is None
    text = describe.format_inspection(found)
    assert "excluded tokens: 3\n" in text
    line = next(line for line in text.splitlines() if "by position, mean" in line)
    assert line[28:36].index(" ") == 6
    assert page.write_page(tmp_path / "page.html", found).read_text().count("<svg") == 3


def test_an_incomplete_store_is_inspected(tmp_path):
    path = tmp_path / "store"
    with StoreWriter(Folder(path), make_manifest(SITES)):
        pass
    found = inspect(path, verify=True)
    assert found.faults == {} and found.splits["train"].documents is None
    assert "incomplete: its text is not packed; run the same" in _state(found)
    page.write_page(tmp_path / "page.html", found)
    writer = begin(path)
    found = inspect(path, verify=True)
    assert found.missing_shards == list(range(5)) and found.bytes_per_row is None
    assert found.sites[SITE].statistics is None
    page.write_page(tmp_path / "page.html", found)
    stores.write_shards(writer, gather_rows(), [0, 2, 3])
    writer._commit()
    writer.close()
    (path / f"acts/{SITE}/c/1/0").mkdir(parents=True)
    (path / f"acts/{SITE}/c/1/0/0").write_bytes(b"being written")
    found = inspect(path, verify=True)
    # make_blocks has a document in both splits
    in_both = {"documents", "documents.json"}
    assert {file.partition("/")[0] for file in found.faults} == in_both
    assert found.missing_shards == [1, 4] and found.rows_written == 64 + 32 + 64
    assert "3 of 5 shards are written, missing is 1, 4; run the same" in _state(found)
    assert (found.splits["train"].written, found.splits["heldout"].written) == (2, 1)
    acts = gather_rows()["train"][SITE].astype(np.float64)
    acts = np.concatenate([acts[:64], acts[128:160]])
    site, norm = found.sites[SITE], np.linalg.norm(acts, axis=1).mean()
    assert site.statistics.rows == 96 == len(site.sample_norms)
    assert site.statistics.mean_norm == pytest.approx(norm, rel=1e-12)
    text = describe.format_inspection(found)
    assert "2 of 3" in text and "missing is 1, 4" in text
    _flip(path / "shards/2" / f"{SITE}.npz", 90)
    assert f"shards/2/{SITE}.npz" in inspect(path).faults


def _state(found):
    return describe.describe_state(found)


def test_a_store_wholly_held_out(tmp_path):
    found = inspect(write(tmp_path / "store", rows={"heldout": 32}), verify=True)
    assert found.faults == {} and found.sites[SITE].statistics is None
    assert len(found.sites[SITE].sample_norms) == 32
    assert "no statistics" in describe.format_inspection(found)
    page.write_page(tmp_path / "page.html", found)


def test_refuses_what_is_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="no store at"):
        inspect(tmp_path)
    (tmp_path / "manifest.json").write_text('{"version": 9}')
    with pytest.raises(ValueError, match="upgrade sae_jax"):
        inspect(tmp_path)


def test_text_is_narrow_and_has_every_part(path):
    found = inspect(path, verify=True)
    text = describe.format_inspection(found)
    assert max(map(len, text.splitlines())) <= 88
    for part in (
        "version 2, complete",
        "planted, identity 0",
        "8 tokens, packing joined, BOS document, excluded tokens: none",
        "bfloat16, files of 64 rows, chunks of 16",
        f"{SITE}, width 4",
        "explained by the mean",
        "constant dimensions",
        "no fault found",
    ):
        assert part in text, part
    assert "not verified" in describe.format_inspection(inspect(path))
    shutil.rmtree(path / "acts" / SITE / "c" / "2")
    text = describe.format_inspection(inspect(path))
    assert f"acts/{SITE}/c/2/0/0 is missing" in text


@pytest.fixture
def run():
    """The command, in a process of its own: flags of commands share names."""

    def run(*arguments, **values):
        given = [
            f"--{name}" if value is True else f"--{name}={value}"
            for name, value in values.items()
        ]
        done = subprocess.run(
            [sys.executable, "-c", "from sae_jax.cli import run; run()", "inspect"]
            + [*given, *map(str, arguments)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        print(done.stdout, end="")
        print(done.stderr, end="", file=sys.stderr)
        if done.returncode:
            raise ValueError(done.stderr)

    return run


def test_the_command_prints_and_fails_where_files_do(path, run, capsys, tmp_path):
    run(path, verify=True, out=str(tmp_path / "page.html"))
    out, err = capsys.readouterr()
    assert "no fault found" in out and out.endswith("page.html\n")
    assert " of 0 MB" in err
    run(path, json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["sites"][SITE]["root_mean_square_norm"] > 0
    assert found["faults"] == {} and found["bytes_verified"] is None
    _flip(path / "positions/c/1/0/0", 3)
    with pytest.raises(ValueError, match="1 file .*: delete what .* harvest again, wh"):
        run(path, verify=True)
    capsys.readouterr()
    _flip(path / "tokens/c/0/0", 3)
    with pytest.raises(ValueError, match="2 files at fault, one of them tok.*: restor"):
        run(path, verify=True)
    out, _ = capsys.readouterr()
    assert "tokens/c/0/0 is damaged" in out and "positions/c/1/0/0 is damaged" in out
    (path / "tokens/c/0/0").unlink()
    with pytest.raises(ValueError, match="1 file at fault, tokens/c/0/0: restore"):
        run(path)
    assert "1 file at fault:" in capsys.readouterr().out
    with pytest.raises(ValueError):
        run(path, verify=True, json=True)
    assert len(json.loads(capsys.readouterr().out)["faults"]) == 2
    for arguments, values in (((), {}), ((path,), {"out": "no/such/page.html"})):
        with pytest.raises(ValueError, match="sae-jax inspect: "):
            run(*arguments, **values)


def test_blocks():
    assert describe.draw_blocks(np.array([0, 1, 2, np.nan, 8.0])) == "▁▂▃ █"
    assert describe.draw_blocks(np.zeros(3)) == "▁▁▁"
    peak = np.ones(1000)
    peak[500] = 8  # is seen in whatever part it falls
    assert sorted(describe.draw_blocks(peak))[-1] == "█"
    assert len(describe.draw_blocks(peak)) == 48


def test_the_page(path, tmp_path):
    found = inspect(path)
    file = page.write_page(tmp_path / "<page>.html", found)
    text = file.read_text()
    assert text.count("<svg") == 3 * len(SITES)
    assert "http" not in text and "<script" not in text
    assert text == page.write_page(tmp_path / "again.html", inspect(path)).read_text()
    _flip(path / "positions/c/0/0/0", 3)
    broken = page.write_page(file, inspect(path, verify=True)).read_text()
    assert "positions/c/0/0/0" in broken and "checksum is wrong" in broken
