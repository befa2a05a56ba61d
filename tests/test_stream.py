"""Rows straight from a subject: those of the text, in an order that can be resumed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic

from sae_jax.config import DataConfig, MeshConfig, SaeConfig, StreamConfig, TrainConfig
from sae_jax.loader import Order
from sae_jax.loop import train
from sae_jax.mesh import batch_sharding, make_mesh
from sae_jax.step import validate
from sae_jax.store import Folder, Text, find_manifest
from sae_jax.stream import Stream
from sae_jax.subjects import load_subject

SITE = "resid_post.1"
T, LANES, BATCH = 16, 4, 24


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """Some ninety contexts of train text."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(20):
        lines = [f"x{n} = {n}\n" for n in rng.integers(1000, size=12)]
        (folder / f"{i}.py").write_text("".join(lines))
    return folder


def make_config(text_file, **fields):
    defaults = dict(
        sae=SaeConfig(n_latents=512, k=4, k_aux=8),
        data=DataConfig(site=SITE, batch_rows=BATCH, lanes=LANES, window_chunks=3),
        stream=StreamConfig(
            subject="default", text=str(text_file), context_length=T, batch_contexts=8
        ),
        rows=10 * BATCH,
        dead_after_rows=2 * BATCH,
        checkpoint_every_steps=3,
        log_every_steps=1,
    )
    return TrainConfig(**(defaults | fields))


def open_stream(text_file, workdir, mesh_shape=(1, 1), **fields):
    """A stream whose text is packed."""
    mesh = make_mesh(MeshConfig(*mesh_shape))
    stream = Stream(make_config(text_file, **fields), mesh, workdir)
    assert stream.data.window_chunks
    return stream


def read_rows(workdir, skip=0):
    """Every train row of the text, float32 [contexts, T, D]."""
    folder = Folder(workdir / "text")
    text = Text(folder, find_manifest(folder))
    tokens = text.read("tokens", text.sequences("train"))
    acts = load_subject().capture(tokens, (SITE,))[SITE]
    return np.asarray(acts)[:, skip:], tokens


def expect_rows(stream, acts_ntd, start, n_steps, seed=0):
    """The rows of steps, from all rows and the order of a store of such chunks."""
    order = Order(
        len(acts_ntd),
        acts_ntd.shape[1],
        stream.data.lanes,
        stream.data.window_chunks,
        seed,
    )
    rows_nd = acts_ntd.reshape(-1, acts_ntd.shape[2])
    for step in range(start, start + n_steps):
        lanes = [
            order.step_rows(step, BATCH // LANES, lane) for lane in range(LANES)
        ]
        yield rows_nd[np.concatenate(lanes)].astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (1, 8), (4, 2)])
@pytest.mark.parametrize("bos, skip", [("document", 0), ("context", 1)])
def test_rows_come_in_the_order_of_a_store(text_file, tmp_path, shape, bos, skip):
    """More than an epoch of them, in windows that steps straddle."""
    settings = dataclasses.replace(
        make_config(text_file).stream, bos=bos, exclude_special=bool(skip)
    )
    stream = open_stream(text_file, tmp_path, shape, stream=settings)
    acts_ntd, tokens = read_rows(tmp_path, skip)
    assert (tokens[:, 0] == 0).all() == bool(skip)
    n_steps = acts_ntd[..., 0].size // BATCH + 5
    batches = stream.batches(0, n_steps)
    sharding = batch_sharding(make_mesh(MeshConfig(*shape)))
    for batch, expected in zip(
        batches, expect_rows(stream, acts_ntd, 0, n_steps), strict=True
    ):
        assert batch.dtype == jnp.bfloat16 and batch.shape == (BATCH, 256)
        assert batch.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_allclose(
            np.asarray(batch, np.float32), expected, rtol=0.02, atol=0.05
        )


def test_the_order_is_of_the_seed(text_file, tmp_path):
    stream = open_stream(text_file, tmp_path, seed=1)
    acts_ntd, _ = read_rows(tmp_path)
    (batch,) = stream.batches(2, 1)
    (expected,) = expect_rows(stream, acts_ntd, 2, 1, seed=1)
    np.testing.assert_allclose(
        np.asarray(batch, np.float32), expected, rtol=0.02, atol=0.05
    )


