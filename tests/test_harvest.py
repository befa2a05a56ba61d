"""Harvesting with a subject small enough to be recomputed by hand."""

import concurrent.futures
import contextlib
import errno
import functools
import importlib
import json
import os
import shutil
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import stores
from numbered_stores import read_folder
from tokenizers import Tokenizer, models, pre_tokenizers

from sae_jax.files import lock_folder
from sae_jax.harvest import harvest, plan_store
from sae_jax.inspection import inspect
from sae_jax.progress import Progress
from sae_jax.store import Folder, StoreWriter, open_store
from sae_jax.subjects import load_subject
from sae_jax.text import Corpus, Document, corpus_of, is_heldout

WIDTHS = {"resid_post.0": 6, "mlp_out.0": 10}
VOCABULARY = 50


def make_tokenizer():
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@dataclass(frozen=True)
class TinySubject:
    """An embedding, and at each position the sum of those up to it."""

    embed: jax.Array = field(
        default_factory=lambda: jnp.asarray(
            np.random.default_rng(0).standard_normal((VOCABULARY, 6)), jnp.float32
        )
    )
    identity: str = "tiny-1"
    name: str = "tiny"
    context_length: int = 16
    bos_id: int = 0

    vocab_size = VOCABULARY
    special_ids = (0,)
    pad_id = 0

    @property
    def dtype(self):
        return self.embed.dtype.name

    @property
    def tokenizer(self):
        return make_tokenizer()

    def width(self, site):
        if site not in WIDTHS:
            raise ValueError(f"no site {site!r}: give one of {', '.join(WIDTHS)}")
        return WIDTHS[site]

    def capture(self, tokens_bt, sites):
        return _capture(self.embed, tokens_bt, sites)


@functools.partial(jax.jit, static_argnames="sites")
def _capture(embed, tokens_bt, sites):
    x_btd = jnp.cumsum(embed[tokens_bt], axis=1)
    wide_btd = jnp.pad(x_btd**2, ((0, 0), (0, 0), (0, 4)), constant_values=1.0)
    acts = {"resid_post.0": x_btd, "mlp_out.0": wide_btd}
    return {site: acts[site].astype(jnp.bfloat16) for site in sites}


def make_documents(n=40, seed=0):
    rng = np.random.default_rng(seed)
    words = (rng.integers(2, VOCABULARY, rng.integers(1, 90)) for _ in range(n))
    texts = [" ".join(f"w{word}" for word in document) for document in words]
    texts[7] = ""
    return [Document(f"folder/{i}.txt", text) for i, text in enumerate(texts)]


SIZES = {"rows_per_shard": 64, "rows_per_chunk": 16, "batch_contexts": 3}
SITES = tuple(WIDTHS)


def run_harvest(out, **changes):
    arguments = {"subject": TinySubject(), "documents": make_documents()}
    arguments |= {"sites": SITES, "progress": False} | SIZES | changes
    subject, documents, sites = (
        arguments.pop(name) for name in ("subject", "documents", "sites")
    )
    return harvest(subject, corpus_of(documents), out, sites, **arguments)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return run_harvest(tmp_path_factory.mktemp("harvest") / "store")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_rows_are_the_activations_of_their_tokens(store, split):
    subject = TinySubject()
    sequences = store.sequences(split)
    acts = subject.capture(store.read_tokens(sequences), SITES)
    for site in WIDTHS:
        rows, is_row = store.read_contexts(site, sequences)
        assert is_row.sum() == store.rows(split) > 64
        assert rows.tobytes() == np.asarray(acts[site]).tobytes()


def test_contexts_hold_whole_documents_in_order(store):
    """The text of each split, told again from the store, is the documents'."""
    texts = {document.name: document.text for document in make_documents()}
    seen = set()
    for split in ("train", "heldout"):
        sequences = store.sequences(split)
        tokens = store.read_tokens(sequences).ravel()
        owners = store.read_documents(sequences).ravel()
        starts = np.flatnonzero(np.diff(owners, prepend=-1))
        assert (tokens[starts] == 0).all() and (tokens == 0).sum() == len(starts)
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            name = store.document_name(owners[start])
            words = [f"w{token}" for token in tokens[start + 1 : stop]]
            expected = texts[name].split()
            is_last = stop == len(tokens)
            assert words == (expected[: len(words)] if is_last else expected)
            assert is_heldout(name, 5) == (split == "heldout")
            assert name not in seen
            seen.add(name)
        dropped = store.manifest.dropped_tokens[split]
        assert 0 <= dropped < 16
    empty = {name for name, text in texts.items() if not text}
    assert seen == set(texts) - empty and empty


