"""Datasets of the Hub: the real `datasets` streams, a folder in the Hub's place."""

import json
import sys
from types import SimpleNamespace

import pytest

from sae_jax.text import open_corpus, read_documents


def test_a_missing_extra_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"datasets must be .*'sae_jax\[text\]'$"):
        read_documents(["hf:someone/something"])


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What the Hub was asked for; it has one dataset, of two splits."""
    datasets = pytest.importorskip("datasets")
    hub = pytest.importorskip("huggingface_hub")
    for split, texts in {"train": ["a", "b"], "test": ["c", 3]}.items():
        (tmp_path / f"{split}.jsonl").write_text(
            "".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts)
        )
    monkeypatch.setattr(
        hub.HfApi, "dataset_info", lambda self, name: SimpleNamespace(sha="abc")
    )
    asked, load = [], datasets.load_dataset

    def load_from_folder(path, name, split, revision, streaming):
        asked.append((path, name, split, revision, streaming))
        files = {split: str(tmp_path / f"{split}.jsonl")}
        return load("json", data_files=files, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", load_from_folder)
    return asked


def test_a_dataset_is_streamed_at_its_revision(asked):
    corpus = open_corpus(["hf:someone/something"])
    assert not asked
    names = [[d.name for d in corpus.iterate(seed)] for seed in (0, 0, 1)]
    assert names[0] == names[1]
    assert sorted(names[0]) == [f"someone/something:train:{row}" for row in (1, 2)]
    assert asked == [("someone/something", None, "train", "abc", True)] * 3
    other = open_corpus(["hf:someone/something:test:en"])
    assert other.identity != corpus.identity
    assert open_corpus(["hf:someone/something:train"]).identity == corpus.identity
    assert next(other._sources[0].read()).name == "someone/something:test:en:1"
    assert asked[-1] == ("someone/something", "en", "test", "abc", True)


def test_faults_are_one_line(asked):
    with pytest.raises(ValueError, match="hf:x:train, row 1 has no field 'body'.*'n'"):
        read_documents(["hf:x"], "body")
    with pytest.raises((ValueError, OSError), match="hf:x:test") as error:
        read_documents(["hf:x:test"])
    assert "\n" not in str(error.value)
    with pytest.raises(OSError, match="cannot read hf:x:none from the Hugging Face"):
        read_documents(["hf:x:none"])


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("datasets")
    # Nobody listens there.
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match=r"hf:a/b from .* \(Connect.*network") as error:
        read_documents(["hf:a/b:train"])
    assert "\n" not in str(error.value)
