"""A window of rows on the devices, [lanes, rows, D] bfloat16.

Lanes are spread over the mesh's data axis, and D over its latent axis where that
divides it, so each device holds a part of its own. A batch is gathered on each device
from its own lanes; then the parts of D come together, B D numbers a step.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sae_jax.mesh import DATA, LATENT, batch_sharding, put


class Buffer:
    """Room for a window of so many contexts of each lane."""

    def __init__(
        self,
        mesh: Mesh,
        n_lanes: int,
        n_contexts: int,
        at_once: int,
        context_rows: int,
        width: int,
    ):
        latent = None if width % mesh.shape[LATENT] else LATENT
        self._mesh, self._spec = mesh, PartitionSpec(DATA, None, latent)
        self._at_once, self._context_rows = at_once, context_rows
        # Contexts are written `at_once`, the last time also some that fill up.
        n_rows = -(-n_contexts // at_once) * at_once * context_rows
        self._rows_vnd = jax.jit(
            functools.partial(jnp.zeros, (n_lanes, n_rows, width), jnp.bfloat16),
            out_shardings=NamedSharding(mesh, self._spec),
        )()

    def write(self, acts_btd: jax.Array, first: int, skip: int) -> None:
        """Puts the activations of contexts, lane by lane, from the `first` context of
        the lanes on; without the `skip` first positions."""
        self._rows_vnd = _write(
            self._rows_vnd,
            acts_btd,
            first * self._context_rows,
            skip,
            self._mesh,
            self._spec,
        )
        # A CPU mesh with many steps in flight may stop for ever.
        jax.block_until_ready(self._rows_vnd)

    def take(
        self,
        places_vn: np.ndarray,
        n_before: int,
        lane_rows: int,
        batch: jax.Array | None,
    ) -> jax.Array:
        """The batch [lanes lane_rows, D] whose rows from the `n_before`-th of each lane
        on are those at these places, and the others those of `batch`."""
        n = places_vn.shape[1]
        padded = np.zeros((len(places_vn), lane_rows), np.int32)
        padded[:, n_before : n_before + n] = places_vn
        spread = NamedSharding(self._mesh, PartitionSpec(DATA, None))
        taken = _take(
            self._rows_vnd, put(padded, spread), self._mesh, self._spec
        )
        if batch is None:
            return taken
        return _merge(batch, taken, n_before, lane_rows)


@functools.partial(
    jax.jit, static_argnames=("skip", "mesh", "spec"), donate_argnums=0
)
def _write(
    rows_vnd: jax.Array,
    acts_btd: jax.Array,
    start: int,
    skip: int,
    mesh: Mesh,
    spec: PartitionSpec,
) -> jax.Array:
    def write(rows_vnd: jax.Array, acts_btd: jax.Array, start: jax.Array) -> jax.Array:
        n_lanes, _, width = rows_vnd.shape
        acts_vnd = acts_btd[:, skip:].reshape(n_lanes, -1, width)
        return jax.lax.dynamic_update_slice_in_dim(rows_vnd, acts_vnd, start, axis=1)

    return jax.shard_map(
        write, mesh=mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=spec
    )(rows_vnd, acts_btd, jnp.asarray(start))


@functools.partial(jax.jit, static_argnames=("mesh", "spec"))
def _take(
    rows_vnd: jax.Array, places_vn: jax.Array, mesh: Mesh, spec: PartitionSpec
) -> jax.Array:
    def take(rows_vnd: jax.Array, places_vn: jax.Array) -> jax.Array:
        taken_vnd = jnp.take_along_axis(rows_vnd, places_vn[..., None], axis=1)
        return taken_vnd.reshape(-1, rows_vnd.shape[2])

    taken_bd = jax.shard_map(
        take,
        mesh=mesh,
        in_specs=(spec, PartitionSpec(DATA, None)),
        out_specs=PartitionSpec(DATA, spec[2]),
    )(rows_vnd, places_vn)
    return jax.lax.with_sharding_constraint(taken_bd, batch_sharding(mesh))


@functools.partial(jax.jit, static_argnames="lane_rows")
def _merge(
    before_bd: jax.Array, after_bd: jax.Array, n_before: int, lane_rows: int
) -> jax.Array:
    is_before_b = jnp.arange(len(before_bd)) % lane_rows < n_before
    return jnp.where(is_before_b[:, None], before_bd, after_bd)