def test_order_is_shuffled_and_independent_of_the_given_order(store, tmp_path):
    names = [store.document_name(i) for i in range(store.manifest.n_documents)]
    assert names != sorted(names)
    again = run_harvest(tmp_path / "again", documents=make_documents()[::-1])
    assert read_folder(Path(again.path)) == read_folder(Path(store.path))
    other = run_harvest(tmp_path / "other", seed=1)
    others = [other.document_name(i) for i in range(other.manifest.n_documents)]
    assert sorted(others) == sorted(names) and others != names


def test_max_rows_keeps_the_proportion_of_the_splits(store, tmp_path):
    part = run_harvest(tmp_path / "part", max_rows=330)
    assert part.manifest.rows == {"train": 256, "heldout": 64}
    for split in ("train", "heldout"):
        n = len(part.sequences(split))
        np.testing.assert_array_equal(
            part.read_tokens(part.sequences(split)),
            store.read_tokens(store.sequences(split)[:n]),
        )


def test_statistics(store):
    for site in SITES:
        acts = store.read_ranges(site, store.shards("train")).astype(np.float64)
        statistics = store.statistics(site)
        np.testing.assert_allclose(statistics.mean_d, acts.mean(0), rtol=1e-12)
        square = (acts**2).sum(1)
        assert statistics.mean_square_norm == pytest.approx(square.mean(), rel=1e-12)
        assert statistics.mean_norm == pytest.approx(np.sqrt(square).mean(), rel=1e-12)


