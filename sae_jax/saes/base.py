"""What all architectures share: parameters, placement, `encode` and `decode`.

    h = (x - b_dec) W_enc^T         every architecture starts here,
    f = activate(h)                 this is its own, and so is its loss,
    x̂ = f W_dec + b_dec             and all end here.

x is the normalised row (`sae_jax.normalize`); W_enc and W_dec are [L, D], partitioned
over latents. A parameter's placement follows from its name: `_ld` and `_l` are
partitioned over latents, all else is on every device.
"""

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sae_jax import kernels, normalize, optim, sparse, topk
from sae_jax.config import SaeConfig, max_active, subtracts_b_dec
from sae_jax.firing import Counters
from sae_jax.kernels import Kernels
from sae_jax.matmul import matmul
from sae_jax.mesh import DATA, LATENT, param_spec
from sae_jax.normalize import Normalization
from sae_jax.saes.code import SparseCode

Batch = tuple[jax.Array, jax.Array]  # inputs [B, D] and targets [B, D]
Weights = dict[str, jax.Array]  # parameters by name; inside a shard, its own rows

ROWS = P(DATA, None)
LATENTS = P(LATENT)


class Sae(nnx.Module):
    """An SAE. A pytree: pass it to `jax.jit` as an argument.

    An architecture adds parameters in `__init__` and fills in `unit_norm`, `loss` and
    `choose`, or as a `DenseSae` `activate`; nothing else of this class is overridden.
    """

    def __init__(
        self,
        config: SaeConfig,
        normalization: Normalization,
        mesh: Mesh,
        site: str,
        key: jax.Array,
        b_dec_d: jax.Array,
    ):
        """Random unit decoder rows; encoder rows parallel to them.

        Call it under `jax.jit` with the mesh set, so that arrays are born sharded.
        """
        self.config = config
        self.normalization = normalization
        self.mesh = mesh
        self.site = site
        shape = (config.n_latents, self.d_model)
        w_ld = optim.normalise_rows(jax.random.normal(key, shape, b_dec_d.dtype))
        self.w_enc_ld = new_param("w_enc_ld", w_ld)
        # A copy: two parameters must not share a buffer that a step donates.
        self.w_dec_ld = new_param("w_dec_ld", jnp.copy(w_ld))
        self.b_dec_d = new_param("b_dec_d", b_dec_d)

    @staticmethod
    @abc.abstractmethod
    def unit_norm(config: SaeConfig) -> tuple[str, ...]:
        """Parameters whose rows are kept at unit norm."""

    @abc.abstractmethod
    def choose(
        self, normed_bd: jax.Array, weights: Weights, k: int
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """A shard's own K largest of each row, for codes of K latents.

        Returns:
            Values in falling order and the shard's columns, [B, at most K]; and how
            many latents are active [B, 1], or None where K are meant to be.
        """

    @abc.abstractmethod
    def loss(
        self, batch: Batch, counters: Counters
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The training loss, but AuxK, of one batch of rows in activation space.

        Returns:
            The loss, and {"metrics": scalars by name, "fired_l": bool [L],
            "assigned": parameters that the step sets without a gradient}; where there
            is AuxK (`sae_jax.gradients` adds it) also "residual_bd", what it explains.
        """

    @property
    def d_model(self) -> int:
        if self.config.d_model is None:
            raise ValueError("sae.d_model is not set: take it from the store's site")
        return self.config.d_model

    @property
    def n_latents(self) -> int:
        return self.config.n_latents

    @property
    def dtype(self) -> jnp.dtype:
        """Of the factors of matmuls."""
        if self.config.compute_dtype is not None:
            return jnp.dtype(self.config.compute_dtype)
        is_cpu = self.mesh.devices.flat[0].platform == "cpu"
        return self.w_enc_ld.dtype if is_cpu else jnp.dtype(jnp.bfloat16)

    @property
    def kernels(self) -> Kernels | None:
        """The platform's own, if they are asked for and it has any."""
        is_asked = self.config.kernels
        return kernels.find(self.mesh.devices.flat[0].platform) if is_asked else None

    @jax.jit
    def encode(self, acts: jax.Array) -> SparseCode:
        """The code of rows [..., D] in activation space."""
        rows_bd = _as_rows(acts, self.d_model)
        normed_bd, shift_b1, scale_b1 = self.normalize(rows_bd)
        values_bk, indices_bk, n_cut_b1 = self.encode_normed(normed_bd)
        batch = acts.shape[:-1]
        return SparseCode(
            values=values_bk.reshape(*batch, -1),
            indices=indices_bk.reshape(*batch, -1),
            shift=shift_b1.reshape(*batch, 1),
            scale=scale_b1.reshape(*batch, 1),
            n_cut=n_cut_b1.reshape(*batch, 1),
        )

    @jax.jit
    def decode(self, code: SparseCode) -> jax.Array:
        """Reconstructed rows [..., D] in activation space."""
        batch, k = code.values.shape[:-1], code.values.shape[-1]
        recon_bd = self.decode_normed(
            code.values.reshape(-1, k), code.indices.reshape(-1, k)
        )
        recon = recon_bd.reshape(*batch, self.d_model)
        return normalize.undo(recon, code.shift, code.scale)

    @jax.jit
    def encode_dense(self, acts: jax.Array) -> jax.Array:
        """The code of rows [..., D] as [..., L]; for few rows, it is large."""
        return self.encode(acts).to_dense(self.n_latents)

    def normalize(self, acts: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rows in the SAE's space, and the shift and scale [..., 1] that undo it."""
        return normalize.apply(self.normalization, acts.astype(self.w_enc_ld.dtype))

    def normalize_batch(self, batch: Batch) -> Batch:
        """Inputs and targets in the SAE's space, both normalised as the inputs are."""
        inputs_bd, targets_bd = batch
        normed_bd, shift_b1, scale_b1 = self.normalize(inputs_bd)
        targets_bd = (targets_bd.astype(normed_bd.dtype) - shift_b1) / scale_b1
        return normed_bd, targets_bd

    def encode_normed(
        self, normed_bd: jax.Array, k: int | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Values, global indices [B, K], and how many active latents were cut off."""
        k = k or max_active(self.config)

        def on_shard(normed_bd, weights):  # type: ignore[no-untyped-def]
            values_bk, columns_bk, n_active_b1 = self.choose(normed_bd, weights, k)
            n_own = weights["w_enc_ld"].shape[0]
            values_bk, indices_bk = topk.merge_codes(
                values_bk, columns_bk, k, n_own, LATENT
            )
            values_bk = nnx.relu(values_bk)
            if n_active_b1 is None:
                return values_bk, indices_bk, jnp.zeros_like(indices_bk[:, :1])
            n_kept_b1 = jnp.sum(values_bk > 0, axis=1, keepdims=True, dtype=jnp.int32)
            return values_bk, indices_bk, lax.psum(n_active_b1, LATENT) - n_kept_b1

        # The gathered result is the same on all latent shards, which the checker of
        # replication cannot see.
        return self._map_rows(on_shard, normed_bd, check_vma=False)

    def decode_normed(self, values_bk: jax.Array, indices_bk: jax.Array) -> jax.Array:
        """Rows [B, D] in the SAE's space, of a code with global indices."""

        def on_shard(values_bk, indices_bk, weights):  # type: ignore[no-untyped-def]
            w_dec_ld = weights["w_dec_ld"]
            n_own = w_dec_ld.shape[0]
            own_bk = indices_bk - lax.axis_index(LATENT) * n_own
            is_own_bk = (own_bk >= 0) & (own_bk < n_own)
            part_bd = sparse.decode(
                jnp.where(is_own_bk, values_bk, 0),
                jnp.where(is_own_bk, own_bk, 0),
                w_dec_ld,
                self.dtype,
                self.kernels,
            )
            return lax.psum(part_bd, LATENT) + weights["b_dec_d"]

        return self._map_rows(on_shard, values_bk, indices_bk)

    def weights(self) -> tuple[Weights, dict[str, P]]:
        """Parameters by name, as the maths reads them, and where each lives."""
        names = nnx.to_pure_dict(nnx.state(self, nnx.Param))
        weights = {name: getattr(self, name)[...] for name in names}
        if self.config.norm_weighted:
            weights = _weigh_by_norm(weights)
        return weights, {name: param_spec(name) for name in weights}

    def encoder(
        self, normed_bd: jax.Array, weights: Weights
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What h is made of: rows [B, D], W_enc, and the bias [L/S] that is b_dec's.

        h = rows W_enc^T + bias. The bias is 0, with the gradient that h owes to b_dec:
        -(sum_b g_bl) W_enc, one product of a vector, where differentiating x - b_dec
        would cost a matmul. All vary over the whole mesh.
        """
        w_enc_ld = weights["w_enc_ld"]
        bias_l = jnp.zeros_like(w_enc_ld[:, 0])
        if subtracts_b_dec(self.config):
            b_dec_d = weights["b_dec_d"]
            normed_bd = normed_bd - lax.stop_gradient(b_dec_d)
            bias_l = _owe(lax.pcast(b_dec_d, LATENT, to="varying"), w_enc_ld)
        return lax.pcast(normed_bd, LATENT, to="varying"), w_enc_ld, bias_l

    def project(self, normed_bd: jax.Array, weights: Weights) -> jax.Array:
        """A shard's h [B, L/S], less the bias that an architecture adds to it."""
        rows_bd, w_enc_ld, bias_l = self.encoder(normed_bd, weights)
        return matmul(rows_bd, w_enc_ld.T, self.dtype) + bias_l

    def decode_part(self, code_bl: jax.Array, weights: Weights) -> jax.Array:
        """What a shard's, or a tile's, dense code adds to x̂: [B, D], without b_dec."""
        return matmul(code_bl, weights["w_dec_ld"], self.dtype)

    def on_shards(
        self,
        on_shard: Callable[..., Any],
        in_specs: tuple[P, ...],
        out_specs: Any,
        check_vma: bool = True,
    ) -> Callable[..., Any]:
        """on_shard(*arrays, weights) by `jax.shard_map`, a function of the arrays.

        Weights vary over the data axis, so that their gradients are summed over it. Of
        one data shard that sum would only copy them: there an axis of one takes its
        place.
        """
        weights, specs = self.weights()
        is_one = self.mesh.shape[DATA] == 1
        if is_one:
            weights = {name: value[None] for name, value in weights.items()}
            specs = {name: P(DATA, *spec) for name, spec in specs.items()}

        def with_weights(*args: Any) -> Any:
            *arrays, weights = args
            own = {
                name: value[0] if is_one else lax.pcast(value, DATA, to="varying")
                for name, value in weights.items()
            }
            return on_shard(*arrays, own)

        mapped = jax.shard_map(
            with_weights,
            mesh=self.mesh,
            in_specs=(*in_specs, specs),
            out_specs=out_specs,
            check_vma=check_vma,
        )
        return lambda *arrays: mapped(*arrays, weights)

    def _map_rows(
        self, on_shard: Callable[..., Any], *rows: jax.Array, check_vma: bool = True
    ) -> Any:
        """on_shard(*rows, weights) on all shards; any number of rows."""
        n_rows = rows[0].shape[0]
        missing = -n_rows % self.mesh.shape[DATA]
        mapped = self.on_shards(on_shard, (ROWS,) * len(rows), ROWS, check_vma)
        padded = [jnp.pad(array, ((0, missing), (0, 0))) for array in rows]
        return jax.tree.map(lambda out: out[:n_rows], mapped(*padded))


class DenseSae(Sae):
    """An SAE whose code comes from all of a row's h at once."""

    @abc.abstractmethod
    def activate(self, h_bl: jax.Array, weights: Weights) -> jax.Array:
        """A shard's dense code [B, L/S]."""

    def choose(
        self, normed_bd: jax.Array, weights: Weights, k: int
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        code_bl = self.activate(self.project(normed_bd, weights), weights)
        n_active_b1 = jnp.sum(code_bl > 0, axis=1, keepdims=True, dtype=jnp.int32)
        return *topk.choose(code_bl, k), n_active_b1


def new_param(name: str, value: jax.Array) -> nnx.Param:
    """A parameter, placed as its name says."""
    return nnx.Param(value, out_sharding=tuple(param_spec(name)))


def new_bias(w_enc: nnx.Param) -> nnx.Param:
    """Zeros [L] for an encoder [L, D]."""
    return new_param("b_l", jnp.zeros_like(w_enc[:, 0]))


@jax.custom_vjp
def _owe(b_dec_d: jax.Array, w_enc_ld: jax.Array) -> jax.Array:
    """Zeros [L/S], as if they were (constant b_dec - b_dec) W_enc^T."""
    return jnp.zeros_like(w_enc_ld[:, 0])


def _owe_forward(b_dec_d: jax.Array, w_enc_ld: jax.Array) -> tuple[jax.Array, Any]:
    return _owe(b_dec_d, w_enc_ld), w_enc_ld


def _owe_backward(w_enc_ld: jax.Array, g_l: jax.Array) -> tuple[jax.Array, None]:
    return -g_l @ w_enc_ld, None


_owe.defvjp(_owe_forward, _owe_backward)


def _weigh_by_norm(weights: Weights) -> Weights:
    """The same SAE with unit decoder rows: their norms move into the encoder."""
    norm_l = jnp.linalg.norm(weights["w_dec_ld"], axis=1)
    weighed = dict(weights)
    weighed["w_dec_ld"] = weights["w_dec_ld"] / norm_l[:, None]
    weighed["w_enc_ld"] = weights["w_enc_ld"] * norm_l[:, None]
    if "b_enc_l" in weights:
        weighed["b_enc_l"] = weights["b_enc_l"] * norm_l
    return weighed


def _as_rows(acts: jax.Array, d_model: int) -> jax.Array:
    if acts.ndim < 1 or acts.shape[-1] != d_model:
        raise ValueError(
            f"acts of shape {acts.shape} given to an SAE of d_model = {d_model}: the "
            "last axis must be as wide"
        )
    return acts.reshape(-1, d_model)