@pytest.mark.parametrize("window_chunks", [1, 3, 100])
def test_a_step_is_the_same_bits_from_any_start(text_file, tmp_path, window_chunks):
    data = dataclasses.replace(
        make_config(text_file).data, window_chunks=window_chunks
    )
    stream = open_stream(text_file, tmp_path, (2, 2), data=data)
    whole = [np.asarray(batch) for batch in stream.batches(0, 20)]
    for start in (1, 7, 13, 19):
        again = open_stream(text_file, tmp_path, (2, 2), data=data)
        for batch, expected in zip(
            again.batches(start, 20 - start), whole[start:], strict=True
        ):
            assert np.asarray(batch).tobytes() == expected.tobytes()


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(text_file, tmp_path):
    config = make_config(text_file)
    whole = train(config, tmp_path / "whole")
    writer = synthetic.KillAt(step=5)
    with pytest.raises(synthetic.Killed):
        train(config, tmp_path / "stopped", writer)
    resumed = train(config, tmp_path / "stopped")
    for ours, expected in zip(
        jax.tree.leaves(jax.device_get(resumed)),
        jax.tree.leaves(jax.device_get(whole)),
        strict=True,
    ):
        assert np.asarray(ours).tobytes() == np.asarray(expected).tobytes()


def test_the_window_is_bounded_and_told(text_file, tmp_path, monkeypatch):
    data = dataclasses.replace(make_config(text_file).data, window_chunks=None)
    stream = open_stream(text_file, tmp_path, data=data)
    assert stream.data.window_chunks > 1
    assert "of a uniform draw" in stream.describe() and "GB" in stream.describe()
    monkeypatch.setattr("sae_jax.stream._MOST_ROWS", 2 * T * LANES)
    assert open_stream(text_file, tmp_path, data=data).data.window_chunks == 2


def test_statistics_and_samples_are_of_train_rows(text_file, tmp_path):
    settings = dataclasses.replace(make_config(text_file).stream, batch_contexts=12)
    stream = open_stream(text_file, tmp_path, stream=settings)
    acts_ntd, _ = read_rows(tmp_path)
    assert len(acts_ntd) % 12  # the last batch is filled up, with contexts that are not
    rows_nd = acts_ntd.reshape(-1, 256).astype(np.float64)
    found = stream.statistics()
    assert found.rows == len(rows_nd)  # they are few, so that all are sampled
    np.testing.assert_allclose(found.mean_d, rows_nd.mean(0), atol=1e-3)
    norms = np.linalg.norm(rows_nd, axis=1)
    assert found.mean_norm == pytest.approx(norms.mean(), rel=1e-3)
    (tmp_path / "text/statistics" / f"{SITE}.npz").unlink()
    again = open_stream(text_file, tmp_path, stream=settings).statistics()
    assert again.mean_d.tobytes() == found.mean_d.tobytes()
    sample = stream.sample(100, seed=3)
    assert sample.shape == (100, 256) and sample.dtype == np.float32
    known = {row.tobytes() for row in acts_ntd.reshape(-1, 256).astype(np.float32)}
    assert sum(row.tobytes() in known for row in sample) > 50  # but for rounding


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
def test_contexts_at_a_time_are_those_of_all_devices(
    text_file, tmp_path, monkeypatch, shape
):
    settings = dataclasses.replace(make_config(text_file).stream, batch_contexts=11)
    stream = open_stream(text_file, tmp_path, shape, stream=settings)
    sizes, capture = [], stream._capture
    monkeypatch.setattr(
        stream, "_capture", lambda n: sizes.append(len(n)) or capture(n)
    )
    next(stream.batches(0, 1))
    stream.sample(10, seed=0)
    assert len(sizes) > 2 and set(sizes) == {8}  # two of each lane


def test_statistics_are_of_this_site_and_the_rows_that_are_read(text_file, tmp_path):
    settings = dataclasses.replace(
        make_config(text_file).stream, bos="context", exclude_special=True
    )
    first = open_stream(text_file, tmp_path, stream=settings).statistics()
    assert np.isnan(first.norm_t[0]) and not np.isnan(first.norm_t[1:]).any()
    site = dataclasses.replace(make_config(text_file).data, site="resid_post.2")
    other = open_stream(text_file, tmp_path, stream=settings, data=site)
    assert not np.array_equal(other.statistics().mean_d, first.mean_d)


