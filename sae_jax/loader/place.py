"""Which lanes a process loads, and how its rows become a global array on the mesh."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sae_jax.loader.windows import Rows
from sae_jax.mesh import DATA, batch_sharding


def find_lanes(mesh: Mesh, batch_rows: int, n_lanes: int) -> list[int]:
    """The lanes whose rows this process's devices hold.

    A batch has the rows of lane after lane, and the mesh's places along `data` hold
    its parts in their order. Processes that share rows, as when the latent axis
    crosses them, load the same.
    """
    groups = _group_places(mesh, batch_rows)
    (ours,) = (places for ours, places in groups.items() if jax.process_index() in ours)
    n_data = mesh.shape[DATA]
    # A place holds the lanes, or parts of lanes, that meet its n_lanes / n_data.
    held_by = [
        range(v * n_data // n_lanes, -(-(v + 1) * n_data // n_lanes))
        for v in range(n_lanes)
    ]
    lanes = [v for v, places in enumerate(held_by) if ours.issuperset(places)]
    if len(lanes) * n_data != n_lanes * len(ours):
        raise ValueError(
            f"data.lanes = {n_lanes} do not fall to processes as a whole: give a "
            f"multiple of mesh.data = {n_data}, or choose another mesh"
        )
    return lanes


def n_loading_processes(mesh: Mesh, batch_rows: int) -> int:
    """How many groups of processes load different rows of each batch."""
    return len(_group_places(mesh, batch_rows))


def place(rows: Rows, batch_rows: int, mesh: Mesh) -> jax.Array:
    """The batch [B, D] bfloat16 of which this process has these rows."""
    rows_bd = rows.rows_vnd.reshape(-1, rows.rows_vnd.shape[-1])
    sharding, shape = batch_sharding(mesh), (batch_rows, rows_bd.shape[1])
    make = jax.make_array_from_process_local_data
    if rows.scales_vn is None:
        return make(sharding, rows_bd.view(ml_dtypes.bfloat16), shape)
    scales_b = make(
        NamedSharding(mesh, PartitionSpec(DATA)),
        rows.scales_vn.reshape(-1),
        (batch_rows,),
    )
    return _dequantize(make(sharding, rows_bd, shape), scales_b, sharding)


@functools.partial(jax.jit, static_argnums=2)
def _dequantize(
    rows_bd: jax.Array, scales_b: jax.Array, sharding: NamedSharding
) -> jax.Array:
    acts_bd = rows_bd.astype(jnp.float32) * scales_b[:, None]
    return jax.lax.with_sharding_constraint(acts_bd.astype(jnp.bfloat16), sharding)


def _group_places(mesh: Mesh, batch_rows: int) -> dict[frozenset[int], set[int]]:
    """Places along the data axis by the processes that hold just these."""
    n_data = mesh.shape[DATA]
    if batch_rows % n_data:
        raise ValueError(
            f"data.batch_rows = {batch_rows} does not divide by mesh.data = {n_data}: "
            "give a multiple"
        )
    held: dict[int, set[int]] = {}
    for (position, _), device in np.ndenumerate(mesh.devices):
        held.setdefault(device.process_index, set()).add(position)
    groups: dict[frozenset[int], set[int]] = {}
    for places in held.values():
        processes = frozenset(p for p, others in held.items() if others == places)
        groups[processes] = places
    sizes = {len(places) for places in groups.values()}
    if len(sizes) > 1 or len(groups) * min(sizes) != n_data:
        raise ValueError(
            f"mesh.data = {n_data} divides over {len(held)} processes unevenly: let "
            "one be a multiple of the other"
        )
    return groups
