"""Run folders in a bucket: the same bits as on a disk, and no half of a checkpoint."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import gcs_server
import jax
import numpy as np
import planted
import pods
import pytest
import synthetic
from s3_server import bucket, server, set_environment  # noqa: F401
from test_evaluation import SMALL

import sae_jax
from sae_jax import evaluation, loop, run
from sae_jax import bucket as buckets
from sae_jax.bucket import BucketManager
from sae_jax.config import DataConfig, MeshConfig, SaeConfig
from sae_jax.evals import METRICS
from sae_jax.store import Folder
from sae_jax.store.folder import raise_plainly

pytest.importorskip("moto")

SHAPE = (2, 4)
OFTEN = {"checkpoint_every_steps": 4, "checkpoints_kept": 2}
_CHILD = """
import os
os.environ["NPROC"] = "32"
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
import json, sys
import test_remote_checkpoints
from sae_jax import loop
store, workdir, moment, fields = sys.argv[1:]
test_remote_checkpoints.kill_at(moment)
config = test_remote_checkpoints.make_config(store, **json.loads(fields))
loop.train(config, workdir)
"""


def make_config(store, **fields):
    fields = {"mesh": MeshConfig(*SHAPE), "checkpoints_kept": 1} | fields
    return synthetic.make_config(store, **fields)


def kill_at(moment):
    """Has this process killed while it saves step 16; not, if there is no moment."""
    name = {"array": "_write", "end": "_mark"}.get(moment)
    if name is None:
        return
    method = getattr(BucketManager, name)

    def patched(self, first, *others):
        is_it = first == 16 or "16/" in str(first) and "optimizer/nu" in str(first)
        if is_it:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, first, *others)

    setattr(BucketManager, name, patched)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A store, a run on it on a disk, and its final state."""
    path = tmp_path_factory.mktemp("undisturbed")
    store = synthetic.write_store(path / "store")
    state = loop.train(make_config(store), path / "run")
    return store, path / "run", jax.device_get(state)


@pytest.fixture(scope="module")
def trained(server, undisturbed):  # noqa: F811
    """The same run in a bucket, not to be changed, and its final state."""
    path = "s3://bucket/trained"
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_environment(monkeypatch, server)
        config = make_config(undisturbed[0], **OFTEN)
        state = loop.train(config, path)
    return path, jax.device_get(state)


def assert_same(state, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), expected)


def read_metrics(text):
    """The rows, less what is another in every life."""
    return synthetic.drop_times([json.loads(line) for line in text.splitlines()])


def assert_same_losses(workdir, metrics):
    """Of the steps that a run on one process did, up to the order of sums."""
    ours = read_metrics(Folder(workdir).read("metrics.jsonl"))
    theirs = read_metrics(metrics.read_bytes())
    steps = [row["step"] for row in ours]
    assert steps == [*range(1, len(ours) + 1)] and len(ours) >= len(theirs) == 24
    for one, other in zip(ours, theirs):
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-5)


def start(store, workdir, moment="", **fields):
    folders = (os.path.dirname(__file__), os.path.dirname(sae_jax.__path__[0]))
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(store), workdir, moment, json.dumps(fields)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        stderr=subprocess.PIPE,
    )


def list_steps(workdir):
    """The steps that have arrays, and those of them that are whole."""
    tops = [name.split("/") for name in Folder(f"{workdir}/checkpoints").list()]
    steps = {int(parts[0]) for parts in tops if parts[0].isdigit()}
    return steps, {int(parts[0]) for parts in tops if parts[-1] == "meta.json"}


def list_torn(workdir):
    """Each step and life with arrays that are not whole."""
    tops = [name.split("/") for name in Folder(f"{workdir}/checkpoints").list()]
    lives = {(parts[0], parts[1]) for parts in tops if parts[0].isdigit()}
    return lives - {(parts[0], parts[1]) for parts in tops if parts[-1] == "meta.json"}


def stop_in_a_save(workdir, before, send, moments):
    """Stops a run that was just started while it saves, not always in its first save;
    `before` is what was torn then."""
    seen, n_saves = set(), moments.randint(1, 4)
    end = time.monotonic() + 280
    while time.monotonic() < end:
        seen |= list_torn(workdir) - before
        if len(seen) >= n_saves:
            time.sleep(moments.uniform(0, 0.2))
            send(signal.SIGSTOP)
            if list_torn(workdir) - before:
                return
            send(signal.SIGCONT)
        time.sleep(0.01)
    raise TimeoutError(f"the run saves nothing more: {sorted(seen)}")


