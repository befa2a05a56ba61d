"""Harvest, training and resume against a bucket whose server goes away in between."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pods
import pytest
import synthetic
from s3_server import Server, bucket, server, set_environment  # noqa: F401
from test_harvest import run_harvest
from test_store_remote import read_all

from sae_jax.exits import PEER_LOST
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
    assert_same_bits(resumed, whole)


def assert_same_bits(state, expected):
    for ours, theirs in zip(
        jax.tree.leaves(jax.device_get(state)),
        jax.tree.leaves(jax.device_get(expected)),
        strict=True,
    ):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_a_server_that_is_killed_ends_a_run_in_one_line(tmp_path, monkeypatch):
    """Not its door shut: the process killed."""
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


_HELD = """
import os, signal
from sae_jax.cli import run
from sae_jax.writers import JsonLinesWriter
write = JsonLinesWriter.write
def hold(self, step, scalars):
    if step == 20:
        os.kill(os.getpid(), signal.SIGSTOP)
    write(self, step, scalars)
JsonLinesWriter.write = hold
run()
"""


@pytest.mark.slow
def test_a_server_that_is_killed_in_mid_run(tmp_path, monkeypatch, capsys):
    """The run is held while its server is killed, so that what the bucket had at that
    moment is known; from another server that has just this it goes on."""
    own = Server()
    try:
        set_environment(monkeypatch, own)
        store, workdir = Folder("s3://bucket/store"), Folder("s3://bucket/run")
        synthetic.write_store(store.url)
        config = synthetic.make_config(store.url, rows=48 * 64)
        whole = train(config, tmp_path / "whole")
        child = start_held(config, workdir.url, tmp_path)
        _, status = os.waitpid(child.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), child.communicate()
        had = [(f, name, f.read(name)) for f in (store, workdir) for name in f.list()]
        own.kill()
        child.send_signal(signal.SIGCONT)
        _, err = child.communicate(timeout=200)
        assert child.returncode == PEER_LOST, err
        *_, last = err.splitlines()
        told = "sae-jax train: s3://bucket/.* cannot be reached, after 6 tries more"
        assert re.match(told, last), err
        own.start_again()
        for folder, name, data in had:
            folder.write(name, data)
        capsys.readouterr()
        assert_same_bits(train(config, workdir.url), whole)
        # The save of step 8 is waited for before that of 16, which may have been torn.
        assert re.search(r"from step (8|16) to 48 ", capsys.readouterr().err)
        lines = workdir.read("metrics.jsonl").splitlines()
        assert [json.loads(line)["step"] for line in lines] == [*range(1, 49)]
        synthetic.write_store(tmp_path / "store")
        assert read_all(store.url) == read_all(tmp_path / "store")
    finally:
        own.kill()


def start_held(config, workdir, path):
    """The run as a command, which stops at step 20 until it is told to go on."""
    file = path / "config.py"
    pods.write_config(file, config)
    return subprocess.Popen(
        [
            *(sys.executable, "-c", _HELD, "train"),
            *(f"--config={file}", f"--workdir={workdir}", "--cpu_devices=8"),
        ],
        env=os.environ | pods.make_environ(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def test_addresses_need_not_be_written_as_urls(tmp_path):
    """file:// is a folder."""
    path = tmp_path / "store"
    synthetic.write_store(path)
    assert open_store(f"file://{path}").path == str(path)
    assert Folder(Path("s3://bucket/store")).url == "s3://bucket/store"