def test_the_subject_reads_batches_of_one_shape(tmp_path, monkeypatch):
    sizes = []
    capture = TinySubject.capture

    def count(self, tokens_bt, sites):
        sizes.append(tokens_bt.shape)
        return capture(self, tokens_bt, sites)

    monkeypatch.setattr(TinySubject, "capture", count)
    store = run_harvest(tmp_path / "store")
    n_contexts = len(store.sequences("train")) + len(store.sequences("heldout"))
    assert sizes == [(3, 16)] * -(-n_contexts // 3)


def test_a_complete_store_is_opened(store, capsys, monkeypatch):
    module = importlib.import_module("sae_jax.harvest")  # not the function
    monkeypatch.setattr(module, "pack", None)  # would fail if called
    before = read_folder(Path(store.path))
    assert run_harvest(store.path, progress=True).rows("train") == store.rows("train")
    assert "is complete" in capsys.readouterr().err
    assert read_folder(Path(store.path)) == before


def cut(file):
    file.write_bytes(file.read_bytes()[:-3])


SITE_FILES = {  # of a shard that is full and of the last, which is not
    "rows": "acts/mlp_out.0/c/1/0/0",
    "last rows": "acts/resid_post.0/c/LAST/0/0",
    "positions": "positions/c/0/0/0",
    "last positions": "positions/c/LAST/0/0",
    "record": "shards/1/mlp_out.0.npz",
    "statistics": "statistics/resid_post.0.npz",
    "metadata": "acts/mlp_out.0/zarr.json",
}


@pytest.fixture(scope="module", params=["bfloat16", "int8"])
def whole(request, store, tmp_path_factory):
    """A complete store, and how to harvest it."""
    if request.param == "bfloat16":
        return store, run_harvest
    run = functools.partial(run_harvest, dtype="int8")
    return run(tmp_path_factory.mktemp("whole") / "store"), run


@pytest.mark.parametrize(
    "damage, names",
    [(Path.unlink, [name]) for name in SITE_FILES]
    + [(Path.unlink, list(SITE_FILES))]
    + [(cut, [name]) for name in ("rows", "last rows", "positions", "last positions")],
)
def test_what_a_complete_store_lacks_is_made_anew(whole, tmp_path, damage, names):
    (store, run), path = whole, tmp_path / "store"
    shutil.copytree(store.path, path)
    last = str(len(store.manifest.row_shards) - 1)
    for name in names:
        damage(path / SITE_FILES[name].replace("LAST", last))
    run(path)
    assert read_folder(path) == read_folder(Path(store.path))


def test_scales_are_made_anew(tmp_path):
    store = run_harvest(tmp_path / "store", dtype="int8")
    before = read_folder(tmp_path / "store")
    (tmp_path / "store/scales/mlp_out.0/c/1/0").unlink()
    assert run_harvest(store.path, dtype="int8") is not None
    assert read_folder(tmp_path / "store") == before


def test_a_store_is_not_complete_while_files_are_made_anew(
    store, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "store"
    shutil.copytree(store.path, path)
    file = path / "acts/mlp_out.0/c/2/0/0"
    with pytest.raises(ValueError, match="2/0/0 has .* bytes, not .*; delete it, if"):
        cut(file)
        open_store(path)
    monkeypatch.setattr(StoreWriter, "finish", lambda writer: writer._commit())
    run_harvest(path, progress=True)  # as if it were stopped before it is complete
    err = capsys.readouterr().err
    assert "making anew" in err
    with pytest.raises(ValueError, match="still being written"):
        open_store(path)
    monkeypatch.undo()
    stores.fail_after(monkeypatch, StoreWriter, "write_shard", 0, Stop)  # nothing left
    run_harvest(path)
    assert read_folder(path) == read_folder(Path(store.path))


@pytest.mark.parametrize("processes", [(0, 1), (1, 0)])
def test_each_process_makes_its_part_anew(store, tmp_path, processes):
    path = tmp_path / "store"
    shutil.copytree(store.path, path)
    for shard in (0, 1):
        (path / f"positions/c/{shard}/0/0").unlink()
    parts = [run_harvest(path, process=p, n_processes=2) for p in processes]
    assert parts[0] is None and parts[1] is not None
    assert read_folder(path) == read_folder(Path(store.path))


def test_damaged_text_is_not_made_anew(store, tmp_path):
    path = tmp_path / "store"
    shutil.copytree(store.path, path)
    (path / "tokens/c/0/0").unlink()
    for file in ("tokens/c/0/0", "positions/c/0/0/0"):
        (path / file).unlink(missing_ok=True)
        with pytest.raises(ValueError, match="tokens/c/0/0.* is missing; restore the"):
            run_harvest(path)


@pytest.mark.parametrize("reads, usual", [(16, 16), (9000, 2048)])
def test_contexts_are_no_longer_than_usual_unless_asked_for(reads, usual):
    settings = {"rows_per_shard": 1, "rows_per_chunk": 1, "heldout_every": 2, "seed": 0}
    settings |= {"max_rows": None, "bos": "none", "corpus": ""}
    subject = TinySubject(context_length=reads)
    for asked, length in ((None, usual), (reads, reads)):
        manifest = plan_store(subject, SITES, context_length=asked, **settings)
        assert manifest.context_length == length


CHANGES = {
    "subject": {"subject": TinySubject(identity="tiny-2")},
    "corpus": {"documents": make_documents(41)},
    "sites": {"sites": ["mlp_out.0"]},
    "context_length": {"context_length": 8},
    "heldout_every": {"heldout_every": 4},
    "max_rows": {"max_rows": 1000},
    "seed": {"seed": 1},
    "rows_per_shard": {"rows_per_shard": 128},
    "rows_per_chunk": {"rows_per_chunk": 32},
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_setting_is_named(store, name):
    told = "another text" if name == "corpus" else f"{name} = "
    with pytest.raises(ValueError, match=f"was begun with {told}.*--out") as error:
        run_harvest(store.path, **CHANGES[name])
    assert "\n" not in str(error.value)


def test_another_dtype_of_the_subject_is_named(store):
    other = TinySubject(embed=TinySubject().embed.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="begun with subject = .*float32.*bfloat16"):
        run_harvest(store.path, subject=other)


def test_a_store_is_harvested_by_one_process_at_a_time(store, tmp_path):
    shutil.copytree(store.path, tmp_path / "store")
    manifest = tmp_path / "store" / "manifest.json"
    begun = json.loads(manifest.read_text()) | {"complete": False}
    manifest.write_text(json.dumps(begun))
    with lock_folder(tmp_path / "store"):
        with pytest.raises(ValueError, match="in use by another process"):
            run_harvest(tmp_path / "store")


class Stop(Exception):
    pass


@pytest.mark.parametrize("n_shards", [0, 1, 5])
def test_stopped_and_resumed_is_byte_identical(store, tmp_path, n_shards, monkeypatch):
    stores.fail_after(monkeypatch, StoreWriter, "write_shard", n_shards, Stop)
    with pytest.raises(Stop):
        run_harvest(tmp_path / "store")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="still being written"):
        open_store(tmp_path / "store")
    resumed = run_harvest(tmp_path / "store")
    assert read_folder(Path(resumed.path)) == read_folder(Path(store.path))


@pytest.mark.parametrize("n_processes", [2, 3])
def test_several_processes_leave_the_bytes_of_one(store, tmp_path, n_processes):
    """Begun in any order; the last to end makes the store complete."""
    share = functools.partial(
        run_harvest, tmp_path / "store", n_processes=n_processes, wait_secs=60
    )
    with concurrent.futures.ThreadPoolExecutor(n_processes) as pool:
        others = [pool.submit(share, process=p) for p in range(1, n_processes)]
        first = pool.submit(share, process=0)
        parts = [part.result() for part in [first, *others]]
    assert any(parts)
    assert read_folder(tmp_path / "store") == read_folder(Path(store.path))


def test_a_process_does_not_wait_for_ever(tmp_path):
    with pytest.raises(TimeoutError, match="process 0 wrote no text .* for 0.2 s"):
        run_harvest(tmp_path / "store", process=1, n_processes=2, wait_secs=0.2)
    with pytest.raises(ValueError, match="process = 2 of n_processes = 2"):
        run_harvest(tmp_path / "store", process=2, n_processes=2)


@pytest.mark.parametrize("packs", [True, False])
def test_each_file_of_text_gives_the_first_process_more_time(
    tmp_path, monkeypatch, packs
):
    """A process that waits 10 s for text; every 8 s a file of it comes, for 40 s."""
    module = importlib.import_module("sae_jax.harvest")
    now = 0.0

    def sleep(secs):
        nonlocal now
        now += secs
        if now % 8 == 0 and now <= 40:
            Folder(tmp_path).write(f"tokens/c/{now}", b"")

    def choose_manifest(folder, planned):
        return SimpleNamespace(is_packed=packs and now >= 45)

    clock = SimpleNamespace(monotonic=lambda: now, sleep=sleep)
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "choose_manifest", choose_manifest)
    timeout = pytest.raises(TimeoutError, match="for 10 s")
    with contextlib.nullcontext() if packs else timeout:
        assert module.wait_for_text(Folder(tmp_path), None, 10, False).is_packed
    assert 45 <= now <= 51


@pytest.mark.parametrize("packing", ["joined", "padded"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_size_is_limited(tmp_path, packing, dtype):
    part = run_harvest(tmp_path / "part", max_gb=2e-5, packing=packing, dtype=dtype)
    rows = sum(part.manifest.rows.values())
    n_contexts = sum(text["contexts"] for text in part.manifest.text_shards)
    row_bytes = {"bfloat16": 2 * 16 + 8, "int8": 16 + 2 * 4 + 8}[dtype]
    # A chunk of 16 rows of each split may be missing, and a context of each.
    assert 0.85 * 2e4 < rows * row_bytes + n_contexts * 8 * 16 <= 2e4
    size = sum(len(data) for data in read_folder(tmp_path / "part").values())
    assert size > 2e4  # with small files


def test_a_limit_of_the_size_is_a_setting(store, tmp_path):
    with pytest.raises(ValueError, match="max_gb = 1e-06 holds 20 rows of 48 bytes"):
        run_harvest(tmp_path / "small", max_gb=1e-6)
    with pytest.raises(ValueError, match="holds 25 rows of 40 bytes"):  # with scales
        run_harvest(tmp_path / "small", max_gb=1e-6, dtype="int8")
    with pytest.raises(ValueError, match="holds 41 rows .* least is 64, a .* chunk"):
        run_harvest(tmp_path / "small", max_gb=2e-6, rows_per_chunk=32)
    both = run_harvest(tmp_path / "both", max_gb=1, max_rows=330)
    assert both.manifest.max_rows == 330
    with pytest.raises(ValueError, match="begun with max_gb = 1, this harvest has 2"):
        run_harvest(tmp_path / "both", max_gb=2, max_rows=330)


@pytest.mark.parametrize("packing", ["joined", "padded"])
@pytest.mark.parametrize("bos", ["document", "context", "none"])
def test_rows_of_special_tokens_and_padding_are_left_out(tmp_path, packing, bos):
    store = run_harvest(
        tmp_path / "store", packing=packing, bos=bos, exclude_special=True
    )
    assert store.manifest.packing == packing and store.manifest.bos == bos
    for split in ("train", "heldout"):
        sequences = store.sequences(split)
        tokens = store.read_tokens(sequences)
        acts = TinySubject().capture(tokens, SITES)
        is_text = (tokens != 0) & (store.read_documents(sequences) >= 0)
        for site in SITES:
            rows, is_row = store.read_contexts(site, sequences)
            n_rows = store.rows(split)
            assert 0 <= is_text.sum() - n_rows < 16  # short of a chunk
            is_kept = is_text & (np.cumsum(is_text).reshape(is_text.shape) <= n_rows)
            np.testing.assert_array_equal(is_row, is_kept)
            assert rows[is_row].tobytes() == np.asarray(acts[site])[is_row].tobytes()


def test_int8_costs_little(store, tmp_path):
    coarse = run_harvest(tmp_path / "store", dtype="int8")
    for site in SITES:
        rows, stored = (
            opened.read_ranges(site, opened.shards("train")).astype(float)
            for opened in (store, coarse)
        )
        nmse = ((rows - stored) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum()
        assert 0 < nmse < 1e-4


def test_a_full_disk_is_one_line_and_resumable(store, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    stores.fail_after(monkeypatch, Folder, "write", 6, full)
    with pytest.raises(OSError, match="is full, with 1 MB still to .* harvest again"):
        run_harvest(tmp_path / "store")
    monkeypatch.undo()
    resumed = run_harvest(tmp_path / "store")
    assert read_folder(Path(resumed.path)) == read_folder(Path(store.path))


def test_too_little_disk_is_said_before_the_model_runs(tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 1000))
    monkeypatch.setattr(TinySubject, "capture", None)
    with pytest.raises(OSError, match="needs 1 MB more.*0 MB free: lower --max_rows"):
        run_harvest(tmp_path / "store")


WRONG = {
    "no sites": ({"sites": []}, "no sites"),
    "site": ({"sites": ["resid_post.9"]}, "no site 'resid_post.9'"),
    "context": ({"context_length": 17}, "17 is more than the subject's 16"),
    "no context": ({"context_length": 0}, "context_length = 0: must be at least 1"),
    "shard": ({"rows_per_shard": 100}, "100 is not a multiple of .* make it 96"),
    "tiny shard": ({"rows_per_shard": 7}, "make it 16"),
    "dtype": ({"dtype": "float32"}, "dtype is .float32., not one of bfloat16, int8"),
    "heldout": ({"heldout_every": 1}, "heldout_every = 1: must be at least 2"),
    "rows": ({"max_rows": 31}, "make it at least 32"),
    "batch": ({"batch_contexts": 0}, "batch_contexts = 0"),
    "no documents": ({"documents": []}, "no text: none of 0 sources holds a document"),
    "no text": ({"documents": [Document("a", " "), Document("b", "")]}, "no text"),
    "one document": (
        {"documents": [Document("a", "w3 w4")]},
        "no document of the text is .*: .* JSON lines .* heldout_every",
    ),
    "short": (
        {"documents": [Document(f"{i}", "w3 w4") for i in range(9)]},
        "documents give 0 rows in contexts of context_length = 16",
    ),
}


@pytest.mark.parametrize("changes, message", WRONG.values(), ids=WRONG)
def test_what_cannot_be_harvested_is_refused(
    tmp_path, changes, message, monkeypatch
):
    monkeypatch.setattr(TinySubject, "capture", None)
    with pytest.raises(ValueError, match=message) as error:
        run_harvest(tmp_path / "store", **changes)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    run_harvest(tmp_path / "store")  # nothing of it stays


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="not a store and not empty"):
        run_harvest(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "fault", ["site", "setting", "begun", "other things", "rights"]
)
def test_faults_are_told_before_the_text_is_read(store, tmp_path, monkeypatch, fault):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    out, settings, message = tmp_path / "a" / "b", {}, "right to write there"
    if fault == "site":
        settings, message = {"sites": ["resid_post.9"]}, "resid_post.9"
    elif fault == "setting":
        settings, message = {"batch_contexts": 0}, "batch_contexts = 0"
    elif fault == "begun":
        out, settings, message = store.path, {"seed": 1}, "begun with seed = 0"
    elif fault == "other things":
        (tmp_path / "notes.txt").write_text("ours")
        out, message = tmp_path, "not a store and not empty"
    else:
        monkeypatch.setattr(Path, "touch", refuse)
    corpus = Corpus(lambda: pytest.fail("the text was read"))
    settings = {"sites": SITES, "progress": False} | SIZES | settings
    with pytest.raises((ValueError, OSError), match=message) as error:
        harvest(TinySubject(), corpus, out, settings.pop("sites"), **settings)
    assert "\n" not in str(error.value) and not (tmp_path / "a").exists()


def test_activations_that_are_not_numbers_are_refused(tmp_path):
    embed = np.full((VOCABULARY, 6), np.nan, np.float32)
    with pytest.raises(ValueError, match="infinite or not a number"):
        run_harvest(tmp_path / "store", subject=TinySubject(embed=jnp.asarray(embed)))


def test_progress_is_on_stderr(tmp_path, capsys):
    store = run_harvest(tmp_path / "store", progress=True)
    captured = capsys.readouterr()
    total = f"{sum(store.manifest.rows.values()):,}"
    assert captured.err.splitlines()[-1].startswith(f"harvest: {total} of {total} rows")
    assert captured.out == ""


def test_packing_tells_no_more_rows_than_there_are(tmp_path, monkeypatch):
    told = []

    class Line(Progress):
        def update(self, done, **scalars):
            told.append((self._name, self._total, done))

    module = importlib.import_module("sae_jax.harvest")
    monkeypatch.setattr(module, "Progress", Line)
    store = run_harvest(tmp_path / "store", max_rows=330)
    told = [update for update in told if update[0] == "pack"]
    assert {total for _, total, _ in told} == {330}
    done = [n for *_, n in told]
    assert done == sorted(done) and done[-1] == sum(store.manifest.rows.values()) == 320


def test_a_harvested_store_has_no_fault(store):
    assert inspect(store.path, verify=True).faults == {}


def test_progress_is_of_this_process_and_goes_on(store, tmp_path, capsys, monkeypatch):
    total = sum(s.rows for s in store.manifest.row_shards[::2])
    stores.fail_after(monkeypatch, StoreWriter, "write_shard", 2, Stop)
    with pytest.raises(Stop):
        run_harvest(tmp_path / "store", n_processes=2)
    monkeypatch.undo()
    assert run_harvest(tmp_path / "store", n_processes=2, progress=True) is None
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"harvest: {total:,} of {total:,} rows")
    assert any(f"documents, {total:,} rows of " in line for line in lines)
    assert any(line.endswith("part 0 of 2") for line in lines)


def test_the_default_subject(tmp_path):
    subject = load_subject()
    text = Document("a.py", "import os\n" * 200), Document("b.py", "x = 1\n" * 200)
    assert [is_heldout(document.name, 5) for document in text] == [False, True]
    store = harvest(
        subject,
        corpus_of(text),
        tmp_path / "store",
        ["resid_post.3", "mlp_act.0"],
        context_length=32,
        rows_per_shard=128,
        rows_per_chunk=32,
        progress=False,
    )
    sequences = store.sequences("heldout")
    tokens = store.read_tokens(sequences)
    assert tokens[0, 0] == subject.bos_id
    words = subject.decode_tokens(tokens[0, 1:])
    assert store.document_name(store.read_documents(sequences)[0, 0]) == "b.py"
    assert "".join(words) in text[1].text
    _, acts = subject.forward(tokens, capture=store.sites, logits=False)
    for site in store.sites:
        rows = store.read_contexts(site, sequences)[0].astype(np.float32)
        expected = np.asarray(acts[site], np.float32)
        np.testing.assert_allclose(rows, expected, rtol=2**-7, atol=1e-2)


def test_a_row_is_the_same_wherever_in_a_batch_it_lies():
    """Of a harvest that goes on, and of one in parts, batches are made of others."""
    subject = load_subject()
    sites = ("resid_pre.0", "attn_out.1", "mlp_act.2", "resid_post.3")
    rng = np.random.default_rng(0)
    tokens_bt = rng.integers(0, subject.vocab_size, (16, 64)).astype(np.int32)

    def capture(order):
        acts = subject.capture(tokens_bt[order], sites)
        return {site: np.asarray(acts[site]).view(np.uint16) for site in sites}

    expected = capture(np.arange(16))
    for order in (rng.permutation(16), np.roll(np.arange(16), 5), np.full(16, 3)):
        for site, found in capture(order).items():
            np.testing.assert_array_equal(found, expected[site][order])


def test_rows_are_bfloat16(store):
    rows = store.read_ranges("mlp_out.0", [(0, 4)])
    assert rows.dtype == ml_dtypes.bfloat16
    metadata = json.loads((Path(store.path) / "acts/mlp_out.0/zarr.json").read_text())
    assert metadata["data_type"] == "bfloat16"