def test_a_run_in_a_bucket_is_the_same(bucket, trained, undisturbed):  # noqa: F811
    store, local, expected = undisturbed
    path, state = trained
    assert_same(state, expected)
    assert_same(loop.train(make_config(store, **OFTEN), path), expected)  # all is done
    files = Folder(path)
    ours = read_metrics(files.read("metrics.jsonl"))
    assert ours == read_metrics((local / "metrics.jsonl").read_bytes())
    assert len(ours) == 24 and run.read_config(path).sae.d_model == 16
    assert all(len(files.read(name)) > 20 for name in files.list("tensorboard/"))
    assert list_steps(path) == ({20, 24}, {20, 24})


def test_parameters_alone_are_read(
    bucket, trained, undisturbed, monkeypatch  # noqa: F811
):
    read, names = BucketManager._read, []

    def note(self, name, target):
        names.append(name.split("/", 2)[2])
        return read(self, name, target)

    monkeypatch.setattr(BucketManager, "_read", note)
    acts_bd = synthetic.sample_rows(5)
    theirs = run.load(undisturbed[1]).encode(acts_bd)
    for path in (trained[0], f"{trained[0]}/checkpoints/24"):
        ours = run.load(path).encode(acts_bd)
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    arrays = ("w_enc_ld", "w_dec_ld", "b_enc_l", "b_dec_d")
    assert set(names) == {f"ema/{name}" for name in arrays}
    assert run.load(f"{trained[0]}/checkpoints/20").n_latents == 128
    for path in (f"{trained[0]}/nothing", f"{trained[0]}/checkpoints/25"):
        with pytest.raises(FileNotFoundError, match=path):
            run.load(path)


def test_a_copy_on_a_disk_goes_on_too(
    bucket, trained, undisturbed, tmp_path  # noqa: F811
):
    store, _, expected = undisturbed
    files, copy = Folder(trained[0]), tmp_path / "copy"
    for name in files.list():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(files.read(name))
    (meta,) = (copy / "checkpoints" / "24").glob("*/meta.json")
    meta.unlink()
    assert run.locate(copy)[1] == 20
    assert_same(loop.train(make_config(store, **OFTEN), copy), expected)
    assert list_steps(copy) == ({20, 24}, {20, 24})


def test_damage_is_named_and_never_zeros(bucket, trained):  # noqa: F811
    files = Folder(f"{trained[0]}/checkpoints")
    (name,) = (n for n in files.list("24/") if n.endswith("ema/w_enc_ld/c/2/0"))
    data = files.read(name)
    for damaged in (data[:9] + bytes([data[9] ^ 1]) + data[10:], data[:-9], None):
        files.delete(name) if damaged is None else files.write(name, damaged)
        with pytest.raises(ValueError, match="ema/w_enc_ld is missing or damaged"):
            run.load(trained[0])
    assert run.load(trained[0], weights="raw").n_latents == 128
    files.write(name, data)


@pytest.mark.parametrize("moment", ["array", "end"])
def test_a_kill_in_mid_save_loses_no_more_than_that_save(
    moment, bucket, undisturbed  # noqa: F811
):
    store, local, expected = undisturbed
    child = start(store, bucket, moment)
    assert child.wait(280) == -signal.SIGKILL, child.stderr.read().decode()
    child.stderr.close()
    assert list_steps(bucket) == ({8, 16}, {8})
    assert run.locate(bucket)[1] == 8
    with pytest.raises(FileNotFoundError, match="those of the steps 8$"):
        run.load(f"{bucket}/checkpoints/16")
    assert_same(loop.train(make_config(store), bucket), expected)
    assert list_steps(bucket) == ({24}, {24})
    data = Folder(bucket).read("metrics.jsonl")
    whole = (local / "metrics.jsonl").read_bytes()
    assert read_metrics(data) == read_metrics(whole)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("n_kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_at_random_moments_of_saves(
    n_kills, bucket, undisturbed, tmp_path  # noqa: F811
):
    store, moments, n_torn = undisturbed[0], random.Random(n_kills), 0
    rows = 64 * (40 + 20 * n_kills)  # more than are done until the last kill
    while n_torn < n_kills:
        before = list_torn(bucket)
        child = start(store, bucket, rows=rows, checkpoint_every_steps=1)
        stop_in_a_save(bucket, before, child.send_signal, moments)
        child.kill()
        child.communicate()
        n_torn += bool(list_torn(bucket) - before)
        if whole := list_steps(bucket)[1]:
            assert run.locate(bucket)[1] == max(whole)
    config = make_config(store, rows=rows, checkpoint_every_steps=100)
    expected = jax.device_get(loop.train(config, tmp_path / "run"))
    assert max(list_steps(bucket)[1]) < config.n_steps
    assert_same(loop.train(config, bucket), expected)
    assert list_steps(bucket) == ({config.n_steps}, {config.n_steps})


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kills_of_some_or_all_processes(bucket, undisturbed, tmp_path):  # noqa: F811
    store, metrics = undisturbed[0], undisturbed[1] / "metrics.jsonl"
    settings = ("--peer_timeout_secs=5", "--config.checkpoint_every_steps=1")
    arguments = (tmp_path / "run", store, 2, 4, *settings, f"--workdir={bucket}")
    moments, victims = random.Random(0), [(0,), (1,), (0, 1)]
    while victims:
        before = list_torn(bucket)
        with pods.Pod(*arguments, rows=48 * 64) as pod:

            def send(number, processes=(0, 1), pod=pod):
                for process in processes:
                    pod.send(process, number)

            stop_in_a_save(bucket, before, send, moments)
            send(signal.SIGKILL, victims[0])
            send(signal.SIGCONT, {0, 1} - {*victims[0]})
            assert all(pod.wait()), pod.tell(0)
        if list_torn(bucket) - before:
            del victims[0]
    with pods.Pod(*arguments, rows=48 * 64) as pod:
        assert pod.wait() == [0, 0], pod.tell(0) + pod.tell(1)
    assert list_steps(bucket) == ({47, 48}, {47, 48})
    assert_same_losses(bucket, metrics)


