"""Checksums of arrays, against NumPy, on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from sae_jax import checksum
from sae_jax.mesh import optimizer_spec, param_spec

ROWS, COLUMNS = 24, 5


def sum_by_numpy(values):
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    bits = bits.reshape(len(values) if values.ndim else 1, -1)
    rows, columns = np.indices(bits.shape, np.uint64)
    bits = (bits + rows * 0x9E3779B1 + columns * 0x85EBCA77) % 2**32
    bits = (bits ^ (bits >> np.uint64(16))) * 0x85EBCA6B % 2**32
    bits = (bits ^ (bits >> np.uint64(13))) * 0xC2B2AE35 % 2**32
    return int((bits ^ (bits >> np.uint64(16))).sum() % 2**32)


def compute(values, sharding):
    summed = jax.jit(lambda array: checksum.sum_bits(array, sharding))
    total = summed(jax.device_put(values, sharding))
    assert total.dtype == jnp.uint32 and total.is_fully_replicated
    return int(total)


@pytest.mark.parametrize("name", ["w_ld", "steps_l", "b_d", "count"])
@pytest.mark.parametrize("spec", [param_spec, optimizer_spec])
def test_a_checksum_is_that_of_numpy(name, spec, mesh, monkeypatch):
    monkeypatch.setattr(checksum, "_CHUNK_SIZE", 10)
    shapes = {"ld": (ROWS, COLUMNS), "l": (ROWS,), "d": (COLUMNS,)}
    shape = shapes.get(name.partition("_")[2], ())
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for array in (np.asarray(values), values.view(np.int32)):
        assert compute(array, NamedSharding(mesh, spec(name))) == sum_by_numpy(array)


def test_any_change_of_bits_or_places_shows(mesh):
    sharding = NamedSharding(mesh, param_spec("w_ld"))
    values = np.random.default_rng(0).normal(size=(ROWS, COLUMNS)).astype(np.float32)
    values[5] = values[4]
    changed = [values[::-1].copy(), values[:, ::-1].copy(), np.zeros_like(values)]
    for place in ((0, 0), (7, 3), (23, 4)):
        for bit in (0, 15, 31):
            changed.append(values.copy())
            changed[-1].view(np.uint32)[place] ^= np.uint32(1 << bit)
    found = [compute(array, sharding) for array in (values, *changed)]
    assert len(set(found)) == len(found)


def test_no_copy_of_an_array_is_made(mesh):
    sharding = NamedSharding(mesh, param_spec("w_ld"))
    array = jax.ShapeDtypeStruct((2**17, 64), jnp.float32, sharding=sharding)
    summed = jax.jit(lambda array: checksum.sum_bits(array, sharding)).lower(array)
    temporary = summed.compile().memory_analysis().temp_size_in_bytes
    assert temporary < 2**17 * 64 * 4 / 10
