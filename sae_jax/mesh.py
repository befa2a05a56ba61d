"""The device mesh: two axes, `data` (rows of a batch) and `latent` (rows of W).

Everything that says where an array lives is said with these two names, here and in
the specs beside each parameter. Axes are `Auto`: outside `jax.shard_map` the compiler
places what has no spec.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sae_jax.config import MeshConfig

DATA = "data"
LATENT = "latent"


def make_mesh(config: MeshConfig | None = None, n_latents: int | None = None) -> Mesh:
    """A (data, latent) mesh over the devices.

    Where the config leaves `data` open, it is 1; of a run, `sae_jax.plan` chooses it
    first. Where it leaves `latent` open, it is all devices that `data` leaves; or, if
    `n_latents` is given, as many of them as divide it.

    Raises:
        ValueError: the devices do not divide as the config says, or a process of
            several has none of those taken.
    """
    config = config or MeshConfig()
    n_devices, n_data = len(jax.devices()), config.data or 1
    n_latent = config.latent
    if n_latent is None:
        n_latent = max(1, n_devices // n_data)
        while n_latents is not None and n_latents % n_latent:
            n_latent -= 1
    if n_data * n_latent > n_devices:
        raise ValueError(
            f"a mesh of mesh.data = {n_data} by mesh.latent = {n_latent} needs "
            f"{n_data * n_latent} devices, there are {n_devices}: lower one of them"
        )
    if n_devices % n_data:
        raise ValueError(
            f"mesh.data = {n_data} does not divide {n_devices} devices: give a divisor"
        )
    taken = jax.devices()[: n_data * n_latent]
    n_idle = jax.process_count() - len({device.process_index for device in taken})
    if n_idle:
        raise ValueError(
            f"a mesh of mesh.data = {n_data} by mesh.latent = {n_latent} leaves "
            f"{n_idle} of {jax.process_count()} processes without a device: let it "
            f"take all {n_devices} devices, or start fewer processes"
        )
    return mesh_of((n_data, n_latent), taken)


def make_local_mesh(n_latent: int = 1) -> Mesh:
    """A mesh over this process's own devices; ValueError if they do not divide so."""
    devices = jax.local_devices()
    if n_latent < 1 or len(devices) % n_latent:
        raise ValueError(
            f"{len(devices)} device(s) do not divide by {n_latent}: give a divisor"
        )
    return mesh_of((len(devices) // n_latent, n_latent), devices)


def single_device_mesh() -> Mesh:
    """A (1, 1) mesh on the first local device."""
    return mesh_of((1, 1), jax.local_devices()[:1])


def mesh_of(shape: tuple[int, int], devices: Sequence[jax.Device]) -> Mesh:
    """A (data, latent) mesh of this shape over these devices, which may be described.

    On a TPU an axis may take a part of an axis of its torus.
    """
    names, types = (DATA, LATENT), (AxisType.Auto,) * 2
    if devices[0].platform != "tpu":
        return jax.make_mesh(shape, names, axis_types=types, devices=devices)
    placed = mesh_utils.create_device_mesh(
        shape, devices, allow_split_physical_axes=True
    )
    return Mesh(placed, names, axis_types=types)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data axis, every latent shard holding all columns."""
    return NamedSharding(mesh, PartitionSpec(DATA, None))


def param_spec(name: str) -> PartitionSpec:
    """Where the parameter of this name lives: `_ld` and `_l` over latents."""
    by_axes = {"ld": PartitionSpec(LATENT, None), "l": PartitionSpec(LATENT)}
    by_axes["d"] = PartitionSpec(None)
    return by_axes.get(name.rpartition("_")[2], PartitionSpec())


def optimizer_spec(name: str) -> PartitionSpec:
    """The same over both axes, for what only an update of the parameters reads."""
    spec = param_spec(name)
    return PartitionSpec((LATENT, DATA), *spec[1:]) if LATENT in spec else spec


def is_spread(name: str) -> bool:
    """Whether the parameter of this name is partitioned over latents."""
    return LATENT in param_spec(name)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put(values: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """What every process has whole, each keeping what its devices hold."""
    return jax.make_array_from_callback(values.shape, sharding, lambda i: values[i])


def fetch(array: jax.Array) -> np.ndarray:
    """The whole array, in every process; to be called in all of them."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
