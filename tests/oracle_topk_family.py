"""TopK, BatchTopK and what is built on them, in plain float64 NumPy.

Every term of these losses is how well some code rebuilds something: `codes` has them.

    TopK          z: a row's K largest of pre, as oracle.py has it
    BatchTopK     z: ReLU(pre) where pre >= τ, the (K B)-th largest ReLU of the batch
    Multi-TopK    + 1/8 of the error with the 4 K largest
    Matryoshka    the error is the mean over prefixes of the latents
    norm-weighted TopK of encoder |w_dec_l| (w_enc_l, b_enc_l), decoder of unit rows
    all           + aux_coefficient * AuxK

Sources: Gao et al. 2024 (TopK, Multi-TopK, AuxK), Bussmann et al. 2024 (BatchTopK),
Bussmann et al. 2025 (Matryoshka), He et al. 2024 (Llama Scope, norm-weighted TopK).
"""

import numpy as np
import oracle
from numpy.typing import NDArray
from oracle import Array, Params, Settings

ARCHITECTURES = ("topk", "batch_topk")
MULTI_TOPK_WEIGHT = 1 / 8
THRESHOLD_DECAY = 0.9  # of BatchTopK's running threshold


def weights(settings: Settings) -> dict[str, float]:
    """What each term counts for in the loss."""
    prefixes = settings.prefixes
    terms = {f"nmse_prefix_{m}": 1 / len(prefixes) for m in prefixes} or {"nmse": 1.0}
    if settings.multi_topk:
        terms["multi_topk_nmse"] = MULTI_TOPK_WEIGHT
    return terms | {"aux_loss": settings.aux_coefficient}


def codes(
    architecture: str, params: Params, x_bd: Array, dead_l: NDArray, settings: Settings
) -> dict[str, Array]:
    """The dense code behind each term; that of "nmse" is the code."""
    params = effective(params, settings)
    pre_bl = oracle.pre_activations(params, x_bd, settings.subtract_b_dec)
    if architecture == "topk":
        f_bl = _best(pre_bl, settings.k)
    else:
        f_bl = code_above(pre_bl, batch_threshold(pre_bl, settings.k))
    found = {"nmse": f_bl, "aux_loss": _best(pre_bl, settings.k_aux, dead_l)}
    if settings.multi_topk:
        found["multi_topk_nmse"] = _best(pre_bl, 4 * settings.k)
    for m in settings.prefixes:
        found[f"nmse_prefix_{m}"] = f_bl * (np.arange(f_bl.shape[1]) < m)
    return found


def losses(
    architecture: str,
    params: Params,
    x_bd: Array,
    dead_l: NDArray,
    settings: Settings,
    stopped: Params,
) -> dict[str, float]:
    """Every term; AuxK's residual is a constant, that of the parameters `stopped`."""
    found = codes(architecture, params, x_bd, dead_l, settings)
    residual_bd = x_bd - reconstruct(architecture, stopped, x_bd, dead_l, settings)
    weights_now = effective(params, settings)
    w_dec_ld, b_dec_d = weights_now["w_dec_ld"], weights_now["b_dec_d"]
    aux_hat_bd = found.pop("aux_loss") @ w_dec_ld
    return {
        name: oracle.main_loss(z_bl @ w_dec_ld + b_dec_d, x_bd, settings.loss_scale)
        for name, z_bl in found.items()
    } | {"aux_loss": oracle.aux_loss(residual_bd, aux_hat_bd, bool(dead_l.any()))}


def gradients(
    architecture: str,
    params: Params,
    x_bd: Array,
    dead_l: NDArray,
    settings: Settings,
    of: str,
) -> Params:
    """Gradients of the term `of`, unweighted."""
    z_bl = codes(architecture, params, x_bd, dead_l, settings)[of]
    weights_now = effective(params, settings)
    product_bd = z_bl @ weights_now["w_dec_ld"]
    if of == "aux_loss":
        residual_bd = x_bd - reconstruct(architecture, params, x_bd, dead_l, settings)
        g_bd = np.zeros_like(x_bd)
        if oracle.aux_loss(residual_bd, product_bd, bool(dead_l.any())):
            variation = ((residual_bd - residual_bd.mean(axis=0)) ** 2).sum()
            g_bd = 2 * (product_bd - residual_bd) / variation
    else:
        error_bd = product_bd + params["b_dec_d"] - x_bd
        g_bd = 2 * settings.loss_scale / x_bd.size * error_bd
    found = oracle.code_gradients(weights_now, x_bd, z_bl, g_bd, settings)
    if of != "aux_loss":
        found["b_dec_d"] += g_bd.sum(axis=0)
    return _through_effective(params, found) if settings.norm_weighted else found


def reconstruct(
    architecture: str, params: Params, x_bd: Array, dead_l: NDArray, settings: Settings
) -> Array:
    f_bl = codes(architecture, params, x_bd, dead_l, settings)["nmse"]
    return f_bl @ effective(params, settings)["w_dec_ld"] + params["b_dec_d"]


def batch_threshold(pre_bl: Array, k: int) -> float:
    """τ: 0 where fewer than K B pre-activations are positive."""
    return float(np.sort(np.maximum(pre_bl, 0.0), axis=None)[::-1][k * len(pre_bl) - 1])


def next_threshold(threshold: float | None, batch_threshold: float) -> float:
    """BatchTopK's running threshold after a step; None before the first."""
    if threshold is None:
        return batch_threshold
    return THRESHOLD_DECAY * threshold + (1 - THRESHOLD_DECAY) * batch_threshold


def code_above(pre_bl: Array, threshold: float) -> Array:
    return np.where(pre_bl >= threshold, np.maximum(pre_bl, 0.0), 0.0)


def effective(params: Params, settings: Settings) -> Params:
    """The parameters of the TopK SAE that is meant."""
    if not settings.norm_weighted:
        return params
    norm_l = np.linalg.norm(params["w_dec_ld"], axis=1)
    found = params | {
        "w_enc_ld": norm_l[:, None] * params["w_enc_ld"],
        "w_dec_ld": params["w_dec_ld"] / norm_l[:, None],
    }
    return found | {n: norm_l * a for n, a in params.items() if n == "b_enc_l"}


def _through_effective(params: Params, g: Params) -> Params:
    """Gradients of the parameters, given those of the effective ones."""
    w_dec_ld = params["w_dec_ld"]
    norm_l1 = np.linalg.norm(w_dec_ld, axis=1, keepdims=True)
    g_norm_l = (g["w_enc_ld"] * params["w_enc_ld"]).sum(axis=1)
    if "b_enc_l" in params:
        g_norm_l += g["b_enc_l"] * params["b_enc_l"]
    # A row's direction moves across the row only, and its norm along it.
    across_ld = oracle.project_rows(g["w_dec_ld"], w_dec_ld) / norm_l1
    found = g | {
        "w_enc_ld": norm_l1 * g["w_enc_ld"],
        "w_dec_ld": across_ld + g_norm_l[:, None] * w_dec_ld / norm_l1,
    }
    return found | {n: norm_l1[:, 0] * a for n, a in g.items() if n == "b_enc_l"}


def _best(pre_bl: Array, k: int, among_l: NDArray | None = None) -> Array:
    return oracle.chosen_values(pre_bl, oracle.choose(pre_bl, k, among_l))