def test_a_server_that_goes_away_in_mid_save(
    bucket, server, undisturbed, monkeypatch  # noqa: F811
):
    store, _, expected = undisturbed
    write = BucketManager._write

    def cut_off(self, name, copy):
        if name.startswith("16/") and "optimizer" in name:
            server.shut()
        write(self, name, copy)

    with monkeypatch.context() as patch:
        patch.setattr(BucketManager, "_write", cut_off)
        try:
            with pytest.raises(OSError, match=f"{bucket}.* cannot be reached") as error:
                loop.train(make_config(store), bucket)
            assert "\n" not in str(error.value)
            with pytest.raises(OSError, match="cannot be reached"):
                run.load(bucket)
            with pytest.raises(OSError, match="cannot be reached"):
                loop.train(make_config(store), bucket)
        finally:
            server.open()
    assert list_steps(bucket) == ({8, 16}, {8})
    assert_same(loop.train(make_config(store), bucket), expected)


def test_of_two_runs_in_one_folder_the_later_goes_on(
    bucket, undisturbed  # noqa: F811
):
    store, local, expected = undisturbed

    class Later(synthetic.KillAt):
        def write(self, step, scalars):
            self.rows.append(step)
            if step == self.step:
                assert_same(loop.train(make_config(store), bucket), expected)

    later = Later(10)
    with pytest.raises(ValueError, match="another run has begun to write here, so"):
        loop.train(make_config(store), bucket, later)
    assert later.rows[-1] == 16  # its next checkpoint
    assert list_steps(bucket)[1] == {24}
    ours = read_metrics(Folder(bucket).read("metrics.jsonl"))
    assert ours == read_metrics((local / "metrics.jsonl").read_bytes())
    assert_same(loop.train(make_config(store), bucket), expected)
    assert list_steps(bucket) == ({24}, {24})


def test_a_run_that_is_refused_takes_no_folder(bucket, undisturbed):  # noqa: F811
    store, _, expected = undisturbed

    class Refused(synthetic.KillAt):
        def write(self, step, scalars):
            if step == self.step:
                while not list_steps(bucket)[1]:
                    time.sleep(0.05)
                with pytest.raises(ValueError, match="this run has seed = 0, now 5"):
                    loop.train(make_config(store, seed=5), bucket)

    assert_same(loop.train(make_config(store), bucket, Refused(10)), expected)


