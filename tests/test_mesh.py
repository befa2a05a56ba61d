"""Meshes: shapes, and the error where devices do not fit."""

import jax
import pytest

from sae_jax import mesh as meshes
from sae_jax.config import MeshConfig


def test_default_is_all_devices_over_latents():
    assert dict(meshes.make_mesh().shape) == {"data": 1, "latent": 8}


def test_the_rest_of_the_devices_share_the_latents():
    assert dict(meshes.make_mesh(MeshConfig(data=2)).shape) == {"data": 2, "latent": 4}


def test_as_many_devices_share_the_latents_as_divide_them():
    assert dict(meshes.make_mesh(n_latents=36).shape) == {"data": 1, "latent": 6}


def test_a_mesh_may_leave_devices_out():
    assert meshes.make_mesh(MeshConfig(data=1, latent=2)).size == 2


@pytest.mark.parametrize(
    "shape, message",
    [
        ((3, None), "mesh.data = 3 does not divide 8 devices"),
        ((4, 4), "data = 4 by mesh.latent = 4 needs 16 devices, there are 8"),
        ((16, None), "data = 16 by mesh.latent = 1 needs 16 devices, there are 8"),
        ((1, 16), "data = 1 by mesh.latent = 16 needs 16 devices, there are 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        meshes.make_mesh(MeshConfig(*shape))


def test_a_process_without_a_device_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match="leaves 3 of 4 processes without a device"):
        meshes.make_mesh(MeshConfig(data=1, latent=4))