def test_activations_that_are_not_numbers_are_refused(
    text_file, tmp_path, monkeypatch
):
    stream = open_stream(text_file, tmp_path)
    monkeypatch.setattr(
        stream, "_capture", lambda n: jnp.full((len(n), T, 256), jnp.nan, jnp.bfloat16)
    )
    with pytest.raises(ValueError, match="infinite or not a number"):
        stream.statistics()
    assert not list(tmp_path.glob("text/statistics/*"))


def test_the_identity_is_of_what_is_read(text_file, tmp_path):
    first = open_stream(text_file, tmp_path / "a")
    assert open_stream(text_file, tmp_path / "b").identity == first.identity
    site = dataclasses.replace(make_config(text_file).data, site="resid_post.2")
    shorter = dataclasses.replace(make_config(text_file).stream, context_length=8)
    changes = {"c": {"data": site}, "d": {"stream": shorter}, "e": {"seed": 1}}
    for name, fields in changes.items():
        other = open_stream(text_file, tmp_path / name, **fields)
        assert other.identity != first.identity
    again = open_stream(text_file, tmp_path / "b")
    for field, is_same in {"name": True, "dtype": False, "identity": False}.items():
        again._manifest.subject[field] = "other"
        assert (again.identity == first.identity) == is_same


REFUSED = {
    "site": ({"data": DataConfig(batch_rows=24)}, (1, 1), "data.site is not set"),
    "layer": (
        {"data": DataConfig(site="resid_post.9", batch_rows=24)},
        (1, 1),
        "no site 'resid_post.9'",
    ),
    "lanes": ({}, (8, 1), "data.lanes = 4 is not a multiple of mesh.data = 8"),
    "text": (
        {"stream": StreamConfig(subject="default", text="nowhere")},
        (1, 1),
        "stream.text names 'nowhere', and there is no such file",
    ),
    "context": (
        {"stream": StreamConfig(subject="default", context_length=10**6)},
        (1, 1),
        "context_length = 1000000 is more than the subject's",
    ),
}


@pytest.mark.parametrize("fields, shape, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_streamed_is_refused(
    text_file, tmp_path, fields, shape, message
):
    mesh = make_mesh(MeshConfig(*shape))
    with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
        Stream(make_config(text_file, **fields), mesh, tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_text_with_fewer_contexts_than_lanes_is_refused(text_file, tmp_path):
    data = DataConfig(site=SITE, batch_rows=2000, lanes=1000)
    told = "the text gives .* train contexts for data.lanes = 1000: lower data.lanes"
    with pytest.raises(ValueError, match=told) as error:
        open_stream(text_file, tmp_path, data=data, rows=20_000)
    assert "\n" not in str(error.value)


BAD_RUNS = {
    "n_latents": ({"n_latents": 510}, "sae.n_latents = 510 is not a multiple"),
    "d_model": ({"d_model": 12}, "sae.d_model = 12, but resid_post.1 of subject"),
}


@pytest.mark.parametrize("sae, message", BAD_RUNS.values(), ids=BAD_RUNS)
def test_a_bad_run_is_refused_before_text_is_packed(text_file, tmp_path, sae, message):
    settings = dict(n_latents=512, k=4, k_aux=8) | sae
    config = make_config(text_file, sae=SaeConfig(**settings))
    mesh = make_mesh(MeshConfig(1, 4))
    with pytest.raises(ValueError, match=message):
        validate(config, mesh, Stream(config, mesh, tmp_path))
    assert not (tmp_path / "text").exists()
    good = make_config(text_file)
    validate(good, mesh, Stream(good, mesh, tmp_path))
    assert (tmp_path / "text").is_dir()


def test_another_text_in_the_same_folder_is_refused(text_file, tmp_path):
    open_stream(text_file, tmp_path / "run")
    (tmp_path / "other.txt").write_text("x = 1\n" * 500)
    stream = StreamConfig(subject="default", text=str(tmp_path / "other.txt"))
    with pytest.raises(ValueError, match="was begun with another text"):
        open_stream(text_file, tmp_path / "run", stream=stream)


def test_settings_that_mean_nothing():
    with pytest.raises(ValueError, match="give one of them"):
        TrainConfig(data=DataConfig(store="a"), stream=StreamConfig(subject="default"))
    with pytest.raises(ValueError, match=r"\(1.0, 2.0\) .* one source; leave them out"):
        TrainConfig(
            data=DataConfig(weights=(1, 2)), stream=StreamConfig(subject="default")
        )
    with pytest.raises(ValueError, match="set stream.bos to 'context'"):
        StreamConfig(subject="default", exclude_special=True)
