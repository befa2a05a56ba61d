"""The state of a training run, built in place on the mesh.

`Setup` is what stays fixed (config, normalisation, mesh, store); `TrainState` is what a
step turns into its successor. Both a new state and the shapes for restoring one come
from the same function, so they cannot drift apart.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax import firing, losses, normalize, optim
from sae_jax import mesh as meshes
from sae_jax.config import CHOOSE_K, TrainConfig, shards_optimizer
from sae_jax.firing import Counters
from sae_jax.geometric_median import geometric_median
from sae_jax.normalize import Normalization
from sae_jax.optim import Params
from sae_jax.saes import ARCHITECTURES, Sae


_RANDOM_VECTORS = 256


class TrainState(NamedTuple):
    """Everything a step reads and writes."""

    params: Params
    ema: Params
    optimizer: optax.ScaleByAdamState
    counters: Counters


@dataclasses.dataclass(frozen=True)
class Setup:
    """What stays fixed over a run; `config` has every derived field of `sae` set."""

    config: TrainConfig
    normalization: Normalization
    mesh: Mesh
    site: str
    store_identity: str  # a hash of the store's manifest
    graph: Any = dataclasses.field(init=False, repr=False)  # the SAE less its params

    def __post_init__(self) -> None:
        graph, _ = nnx.split(_abstract_sae(self))
        object.__setattr__(self, "graph", graph)

    @property
    def unit_norm(self) -> tuple[str, ...]:
        return ARCHITECTURES[self.config.sae.architecture].unit_norm(self.config.sae)

    @property
    def shards_optimizer(self) -> bool:
        """Whether moments and average are spread over both axes of the mesh."""
        shape = self.mesh.shape
        return shards_optimizer(self.config, shape[meshes.DATA], shape[meshes.LATENT])

    def with_k(self, k: int) -> "Setup":
        """The same run choosing K latents, for one stage of annealing."""
        if k == self.config.sae.k:
            return self
        sae = dataclasses.replace(self.config.sae, k=k)
        config = dataclasses.replace(
            self.config, sae=sae, k_start=None, k_anneal_rows=0
        )
        return dataclasses.replace(self, config=config)

    def sae(self, params: Params) -> Sae:
        """The SAE with these parameters; also inside `jax.jit`."""
        return nnx.merge(self.graph, nnx.State(params))


def create(setup: Setup, sample_bd: jax.Array | np.ndarray) -> TrainState:
    """A new state, each array born on its own devices.

    Args:
        setup: the run.
        sample_bd: rows [B, D] in activation space; they give the decoder bias its
            start (the geometric median) and the loss its scale.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract(setup))
    with jax.set_mesh(setup.mesh):
        make = functools.partial(_create, setup)
        return jax.jit(make, out_shardings=shardings)(sample_bd)


def abstract(setup: Setup) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    d_model = setup.config.sae.d_model
    sample_bd = jax.ShapeDtypeStruct((2, d_model), jnp.float32)
    with jax.set_mesh(setup.mesh):
        shapes = jax.eval_shape(functools.partial(_create, setup), sample_bd)
    module = _abstract_sae(setup)
    named = nnx.get_named_sharding(nnx.state(module, nnx.Param), setup.mesh)
    by_name: dict[str, NamedSharding] = nnx.to_pure_dict(named)
    beside = by_name
    if setup.shards_optimizer:
        beside = {
            name: NamedSharding(setup.mesh, meshes.optimizer_spec(name))
            for name in by_name
        }
    replicated = NamedSharding(setup.mesh, P())
    latents = NamedSharding(setup.mesh, P(meshes.LATENT))
    return TrainState(
        params=_placed(shapes.params, by_name),
        ema=_placed(shapes.ema, beside),
        optimizer=optax.ScaleByAdamState(
            count=_with(shapes.optimizer.count, replicated),
            mu=_placed(shapes.optimizer.mu, beside),
            nu=_placed(shapes.optimizer.nu, beside),
        ),
        counters=Counters(
            steps_since_l=_with(shapes.counters.steps_since_l, latents),
            dead_after_steps=_with(shapes.counters.dead_after_steps, replicated),
            loss_scale=_with(shapes.counters.loss_scale, replicated),
            steps=_with(shapes.counters.steps, replicated),
            sparsity_warmup_steps=_with(
                shapes.counters.sparsity_warmup_steps, replicated
            ),
        ),
    )


def _create(setup: Setup, sample_bd: jax.Array) -> TrainState:
    # The key is made here, where nothing runs yet: the devices of the mesh may be other
    # processes' as well, or only described, for compiling ahead of time.
    key = _key(setup)
    normed_bd, _, _ = normalize.apply(setup.normalization, sample_bd)
    sae = _new_sae(setup, key, geometric_median(normed_bd))
    if setup.config.sae.rescale_encoder:
        sae.w_enc_ld[...] /= _mean_length(sae, jax.random.fold_in(key, 1))
    params = nnx.to_pure_dict(nnx.state(sae, nnx.Param))
    return TrainState(
        params=params,
        ema=jax.tree.map(jnp.zeros_like, params),
        optimizer=optim.start(params),
        counters=Counters(
            steps_since_l=firing.start(setup.config.sae.n_latents),
            dead_after_steps=jnp.int32(setup.config.dead_after_steps),
            loss_scale=losses.loss_scale(normed_bd),
            steps=jnp.int32(0),
            sparsity_warmup_steps=jnp.int32(setup.config.sparsity_warmup_steps),
        ),
    )


def _abstract_sae(setup: Setup) -> Sae:
    b_dec_d = jnp.zeros((setup.config.sae.d_model,))
    with jax.set_mesh(setup.mesh):
        return nnx.eval_shape(lambda: _new_sae(setup, _key(setup), b_dec_d))


def _new_sae(setup: Setup, key: jax.Array, b_dec_d: jax.Array) -> Sae:
    sae_config = setup.config.sae
    return ARCHITECTURES[sae_config.architecture](
        sae_config, setup.normalization, setup.mesh, setup.site, key, b_dec_d
    )


def _mean_length(sae: Sae, key: jax.Array) -> jax.Array:
    """How long reconstructions of random unit vectors are, seen from b_dec.

    The encoder divided by it starts with reconstructions as long as their inputs
    (Gao et al. 2024, A.1, which finds that it does not help).
    """
    unit_bd = jax.random.normal(key, (_RANDOM_VECTORS, sae.d_model))
    b_dec_d = sae.b_dec_d[...]
    # As many latents as the first step has: BatchTopK knows no threshold yet.
    k = sae.config.k if sae.config.architecture in CHOOSE_K else sae.n_latents
    code = sae.encode_normed(b_dec_d + optim.normalise_rows(unit_bd), k)
    recon_bd = sae.decode_normed(*code[:2])
    return jnp.mean(jnp.linalg.norm(recon_bd - b_dec_d, axis=1))


def _key(setup: Setup) -> jax.Array:
    return jax.random.key(setup.config.seed)


def _placed(shapes: Params, shardings: dict[str, NamedSharding]) -> Params:
    return {name: _with(leaf, shardings[name]) for name, leaf in shapes.items()}


def _with(leaf: Any, sharding: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
