"""Harvest, training and resume against a bucket whose server goes away in between."""

import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import synthetic
from s3_server import bucket, server  # noqa: F401
from test_harvest import run_harvest
from test_store_remote import read_all

from sae_jax.loop import train
from sae_jax.store import Folder, StoreWriter, open_store


def test_a_harvest_goes_on_when_the_server_is_back(
    bucket, server, tmp_path, monkeypatch  # noqa: F811
):
    write_shard, n_left = StoreWriter.write_shard, 3

    def cut_off(self, *shard):
        nonlocal n_left
        n_left -= 1
        if n_left == 0:
            server.shut()
        write_shard(self, *shard)

    monkeypatch.setattr(StoreWriter, "write_shard", cut_off)
    try:
        with pytest.raises(OSError, match=f"{bucket} cannot be reached") as error:
            run_harvest(bucket)
    finally:
        server.open()
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="still being written"):
        open_store(bucket)
    run_harvest(bucket)
    run_harvest(tmp_path / "local")
    assert read_all(bucket) == read_all(tmp_path / "local")


def test_several_processes_share_a_bucket(bucket, tmp_path):  # noqa: F811
    parts = [None, None]

    def run(process):
        parts[process] = run_harvest(
            bucket, process=process, n_processes=2, wait_secs=60
        )

    threads = [threading.Thread(target=run, args=(p,)) for p in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(parts)
    run_harvest(tmp_path / "local")
    assert read_all(bucket) == read_all(tmp_path / "local")


class CutOff(synthetic.KillAt):
    """Shuts the server off at a step, and lets the run go on."""

    def __init__(self, step, server):  # noqa: F811
        super().__init__(step)
        self._server = server

    def write(self, step, scalars):
        try:
            super().write(step, scalars)
        except synthetic.Killed:
            self._server.shut()


def test_training_is_resumed_with_the_same_bits(bucket, server, tmp_path):  # noqa: F811
    synthetic.write_store(bucket)
    synthetic.write_store(tmp_path / "store")
    rows = {"rows": 48 * 64}  # all the train rows, in windows of 8 steps
    local = synthetic.make_config(tmp_path / "store", **rows)
    whole = train(local, tmp_path / "whole")
    config = synthetic.make_config(bucket, **rows)
    try:
        with pytest.raises(OSError, match="cannot be reached") as error:
            train(config, tmp_path / "cut", CutOff(9, server))
    finally:
        server.open()
    assert bucket in str(error.value) and "\n" not in str(error.value)
    metrics = (tmp_path / "cut/metrics.jsonl").read_text().splitlines()
    assert 9 <= len(metrics) < 40
    resumed = train(config, tmp_path / "cut")
    for ours, expected in zip(
        jax.tree.leaves(jax.device_get(resumed)),
        jax.tree.leaves(jax.device_get(whole)),
        strict=True,
    ):
        assert np.asarray(ours).tobytes() == np.asarray(expected).tobytes()


def test_a_server_that_is_killed_ends_a_run_in_one_line(tmp_path, monkeypatch):
    """Not its door shut: the process killed."""
    from s3_server import Server, set_environment

    own = Server()
    try:
        set_environment(monkeypatch, own)
        path = "s3://bucket/store"
        synthetic.write_store(path)
        store = open_store(path)
        own.kill()
        with pytest.raises(OSError, match="cannot be reached, after 3 tries more"):
            store.read_ranges(synthetic.SITE, [(0, 64)])
        with pytest.raises(OSError, match="cannot be reached"):
            train(synthetic.make_config(path), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    finally:
        own.kill()


def test_addresses_need_not_be_written_as_urls(tmp_path):
    """file:// is a folder."""
    path = tmp_path / "store"
    synthetic.write_store(path)
    assert open_store(f"file://{path}").path == str(path)
    assert Folder(Path("s3://bucket/store")).url == "s3://bucket/store"
