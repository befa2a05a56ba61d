"""Names of topologies, and which are sold."""

import pytest

from sae_jax.plan import chips, parse, topology


@pytest.mark.parametrize(
    ("name", "chip", "n_chips", "n_devices", "n_hosts", "shape"),
    [
        ("tpu:v5p-128", "v5p", 64, 64, 16, (4, 4, 4)),
        ("tpu:v5p:4x4x4", "v5p", 64, 64, 16, (4, 4, 4)),
        ("tpu:v4-8", "v4", 4, 4, 1, (2, 2, 1)),
        ("tpu:v5litepod-16", "v5e", 16, 16, 4, (4, 4)),
        ("tpu:v5e-16", "v5e", 16, 16, 4, (4, 4)),
        ("tpu:V6E-256", "v6e", 256, 256, 64, (16, 16)),
        ("tpu:tpu7x-128", "tpu7x", 64, 128, 16, (4, 4, 4)),
        ("tpu:v5p:4x4x12", "v5p", 192, 192, 48, (4, 4, 12)),
        ("gpu:8xh200", "h200", 8, 8, 1, ()),
        ("gpu:4x8xh100", "h100", 32, 32, 4, ()),
        ("gpu:1xa100", "a100", 1, 1, 1, ()),
        ("cpu:8", "cpu", 8, 8, 1, ()),
    ],
)
def test_names_are_the_clouds(name, chip, n_chips, n_devices, n_hosts, shape):
    found = parse(name)
    assert (found.name, found.chip.name, found.shape) == (name, chip, shape)
    assert (found.n_chips, found.n_devices, found.n_hosts) == (
        n_chips,
        n_devices,
        n_hosts,
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu:v5p-100", "did you mean 'tpu:v5p-128'.*counts cores, 2 a chip"),
        ("tpu:v6e-20", "did you mean 'tpu:v6e-16'.*counts chips"),
        ("tpu:v5q-128", "no TPU 'v5q': did you mean 'v5p'"),
        ("tpu:v5p:4x4", "torus of 3 axes, as tpu:v5p:4x4x4"),
        ("tpu:v5p:4x0x4", "torus of 3 axes"),
        ("tpu:v5p", "give tpu:v5p-128 or tpu:v5p:4x4x4"),
        ("gpu:8xh20", "no chip 'h20': did you mean 'h200'"),
        ("gpu:8xv5p", "v5p is no GPU"),
        ("gpu:h200", "give gpu:8xh200"),
        ("cpu:0", "no topology 'cpu:0'"),
        ("v5p-128", "give tpu:v5p-128, .*cpu:8"),
    ],
)
def test_a_name_that_is_none_is_told_with_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        parse(name)


@pytest.mark.parametrize("name", ["tpu:v5e-4", "tpu:v5p-8", "gpu:8xb200"])
def test_what_is_sold_grows_and_parses(name):
    sold = topology.larger(parse(name))
    sizes = [one.n_chips for one in sold]
    assert sizes == sorted(set(sizes))
    for one in sold:
        again = parse(one.name)
        assert (again.n_chips, again.shape) == (one.n_chips, one.shape)


@pytest.mark.parametrize(
    ("platform", "kind", "name"),
    [
        ("tpu", "TPU v5 lite", "v5e"),
        ("tpu", "TPU v5", "v5p"),
        ("tpu", "TPU v5p", "v5p"),
        ("tpu", "TPU v6 lite", "v6e"),
        ("tpu", "TPU7x", "tpu7x"),
        ("tpu", "TPU v9", "v5e"),
        ("gpu", "NVIDIA H200", "h200"),
        ("gpu", "NVIDIA H100 80GB HBM3", "h100"),
        ("gpu", "NVIDIA GeForce", "a100"),
        ("cpu", "cpu", "cpu"),
    ],
)
def test_devices_are_known_by_their_kind(platform, kind, name):
    assert chips.chip_of(platform, kind, 8).name == name
