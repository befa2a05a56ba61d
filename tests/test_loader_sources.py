"""Several stores and sites in one stream of rows, and stores of int8."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from numbered_stores import row_ids, write_store

from sae_jax import loader
from sae_jax.config import DataConfig, MeshConfig
from sae_jax.loader.sources import _fit_lanes, _share_lanes
from sae_jax.loader.windows import Windows, buffer_bytes
from sae_jax.mesh import make_mesh, single_device_mesh
from sae_jax.store import open_store

SITES = {"resid_post.0": 4, "mlp_act.1": 6, "resid_post.2": 4}
SITE = "resid_post.0"
TRAIN = {"a": 12 * 16, "b": 20 * 16}  # rows


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return [
        write_store(folder / name, {"train": rows, "heldout": 16}, SITES)
        for name, rows in TRAIN.items()
    ]


def make_data(**settings):
    return DataConfig(**{"batch_rows": 32, "lanes": 8, "window_chunks": 2} | settings)


def load(sources, data, n_steps, start=0, mesh=None):
    mesh = mesh or single_device_mesh()
    batches = loader.train_batches(sources, data, mesh, 0, start, n_steps)
    return [np.asarray(batch) for batch in batches]


def test_each_source_fills_its_lanes_and_has_epochs_of_its_own(stores):
    data = make_data(site=SITE, weights=(0.25, 0.75))
    sources = loader.find_sources(data, stores)
    assert [source.lanes for source in sources] == [range(0, 2), range(2, 8)]
    lanes = np.stack(load(sources, data, 60)).reshape(60, 8, 4, 4)
    for source, n_rows in zip(sources, TRAIN.values(), strict=True):
        own = lanes[:, source.lanes].swapaxes(0, 1).reshape(len(source.lanes), -1, 4)
        alone = make_data(site=SITE, lanes=1, batch_rows=4)
        expected = {row.tobytes() for row in load(
            loader.find_sources(alone, [source.store]), alone, n_rows // 4
        ) for row in row}
        assert {row.tobytes() for lane in own for row in lane} <= expected
        if n_rows % len(source.lanes) == 0:
            first = row_ids(own[:, : n_rows // len(source.lanes)])
            assert sorted(first.ravel()) == [*range(n_rows)]


def test_sites_of_one_store_are_sources_too(stores):
    data = make_data(site="resid_post.0, resid_post.2")
    sources = loader.find_sources(data, stores[:1])
    assert [source.site for source in sources] == ["resid_post.0", "resid_post.2"]
    assert all(len(source.lanes) == 4 for source in sources)
    (batch,) = load(sources, data, 1)
    first, second = row_ids(batch).reshape(2, 16)
    assert not np.array_equal(first, second)  # each has an order of its own


def test_lanes_come_in_the_order_of_each_source(stores):
    data = make_data(site=SITE, weights=(3, 5))
    sources = loader.find_sources(data, stores)
    orders = loader.find_orders(sources, data, 0)
    expected = [
        order.step_rows(7, 4, lane) for order in orders for lane in range(order.n_lanes)
    ]
    (batch,) = load(sources, data, 1, start=7)
    np.testing.assert_array_equal(row_ids(batch), np.concatenate(expected))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_sources_are_the_same_for_any_number_of_processes(stores, n):
    data = make_data(site=SITE, weights=(3, 5))
    sources = loader.find_sources(data, stores)
    whole = load(sources, data, 9, start=11)
    parts = [
        loader.load_rows(sources, data, range(p * 8 // n, (p + 1) * 8 // n), 0, 11, 20)
        for p in range(n)
    ]
    for expected, *shares in zip(whole, *parts, strict=True):
        rows = np.concatenate([rows.rows_vnd for rows in shares])
        assert rows.tobytes() == expected.tobytes()


def test_statistics_are_weighted_by_lanes(stores):
    data = make_data(site=SITE, weights=(1, 3))
    mixed = loader.mix_statistics(loader.find_sources(data, stores))
    first, second = (store.statistics(SITE) for store in stores)
    np.testing.assert_allclose(mixed.mean_d, 0.25 * first.mean_d + 0.75 * second.mean_d)
    for name in ("mean_norm", "mean_square_norm"):
        expected = 0.25 * getattr(first, name) + 0.75 * getattr(second, name)
        assert getattr(mixed, name) == pytest.approx(expected)
    assert mixed.rows == sum(TRAIN.values())
    alone = loader.find_sources(make_data(site=SITE), stores[:1])
    assert loader.mix_statistics(alone).mean_norm == first.mean_norm


def test_samples_are_shared_out_as_lanes_are(stores):
    data = make_data(site=SITE, weights=(1, 3))
    sources = loader.find_sources(data, stores)
    rows = row_ids(loader.sample_sources(sources, 100, seed=0))
    assert len(rows) == 100 and len(set(rows[:25])) == 25 and len(set(rows[25:])) == 75


@pytest.mark.parametrize(
    "n_stores, settings, message",
    [
        (2, dict(site=SITE, weights=(1.0,)), r"\(1.0,\) are 1 for 2 sources"),
        (
            2,
            dict(site=SITE, weights=(0.3, 0.7), batch_rows=40),
            r"take 2.4, 5.6 of data.lanes = 8, not whole lanes: give data.lanes = 10 "
            r"with data.weights = \(3, 7\)$",
        ),
        (
            2,
            dict(site=SITE, weights=(0.3, 0.7)),  # none that divides 32 is near
            r"give data.lanes = 8 with data.weights = \(2, 6\)$",
        ),
        (
            2,
            dict(site=SITE, weights=(0.3, 0.7), batch_rows=512),
            r"give data.lanes = 64 with data.weights = \(19, 45\)$",
        ),
        (
            2,
            dict(site=SITE, weights=(0.3, 0.7), batch_rows=512, lanes=1),
            r"give data.lanes = 64 with data.weights = \(19, 45\)$",
        ),
        (2, dict(site=SITE, batch_rows=1, lanes=1), "raise data.batch_rows = 1$"),
        (1, dict(site=f"{SITE},{SITE}"), f"{SITE} of .* and {SITE} of .* are the same"),
        (2, dict(site="a.0,b.0,c.0"), "names 2 stores and data.site 3 sites"),
        (1, dict(site="resid_post.0,mlp_act.1"), "is 4 wide, mlp_act.1 of .* is 6"),
        (1, dict(site="resid_post.0,resid_post.9"), "no site 'resid_post.9'"),
        (2, {}, "more than one site"),
    ],
)
def test_sources_that_do_not_fit_are_refused(stores, n_stores, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        loader.find_sources(make_data(**settings), stores[:n_stores])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shares, n", [((0.001, 0.001, 0.998), 8), ((0.3, 0.7), 64)])
def test_weights_that_are_offered_fit(shares, n):
    counts = _fit_lanes(shares, n, limit=1.0)
    assert sum(counts) == n and min(counts) > 0
    data = make_data(weights=counts, lanes=n, batch_rows=n)
    assert _share_lanes(data, len(counts)) == counts


def test_no_source_is_without_a_lane():
    """Not where it would be missed by less than a share may be off, either."""
    for n_sources, n_lanes in ((2, 1), (3, 2), (101, 100)):
        with pytest.raises(ValueError, match="not whole lanes"):
            _share_lanes(make_data(lanes=n_lanes, batch_rows=n_lanes), n_sources)


def test_a_store_that_is_named_twice_is_refused(stores, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(stores[0].path)
    data = make_data(site=SITE)
    with pytest.raises(ValueError, match=f"of {stores[0].path} and .* of {link}") as e:
        loader.find_sources(data, [stores[0], open_store(link)])
    assert "are the same rows: name each store once" in str(e.value)
    both = make_data(site="resid_post.0, resid_post.2")
    sites = loader.find_sources(both, [stores[0], open_store(link)])
    assert len(sites) == 2  # another site of a store is another source


def test_thirds_need_not_be_exact(stores):
    data = make_data(site=SITE, lanes=3, batch_rows=33, weights=(0.333, 0.667))
    sources = loader.find_sources(data, stores)
    assert [len(source.lanes) for source in sources] == [1, 2]


def test_weights_are_checked():
    with pytest.raises(ValueError, match=r"data.weights = \(0.0, 1.0\): must be above"):
        make_data(weights=(0, 1))
    with pytest.raises(ValueError, match="weights = 'x' is not a tuple of numbers"):
        make_data(weights="x")


class Int8:
    """A store of int8: rows that tell their number, and a scale of each."""

    dtype = "int8"

    def __init__(self, store):
        self._store = store

    def __getattr__(self, name):
        return getattr(self._store, name)

    def read_stored(self, site, ranges, rows_into, scales_into=None):
        rows = np.concatenate([np.arange(start, start + n) for start, n in ranges])
        rows_into[:] = (rows[:, None] + np.arange(4)) % 256 - 128
        scales_into[:] = 0.37 + rows / 7


@pytest.mark.parametrize("n_data", [1, 4])
def test_int8_becomes_bfloat16_on_the_devices(stores, n_data):
    data = make_data(site=SITE)
    sources = loader.find_sources(data, [Int8(stores[0])])
    mesh = make_mesh(MeshConfig(data=n_data, latent=2))
    (order,) = loader.find_orders(sources, data, 0)
    for step, batch in enumerate(load(sources, data, 8, mesh=mesh)):
        rows = np.concatenate([order.step_rows(step, 4, lane) for lane in range(8)])
        values = (rows[:, None] + np.arange(4)) % 256 - 128
        scales = (0.37 + rows / 7).astype(np.float32)
        expected = values.astype(np.float32) * scales[:, None]
        assert batch.dtype == ml_dtypes.bfloat16
        assert batch.tobytes() == expected.astype(ml_dtypes.bfloat16).tobytes()


def test_stores_of_two_dtypes_are_refused(stores):
    data = make_data(site=SITE)
    with pytest.raises(ValueError, match="is bfloat16, .* is int8: harvest both"):
        loader.find_sources(data, [stores[0], Int8(stores[1])])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_bytes_of_buffers_are_counted(stores, dtype):
    store = Int8(stores[0]) if dtype == "int8" else stores[0]
    sources = loader.find_sources(make_data(site=SITE), [store])
    (order,) = loader.find_orders(sources, make_data(site=SITE), 0)
    windows, held = Windows(sources[0], order, range(3)), 0
    while not windows._free.empty():
        buffer = windows._free.get()
        scales = 0 if buffer.scales_n is None else buffer.scales_n.nbytes
        held += buffer.rows_nd.nbytes + scales
    assert held == buffer_bytes(sources[0], order, 3) > 0


def test_a_source_need_only_fill_its_own_share_of_a_batch(stores):
    data = make_data(site=SITE, batch_rows=256, weights=(1, 3))
    sources = loader.find_sources(data, stores)
    loader.check_loader(sources, data, 1)  # 192 rows of the first, for 64 of a batch
    even = make_data(site=SITE, batch_rows=512)
    with pytest.raises(ValueError, match="has 192 train rows .* the 256 of a batch"):
        loader.check_loader(loader.find_sources(even, stores), even, 1)


def test_the_identity_is_that_of_every_store_but_not_where_it_was_made(stores):
    def identify(*stores):
        data, mesh = make_data(site=SITE), single_device_mesh()
        return loader.StoreFeed(data, mesh, 0, stores).identity

    def change(**fields):
        store = Int8(stores[1])
        store.dtype = "bfloat16"
        store.manifest = dataclasses.replace(stores[1].manifest, **fields)
        return store

    found = identify(*stores)
    subject = stores[1].manifest.subject
    assert identify(stores[0], change(subject=subject | {"name": "moved"})) == found
    for fields in (
        {"subject": subject | {"identity": "1"}},
        {"seed": 1},
        {"corpus": "1"},
    ):
        assert identify(stores[0], change(**fields)) != found
    assert identify(*stores[::-1]) != found