def test_a_folder_that_is_taken_in_mid_save(
    bucket, undisturbed, monkeypatch  # noqa: F811
):
    """Between the look at who may write and the word that the step is whole."""
    store, _, expected = undisturbed
    checkpoints, write = Folder(f"{bucket}/checkpoints"), Folder.write

    def overtaken(self, name, data):
        if name.startswith("16/"):
            BucketManager(checkpoints).take()
        write(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", overtaken)
        with pytest.raises(ValueError, match="another run has begun to write here"):
            loop.train(make_config(store), bucket)
    assert [n.count("/") for n in checkpoints.list("16/")] == [2]  # meta.json alone
    assert run.locate(bucket)[1] == 8
    assert_same(loop.train(make_config(store), bucket), expected)
    assert list_steps(bucket) == ({24}, {24})


def test_chunks_divide_shards(monkeypatch, bucket, undisturbed):  # noqa: F811
    assert buckets._cut((6, 4), 4) == (6, 4) and buckets._cut((), 4) == ()
    monkeypatch.setattr(buckets, "_MOST_CHUNK_BYTES", 100)
    assert buckets._cut((6, 8), 4) == (3, 8)
    assert buckets._cut((10, 8), 4) == (2, 8)
    assert buckets._cut((7, 8), 4) == (1, 8)
    assert buckets._cut((2, 99), 4) == (1, 99)
    monkeypatch.setattr(buckets, "_MOST_CHUNK_BYTES", 1024)
    store, _, expected = undisturbed
    assert_same(loop.train(make_config(store), bucket), expected)
    # Of four shards of w_enc, two chunks each.
    assert any(n.endswith("params/w_enc_ld/c/7/0") for n in Folder(bucket).list())
    assert_same(loop.train(make_config(store), bucket), expected)


def test_processes_share_a_bucket(bucket, undisturbed, tmp_path):  # noqa: F811
    store, metrics = undisturbed[0], undisturbed[1] / "metrics.jsonl"
    arguments = ("--peer_timeout_secs=5", f"--workdir={bucket}")
    with pods.Pod(tmp_path / "run", store, 2, 4, *arguments) as pod:
        end = time.monotonic() + 280
        while not list_steps(bucket)[1]:
            assert time.monotonic() < end, pod.tell(0)
            time.sleep(0.05)
        pod.send(1, signal.SIGKILL)
        assert pod.wait()[1] == -signal.SIGKILL, pod.tell(0)
    done, writer = max(list_steps(bucket)[1]), synthetic.KillAt(20)
    # One process goes on, on another mesh, and then two again.
    fields = {"checkpoint_every_steps": 2, "checkpoints_kept": 2}
    with pytest.raises(synthetic.Killed):
        config = make_config(store, mesh=MeshConfig(1, 8), **fields)
        loop.train(config, bucket, writer)
    assert writer.rows[0]["step"] == done + 1
    with pods.Pod(tmp_path / "run", store, 2, 4, *arguments) as pod:
        assert pod.wait() == [0, 0], pod.tell(0) + pod.tell(1)
        assert "from step 18 to 24" in pod.tell(0)
    assert list_steps(bucket) == ({18, 24}, {18, 24})
    assert_same_losses(bucket, metrics)
    sae = run.load(bucket)  # in one process, on one device
    assert sae.encode(synthetic.sample_rows(5)).values.shape == (5, 3)


def test_google_cloud_storage_is_the_same_code(
    undisturbed, monkeypatch, tmp_path
):
    """Against a server of ours that has what tensorstore asks for; no other was met."""
    google, path = gcs_server.Server(), f"gs://bucket/{tmp_path.name}"
    google.set_environment(monkeypatch)
    store, _, expected = undisturbed
    try:
        with pytest.raises(synthetic.Killed):
            loop.train(make_config(store), path, synthetic.KillAt(19))
        assert list_steps(path) == ({16}, {16})
        assert_same(loop.train(make_config(store), path), expected)
        assert run.load(path).n_latents == 128
        assert list_steps(path) == ({24}, {24})
    finally:
        google.close()


def test_a_run_in_a_bucket_is_evaluated(
    bucket, tmp_path, monkeypatch  # noqa: F811
):
    subject, path = planted.make_subject(), tmp_path / "store"
    planted.write_store(path, subject)
    data = DataConfig(str(path), site=planted.SITE, batch_rows=64, lanes=4)
    sae = SaeConfig(n_latents=128, k=3, aux_coefficient=0)
    loop.train(make_config("", data=data, rows=64, sae=sae), bucket)
    monkeypatch.setattr(evaluation, "load_subject", lambda name: subject)
    settings = {"subject": "mine", "config": SMALL, "progress": False}
    results = evaluation.evaluate_run(bucket, **settings)
    files = Folder(bucket)
    assert json.loads(files.read("evaluation.json")) == results
    assert b"latent " in files.read("report.html")
    computed = []
    for metric in METRICS.values():
        monkeypatch.setattr(metric, "compute", lambda *args: computed.append(args))
    assert evaluation.evaluate_run(bucket, report=False, **settings) == results
    assert not computed
    out = evaluation.find_out(f"{bucket}/checkpoints/1")
    assert Folder(out).url == f"{bucket}/evaluations/1"


def test_what_is_wrong_with_a_bucket_is_told(
    bucket, server, undisturbed  # noqa: F811
):
    store, _, _ = undisturbed
    with pytest.raises(FileNotFoundError, match="no such bucket: make it"):
        loop.train(make_config(store), "s3://elsewhere/run")
    with pytest.raises(FileNotFoundError, match="neither a run folder nor"):
        run.load(bucket)
    with pytest.raises(PermissionError, match="check the credentials"):
        raise_plainly(Folder(bucket), ValueError("PERMISSION_DENIED: HTTP 403"))
    manager = BucketManager(Folder(bucket))
    with server.denying(), pytest.raises(PermissionError, match="the credentials"):
        manager._read("1/params", jax.ShapeDtypeStruct((1,), np.float32))
