"""Checkpoints: what is restored, where to, and what is never chosen."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import synthetic

from sae_jax import checkpoint, run, state
from sae_jax.checkpoint import Checkpoints
from sae_jax.config import MeshConfig
from sae_jax.mesh import make_mesh
from sae_jax.store import open_store


@pytest.fixture(scope="module")
def saved(planted_store, tmp_path_factory):
    """A run folder with a checkpoint of step 3, made on mesh (2, 4), and its state."""
    return _save(tmp_path_factory.mktemp("saved") / "run", planted_store, (2, 4))


@pytest.fixture(scope="module")
def unsharded(planted_store, tmp_path_factory):
    """The same on one device. Orbax keeps shards as small as the other's in an index
    that has a checksum of its own."""
    return _save(tmp_path_factory.mktemp("unsharded") / "run", planted_store, (1, 1))


def _save(workdir, planted_store, shape):
    setup = _setup(planted_store, shape)
    train_state = state.create(setup, jnp.asarray(synthetic.sample_rows(256)))
    ema = jax.tree.map(lambda param: param / 2, train_state.params)
    mu = jax.tree.map(lambda param: param * 3, train_state.params)
    optimizer = train_state.optimizer._replace(mu=mu)
    train_state = train_state._replace(ema=ema, optimizer=optimizer)
    checkpoints = Checkpoints(workdir)
    checkpoints.save(3, train_state, setup)
    checkpoints.close()
    return workdir, jax.device_get(train_state)


def _setup(planted_store, shape):
    mesh = make_mesh(MeshConfig(*shape))
    store = open_store(planted_store)
    return synthetic.make_setup(synthetic.make_config(), mesh, store)


def test_a_state_is_restored_onto_any_mesh(mesh, saved, planted_store):
    workdir, expected = saved
    setup = _setup(planted_store, tuple(mesh.shape.values()))
    checkpoints = Checkpoints(workdir)
    restored = checkpoints.restore(3, setup)
    checkpoints.close()
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), expected)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state.abstract(setup))
    for leaf, sharding in zip(jax.tree.leaves(restored), jax.tree.leaves(shardings)):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_an_sae_is_loaded_without_mesh_from_run_or_checkpoint(saved):
    workdir, expected = saved
    acts = synthetic.sample_rows(5)
    for path in (workdir, workdir / "checkpoints" / "3"):
        sae = run.load(path, weights="raw")
        assert (sae.n_latents, sae.d_model, sae.site) == (128, 16, synthetic.SITE)
        np.testing.assert_array_equal(sae.w_enc_ld[...], expected.params["w_enc_ld"])
        assert sae.decode(sae.encode(acts)).shape == acts.shape


def test_averaged_weights_are_corrected_and_of_unit_norm(saved):
    workdir, expected = saved
    sae = run.load(workdir)
    decay = synthetic.make_config().optimizer.ema_decay
    np.testing.assert_allclose(
        sae.w_enc_ld[...], expected.ema["w_enc_ld"] / (1 - decay**3), rtol=1e-6
    )
    np.testing.assert_allclose(
        np.linalg.norm(sae.w_dec_ld[...], axis=1), 1, atol=3e-7
    )


def test_a_torn_checkpoint_is_never_chosen(saved, tmp_path):
    workdir, _ = saved
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    whole = copy / "checkpoints" / "3"
    torn = copy / "checkpoints" / "4.orbax-checkpoint-tmp"
    shutil.copytree(whole, torn)
    (torn / "commit_success.txt").unlink(missing_ok=True)
    checkpoints = Checkpoints(copy)
    assert checkpoints.latest_step == 3
    checkpoints.close()
    assert run.load(copy, weights="raw").n_latents == 128


def flip_bit(step, item, row):
    """Changes one bit of the row, where it is among the files of an item."""
    n_found = 0
    for path in (step / item).rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        if (place := data.find(row.tobytes())) >= 0:
            changed = bytes([data[place] ^ 1])
            path.write_bytes(data[:place] + changed + data[place + 1 :])
            n_found += 1
    assert n_found


@pytest.mark.parametrize("item", ["params", "ema", "optimizer"])
def test_a_changed_bit_is_never_loaded(item, unsharded, tmp_path, planted_store):
    workdir, expected = unsharded
    shutil.copytree(workdir, tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "3"
    arrays = getattr(expected, item)
    arrays = arrays.mu if item == "optimizer" else arrays
    flip_bit(step, item, arrays["w_enc_ld"][77])
    message = f"{step}/{item}/.*w_.* is missing or damaged .its checksum .*: delete"
    checkpoints = Checkpoints(tmp_path / "run", is_read_only=True)
    with pytest.raises(ValueError, match=f"{message} {step} to go on from the begin"):
        checkpoints.restore(3, _setup(planted_store, (2, 4)))
    checkpoints.close()
    for weights, read in (("raw", "params"), ("ema", "ema")):
        if read == item:
            with pytest.raises(ValueError, match=message):
                run.load(tmp_path / "run", weights=weights)
        else:
            assert run.load(tmp_path / "run", weights=weights).n_latents == 128


@pytest.mark.parametrize(
    "where, change",
    [
        ("params/ocdbt.process_0/d/*", None),
        ("params/ocdbt.process_0/d/*", lambda data: data[: len(data) // 4]),
        ("params/manifest.ocdbt", None),
        ("params/_METADATA", lambda data: b""),
        ("meta/metadata", None),
        ("meta/metadata", lambda data: b""),
        ("meta/metadata", lambda data: data.replace(b'"seed": 0', b'"seed": 1')),
        ("meta/metadata", lambda data: data.replace(b'"checksum"', b'"checksun"')),
    ],
)
def test_missing_and_cut_files_are_told_in_one_line(where, change, unsharded, tmp_path):
    shutil.copytree(unsharded[0], tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "3"
    path = max(step.glob(where), key=lambda path: path.stat().st_size)
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match="is missing or damaged .*: delete") as caught:
        run.load(tmp_path / "run", weights="raw")
    message = str(caught.value)
    assert message.startswith(f"{step}/{where.partition('/')[0]}")
    assert "\n" not in message and len(message) < 3 * len(str(step)) + 400


@pytest.mark.parametrize(
    "error, cure",
    [
        (PermissionError(13, "Permission denied"), "get the right to read there"),
        (ValueError("x: [os_error_code='13']"), "get the right to read there"),
        (OSError(24, "Too many open files"), "see to that"),
    ],
)
def test_what_is_not_damage_is_not_to_be_deleted(error, cure, saved, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
    with pytest.raises(OSError, match=f"3/meta cannot be read .*: {cure}, and run the"):
        run.load(saved[0])


@pytest.mark.parametrize("name", ["nothing", "checkpoints"])
def test_a_folder_without_checkpoints_is_named(tmp_path, name):
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "nothing" if name == "nothing" else tmp_path
    with pytest.raises(FileNotFoundError, match=str(path)):
        run.load(path)


def test_weights_are_ema_or_raw(saved):
    with pytest.raises(ValueError, match="did you mean 'raw'"):
        run.load(saved[0], weights="rew")


def test_a_full_disk_is_seen_before_training(planted_store, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="MB free: make room, or lower checkpoints_kept"):
        checkpoint.check_space(tmp_path, _setup(planted_store, (1, 1)))
