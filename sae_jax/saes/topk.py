"""The TopK SAE (Gao et al. 2024, section 2.3), its latents partitioned over a mesh.

    pre = (x - b_dec) W_enc^T + b_enc
    z   = ReLU(the K largest of pre, zero elsewhere)
    x̂   = z W_dec + b_dec
    L   = loss_scale * mean (x - x̂)^2 + aux_coefficient * AuxK

x is the normalised row (`sae_jax.normalize`), W_enc and W_dec are [L, D], and decoder
rows have unit norm. AuxK asks the k_aux best dead latents to explain the residual
(`sae_jax.losses`).

Each latent shard computes its own pre-activations and its own part of x̂; beside them
one step moves the candidates of each choice and one sum of [B, D] per reconstruction.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sae_jax import losses, normalize, optim, sparse, topk
from sae_jax.config import SaeConfig, k_aux
from sae_jax.firing import Counters
from sae_jax.matmul import matmul
from sae_jax.mesh import DATA, LATENT
from sae_jax.normalize import Normalization
from sae_jax.saes.code import SparseCode

Batch = tuple[jax.Array, jax.Array]  # inputs [B, D] and targets [B, D]

_ROWS = P(DATA, None)
_LATENTS = P(LATENT)
_WEIGHTS = P(LATENT, None)


class TopKSae(nnx.Module):
    """Encoder, decoder and loss. A pytree: pass it to `jax.jit` as an argument."""

    unit_norm = ("w_dec_ld",)  # parameters whose rows are kept at unit norm

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
        self.w_enc_ld = nnx.Param(w_ld, out_sharding=(LATENT, None))
        # A copy: two parameters must not share a buffer that a step donates.
        self.w_dec_ld = nnx.Param(jnp.copy(w_ld), out_sharding=(LATENT, None))
        self.b_dec_d = nnx.Param(b_dec_d, out_sharding=(None,))
        if config.use_b_enc:
            b_enc_l = jnp.zeros((config.n_latents,), b_dec_d.dtype)
            self.b_enc_l = nnx.Param(b_enc_l, out_sharding=(LATENT,))

    @property
    def d_model(self) -> int:
        if self.config.d_model is None:
            raise ValueError("sae.d_model is not set: take it from the store's site")
        return self.config.d_model

    @property
    def n_latents(self) -> int:
        return self.config.n_latents

    @property
    def k(self) -> int:
        return self.config.k

    def loss(
        self, batch: Batch, counters: Counters
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The training loss of one batch of rows in activation space.

        Returns:
            The loss, and {"metrics": scalars by name, "fired_l": bool [L]}.
        """
        inputs_bd, targets_bd = batch
        normed_bd, shift_b1, scale_b1 = self.normalize(inputs_bd)
        targets_bd = (targets_bd.astype(normed_bd.dtype) - shift_b1) / scale_b1
        is_dead_l = counters.is_dead_l
        recon_bd, aux_recon_bd, fired_l, l0 = self._autoencode(normed_bd, is_dead_l)
        nmse = counters.loss_scale * losses.mean_square_error(recon_bd, targets_bd)
        aux_loss = losses.aux_loss(
            targets_bd - recon_bd, aux_recon_bd, jnp.any(is_dead_l)
        )
        loss = nmse + self.config.aux_coefficient * aux_loss
        metrics = {
            "loss": loss,
            "nmse": nmse,
            "aux_loss": aux_loss,
            "l0": l0,
            "n_dead": jnp.sum(is_dead_l),
        }
        return loss, {"metrics": metrics, "fired_l": fired_l}

    @jax.jit
    def encode(self, acts: jax.Array) -> SparseCode:
        """The code of rows [..., D] in activation space."""
        rows_bd = _as_rows(acts, self.d_model)
        normed_bd, shift_b1, scale_b1 = self.normalize(rows_bd)
        values_bk, indices_bk = self._choose(normed_bd)
        batch = acts.shape[:-1]
        return SparseCode(
            values=values_bk.reshape(*batch, -1),
            indices=indices_bk.reshape(*batch, -1),
            shift=shift_b1.reshape(*batch, 1),
            scale=scale_b1.reshape(*batch, 1),
        )

    @jax.jit
    def decode(self, code: SparseCode) -> jax.Array:
        """Reconstructed rows [..., D] in activation space."""
        batch, k = code.values.shape[:-1], code.values.shape[-1]
        recon_bd = self._decode(code.values.reshape(-1, k), code.indices.reshape(-1, k))
        recon = recon_bd.reshape(*batch, self.d_model)
        return normalize.undo(recon, code.shift, code.scale)

    @jax.jit
    def encode_dense(self, acts: jax.Array) -> jax.Array:
        """The code of rows [..., D] as [..., L]; for few rows, it is large."""
        return self.encode(acts).to_dense(self.n_latents)

    def normalize(self, acts: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rows in the SAE's space, and the shift and scale [..., 1] that undo it."""
        return normalize.apply(self.normalization, acts.astype(self.w_enc_ld.dtype))

    def _autoencode(
        self, normed_bd: jax.Array, is_dead_l: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Reconstruction, AuxK's reconstruction, which latents fired, and mean L0."""

        def on_shard(normed_bd, is_dead_l, weights):  # type: ignore[no-untyped-def]
            pre_bl = self._pre_activations(normed_bd, weights)
            values_bk, indices_bk = self._winners(pre_bl, self.k)
            w_dec_ld = lax.pcast(weights["w_dec_ld"], DATA, to="varying")
            recon_bd = sparse.decode(values_bk, indices_bk, w_dec_ld, self._dtype)
            aux_recon_bd = lax.cond(
                lax.psum(is_dead_l.sum(), LATENT) > 0,
                self._reconstruct_from_dead,
                lambda pre_bl, *_: jnp.zeros_like(recon_bd, pre_bl.dtype),
                pre_bl,
                is_dead_l,
                w_dec_ld,
            )
            fired_l = jnp.zeros(is_dead_l.shape, jnp.int32)
            fired_l = fired_l.at[indices_bk].max((values_bk > 0).astype(jnp.int32))
            l0 = jnp.sum(values_bk > 0) / normed_bd.shape[0]
            return (
                lax.psum(recon_bd, LATENT) + weights["b_dec_d"],
                lax.psum(aux_recon_bd, LATENT),
                lax.pmax(fired_l, DATA) > 0,
                lax.pmean(lax.psum(l0, LATENT), DATA),
            )

        weights, specs = self._weights()
        return jax.shard_map(
            on_shard,
            mesh=self.mesh,
            in_specs=(_ROWS, _LATENTS, specs),
            out_specs=(_ROWS, _ROWS, _LATENTS, P()),
        )(normed_bd, is_dead_l, weights)

    def _reconstruct_from_dead(
        self, pre_bl: jax.Array, is_dead_l: jax.Array, w_dec_ld: jax.Array
    ) -> jax.Array:
        """This shard's part [B, D] of AuxK's reconstruction, without b_dec."""
        # Live latents are left out altogether: at 0 they would still take the places
        # of dead ones whose pre-activations are negative.
        dead_bl = jnp.where(is_dead_l, pre_bl, -jnp.inf)
        values_bk, indices_bk = self._winners(dead_bl, k_aux(self.config, self.d_model))
        return sparse.decode(values_bk, indices_bk, w_dec_ld, self._dtype)

    def _choose(self, normed_bd: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Values and global indices [B, K] of the chosen latents."""

        def on_shard(normed_bd, weights):  # type: ignore[no-untyped-def]
            pre_bl = self._pre_activations(normed_bd, weights)
            values_bk, indices_bk = topk.merge_codes(
                *topk.choose(pre_bl, self.k), self.k, pre_bl.shape[1], LATENT
            )
            return nnx.relu(values_bk), indices_bk

        # The gathered result is the same on all latent shards, which the checker of
        # replication cannot see.
        return self._map_rows(on_shard, normed_bd, check_vma=False)

    def _decode(self, values_bk: jax.Array, indices_bk: jax.Array) -> jax.Array:
        """Normalised rows [B, D] of a code with global indices."""

        def on_shard(values_bk, indices_bk, weights):  # type: ignore[no-untyped-def]
            w_dec_ld = lax.pcast(weights["w_dec_ld"], DATA, to="varying")
            n_own = w_dec_ld.shape[0]
            own_bk = indices_bk - lax.axis_index(LATENT) * n_own
            is_own_bk = (own_bk >= 0) & (own_bk < n_own)
            part_bd = sparse.decode(
                jnp.where(is_own_bk, values_bk, 0),
                jnp.where(is_own_bk, own_bk, 0),
                w_dec_ld,
                self._dtype,
            )
            return lax.psum(part_bd, LATENT) + weights["b_dec_d"]

        return self._map_rows(on_shard, values_bk, indices_bk)

    def _map_rows(self, on_shard: Any, *rows: jax.Array, check_vma: bool = True) -> Any:
        """on_shard(*rows, weights) on all shards; any number of rows."""
        weights, specs = self._weights()
        n_rows = rows[0].shape[0]
        missing = -n_rows % self.mesh.shape[DATA]
        mapped = jax.shard_map(
            on_shard,
            mesh=self.mesh,
            in_specs=(*[_ROWS] * len(rows), specs),
            out_specs=_ROWS,
            check_vma=check_vma,
        )
        padded = [jnp.pad(array, ((0, missing), (0, 0))) for array in rows]
        return jax.tree.map(lambda out: out[:n_rows], mapped(*padded, weights))

    def _pre_activations(
        self, normed_bd: jax.Array, weights: dict[str, jax.Array]
    ) -> jax.Array:
        """This shard's pre-activations [B, L/S]."""
        w_enc_ld = lax.pcast(weights["w_enc_ld"], DATA, to="varying")
        b_dec_d = lax.stop_gradient(weights["b_dec_d"])
        centered_bd = normed_bd - b_dec_d if self.config.subtract_b_dec else normed_bd
        centered_bd = lax.pcast(centered_bd, LATENT, to="varying")
        pre_bl = matmul(centered_bd, w_enc_ld.T, self._dtype)
        if self.config.subtract_b_dec:
            # Adds zero. It carries b_dec's gradient, -(sum_b g_bl) W_enc: one product
            # of a vector, where differentiating `centered_bd` would cost a matmul.
            pre_bl = pre_bl + (b_dec_d - weights["b_dec_d"]) @ weights["w_enc_ld"].T
        return pre_bl + weights["b_enc_l"] if self.config.use_b_enc else pre_bl

    def _winners(self, pre_bl: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """This shard's own among the K best, as values (0: not chosen) and columns."""
        values_bk, indices_bk = topk.choose(pre_bl, k)
        keep_bk = topk.keep_global(values_bk, k, LATENT)
        return jnp.where(keep_bk, nnx.relu(values_bk), 0), indices_bk

    def _weights(self) -> tuple[dict[str, jax.Array], dict[str, P]]:
        """Parameters by name, and where each lives."""
        names = {"w_enc_ld": _WEIGHTS, "w_dec_ld": _WEIGHTS, "b_dec_d": P(None)}
        if self.config.use_b_enc:
            names["b_enc_l"] = _LATENTS
        return {name: getattr(self, name)[...] for name in names}, names

    @property
    def _dtype(self) -> jnp.dtype:
        """Of the factors of matmuls."""
        if self.config.compute_dtype is not None:
            return jnp.dtype(self.config.compute_dtype)
        is_cpu = self.mesh.devices.flat[0].platform == "cpu"
        return self.w_enc_ld.dtype if is_cpu else jnp.dtype(jnp.bfloat16)


def _as_rows(acts: jax.Array, d_model: int) -> jax.Array:
    if acts.ndim < 1 or acts.shape[-1] != d_model:
        raise ValueError(
            f"acts of shape {acts.shape} given to an SAE of d_model = {d_model}: the "
            "last axis must be as wide"
        )
    return acts.reshape(-1, d_model)
