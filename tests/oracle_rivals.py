"""The rival SAE architectures, their losses and gradients in plain float64 NumPy.

B rows x, λ the sparsity coefficient of the step, E_b the mean over rows, sg a constant,
h = (x - b_dec) W_enc^T, pre = h + b_enc, x̂ = f W_dec + b_dec, nmse as in oracle.py.

    relu               f = ReLU(pre);  nmse + λ E_b sum_l f
    relu_decoder_norm  f = ReLU(pre);  nmse + λ E_b sum_l f |w_dec_l|
    prolu              f = h where h > 0 and h + b_enc > 0;  nmse + λ E_b sum_l f,
                       with df/dh = 1 + h and df/db_enc = h where f is not 0
    gated              π = h + b_gate, f = 1[π > 0] ReLU(exp(r_mag) h + b_mag);
                       nmse + λ E_b sum_l ReLU(π)
                       + nmse of ReLU(π') sg(W_dec) + sg(b_dec), where
                       π' = (x - sg(b_dec)) W_enc^T + b_gate
    jumprelu           f = ReLU(pre) 1[pre > θ], L0 = sum_l 1[pre > max(θ, 0)];
                       nmse + λ E_b L0  or  nmse + λ (E_b L0 / target_l0 - 1)^2,
                       with d1[pre > θ]/dθ = -1[|pre - θ| < ε/2] / ε, d1[.]/dpre = 0
    topk, batch_topk   oracle_topk_family.py

Sources: Anthropic, April 2024 (decoder norms); Taggart 2024 (ProLU); Rajamanoharan et
al. 2024, two papers (Gated, JumpReLU). `terms` and `gradients` name the terms as the
package names its metrics.
"""

import dataclasses

import numpy as np
import oracle
import oracle_topk_family as topk_family
from numpy.typing import NDArray
from oracle import Array, Params, Settings

ARCHITECTURES = (
    "relu",
    "relu_decoder_norm",
    "prolu",
    "gated",
    "jumprelu",
    *topk_family.ARCHITECTURES,
)


@dataclasses.dataclass(frozen=True)
class Terms:
    """What one batch gives; `metrics` has every term unweighted, "l0" and "n_dead"."""

    metrics: dict[str, float]
    f_bl: Array
    x_hat_bd: Array
    fired_l: NDArray


def terms(
    architecture: str,
    params: Params,
    x_bd: Array,
    dead_l: NDArray,
    settings: Settings,
    stopped: Params | None = None,
) -> Terms:
    """Loss and code; what is under a stop-gradient is taken from `stopped`."""
    stopped = params if stopped is None else stopped
    if architecture in topk_family.ARCHITECTURES:
        inputs = (architecture, params, x_bd, dead_l, settings)
        metrics = topk_family.losses(*inputs, stopped)
        f_bl = topk_family.codes(*inputs)["nmse"]
        x_hat_bd = topk_family.reconstruct(*inputs)
    else:
        f_bl = _code(architecture, params, x_bd, settings)
        x_hat_bd = f_bl @ params["w_dec_ld"] + params["b_dec_d"]
        metrics = {
            "nmse": oracle.main_loss(x_hat_bd, x_bd, settings.loss_scale),
            "sparsity_loss": _sparsity_loss(architecture, params, x_bd, settings),
        }
        if architecture == "gated":
            metrics["aux_loss"] = _gated_aux_loss(params, x_bd, settings, stopped)
    counts = _weights(architecture, settings)
    metrics["loss"] = sum(counts[name] * metrics[name] for name in counts)
    metrics["l0"] = float((f_bl > settings.firing_threshold).sum(axis=1).mean())
    metrics["n_dead"] = int(dead_l.sum())
    return Terms(metrics, f_bl, x_hat_bd, oracle.fires(f_bl, settings))


def gradients(
    architecture: str,
    params: Params,
    x_bd: Array,
    dead_l: NDArray,
    settings: Settings,
    of: str = "loss",
) -> Params:
    """Gradients of the loss or of one unweighted term, for every parameter."""
    inputs = (architecture, params, x_bd, dead_l, settings)
    if of == "loss":
        total = {name: np.zeros_like(a) for name, a in params.items()}
        for term, weight in _weights(architecture, settings).items():
            for name, g in gradients(*inputs, of=term).items():
                total[name] += weight * g
        return total
    if architecture in topk_family.ARCHITECTURES:
        found = topk_family.gradients(*inputs, of)
    else:
        of_term = {
            "nmse": _nmse_gradients,
            "sparsity_loss": _sparsity_gradients,
            "aux_loss": _gated_aux_gradients,
        }[of]
        found = of_term(architecture, params, x_bd, settings)
    return {name: found.get(name, np.zeros_like(a)) for name, a in params.items()}


def encode(architecture: str, params: Params, x_bd: Array, settings: Settings) -> Array:
    """The code f_bl of a trained SAE: only BatchTopK's is another in training."""
    if architecture == "batch_topk":
        pre_bl = oracle.pre_activations(params, x_bd, settings.subtract_b_dec)
        return topk_family.code_above(pre_bl, float(params["threshold"]))
    dead_l = np.zeros(len(params["w_dec_ld"]), bool)
    return terms(architecture, params, x_bd, dead_l, settings).f_bl


def _weights(architecture: str, settings: Settings) -> dict[str, float]:
    """What each term counts for in the loss; λ is within the sparsity term."""
    if architecture in topk_family.ARCHITECTURES:
        return topk_family.weights(settings)
    gated_aux = {"aux_loss": 1.0} if architecture == "gated" else {}
    return {"nmse": 1.0, "sparsity_loss": 1.0} | gated_aux


# The code -----------------------------------------------------------------------------


def _code(architecture: str, params: Params, x_bd: Array, settings: Settings) -> Array:
    pre_bl = oracle.pre_activations(params, x_bd, settings.subtract_b_dec)
    if architecture == "prolu":
        h_bl = _without_bias(params, x_bd, settings)
        return np.where((h_bl > 0) & (pre_bl > 0), h_bl, 0.0)
    if architecture == "gated":  # has no b_enc: here pre is h
        magnitude_bl = np.exp(params["r_mag_l"]) * pre_bl + params["b_mag_l"]
        is_open_bl = pre_bl + params["b_gate_l"] > 0
        return np.where(is_open_bl, np.maximum(magnitude_bl, 0.0), 0.0)
    if architecture == "jumprelu":
        is_above_bl = pre_bl > params["threshold_l"]
        return np.where(is_above_bl, np.maximum(pre_bl, 0.0), 0.0)
    if architecture not in ("relu", "relu_decoder_norm"):
        raise ValueError(architecture)
    return np.maximum(pre_bl, 0.0)


def _through_code(
    architecture: str, params: Params, x_bd: Array, g_f_bl: Array, settings: Settings
) -> Params:
    """Gradients through the code, where g_f_bl is the gradient of the code."""
    pre_bl = oracle.pre_activations(params, x_bd, settings.subtract_b_dec)
    is_on_bl = _code(architecture, params, x_bd, settings) > 0
    g_pre_bl = g_f_bl * is_on_bl
    if architecture == "prolu":
        h_bl = _without_bias(params, x_bd, settings)
        found = oracle.pre_gradients(params, x_bd, g_pre_bl * (1 + h_bl), settings)
        return found | {"b_enc_l": (g_pre_bl * h_bl).sum(axis=0)}
    if architecture == "gated":
        grown_bl = g_pre_bl * np.exp(params["r_mag_l"])
        return oracle.pre_gradients(params, x_bd, grown_bl, settings) | {
            "b_mag_l": g_pre_bl.sum(axis=0),
            "r_mag_l": (grown_bl * pre_bl).sum(axis=0),
        }
    found = oracle.pre_gradients(params, x_bd, g_pre_bl, settings)
    if architecture == "jumprelu":
        g_jump_bl = g_f_bl * np.maximum(params["threshold_l"], 0.0)
        found["threshold_l"] = _through_jump(params, pre_bl, g_jump_bl, settings)
    return found


def _through_jump(
    params: Params, pre_bl: Array, g_bl: Array, settings: Settings
) -> Array:
    """Of the thresholds [L], where g_bl is the gradient of 1[pre > θ]."""
    from_jump_bl = (pre_bl - params["threshold_l"]) / settings.bandwidth
    return -(g_bl * (np.abs(from_jump_bl) < 0.5)).sum(axis=0) / settings.bandwidth


def _without_bias(params: Params, x_bd: Array, settings: Settings) -> Array:
    """h_bl, whether or not the parameters have an encoder bias."""
    weights = {name: a for name, a in params.items() if name != "b_enc_l"}
    return oracle.pre_activations(weights, x_bd, settings.subtract_b_dec)


# Terms --------------------------------------------------------------------------------


def _nmse_gradients(
    architecture: str, params: Params, x_bd: Array, settings: Settings
) -> Params:
    f_bl = _code(architecture, params, x_bd, settings)
    error_bd = f_bl @ params["w_dec_ld"] + params["b_dec_d"] - x_bd
    g_bd = 2 * settings.loss_scale / x_bd.size * error_bd
    g_f_bl = g_bd @ params["w_dec_ld"].T
    found = _through_code(architecture, params, x_bd, g_f_bl, settings)
    found["b_dec_d"] += g_bd.sum(axis=0)
    return found | {"w_dec_ld": f_bl.T @ g_bd}


def _sparsity_loss(
    architecture: str, params: Params, x_bd: Array, settings: Settings
) -> float:
    """The whole term, λ within."""
    coefficient, target_l0 = settings.sparsity_coefficient, settings.target_l0
    if architecture == "jumprelu":
        l0 = _mean_jumps(params, x_bd, settings)
        if target_l0 is not None:
            return coefficient * (l0 / target_l0 - 1) ** 2
        return coefficient * l0
    if architecture == "gated":
        penalised_bl = np.maximum(_gate(params, x_bd, settings), 0.0)
    else:
        penalised_bl = _code(architecture, params, x_bd, settings)
    if architecture == "relu_decoder_norm":
        penalised_bl = penalised_bl * np.linalg.norm(params["w_dec_ld"], axis=1)
    return coefficient * float(penalised_bl.sum(axis=1).mean())


def _sparsity_gradients(
    architecture: str, params: Params, x_bd: Array, settings: Settings
) -> Params:
    coefficient, target_l0 = settings.sparsity_coefficient, settings.target_l0
    f_bl = _code(architecture, params, x_bd, settings)
    each_bl = np.full_like(f_bl, coefficient / len(x_bd))
    if architecture == "gated":
        g_pi_bl = each_bl * (_gate(params, x_bd, settings) > 0)
        found = oracle.pre_gradients(params, x_bd, g_pi_bl, settings)
        return found | {"b_gate_l": g_pi_bl.sum(axis=0)}
    if architecture == "jumprelu":
        if target_l0 is not None:
            l0 = _mean_jumps(params, x_bd, settings)
            each_bl *= 2 * (l0 / target_l0 - 1) / target_l0
        pre_bl = oracle.pre_activations(params, x_bd, settings.subtract_b_dec)
        return {"threshold_l": _through_jump(params, pre_bl, each_bl, settings)}
    if architecture == "relu_decoder_norm":
        norm_l = np.linalg.norm(params["w_dec_ld"], axis=1)
        found = _through_code(architecture, params, x_bd, each_bl * norm_l, settings)
        direction_ld = params["w_dec_ld"] / norm_l[:, None]
        sums_l = (each_bl * f_bl).sum(axis=0)
        return found | {"w_dec_ld": sums_l[:, None] * direction_ld}
    return _through_code(architecture, params, x_bd, each_bl, settings)


def _mean_jumps(params: Params, x_bd: Array, settings: Settings) -> float:
    """E_b L0 of JumpReLU."""
    pre_bl = oracle.pre_activations(params, x_bd, settings.subtract_b_dec)
    is_above_bl = pre_bl > np.maximum(params["threshold_l"], 0.0)
    return float(is_above_bl.sum(axis=1).mean())


def _gate(params: Params, x_bd: Array, settings: Settings) -> Array:
    """π of Gated."""
    h_bl = oracle.pre_activations(params, x_bd, settings.subtract_b_dec)
    return h_bl + params["b_gate_l"]


def _gated_aux_loss(
    params: Params, x_bd: Array, settings: Settings, stopped: Params
) -> float:
    gate_bl = _gate(params | {"b_dec_d": stopped["b_dec_d"]}, x_bd, settings)
    x_hat_bd = np.maximum(gate_bl, 0.0) @ stopped["w_dec_ld"] + stopped["b_dec_d"]
    return oracle.main_loss(x_hat_bd, x_bd, settings.loss_scale)


def _gated_aux_gradients(
    architecture: str, params: Params, x_bd: Array, settings: Settings
) -> Params:
    if architecture != "gated":
        raise ValueError(architecture)
    gate_bl = _gate(params, x_bd, settings)
    x_hat_bd = np.maximum(gate_bl, 0.0) @ params["w_dec_ld"] + params["b_dec_d"]
    g_bd = 2 * settings.loss_scale / x_bd.size * (x_hat_bd - x_bd)
    g_pi_bl = (g_bd @ params["w_dec_ld"].T) * (gate_bl > 0)
    found = oracle.pre_gradients(params, x_bd, g_pi_bl, settings)
    return {"w_enc_ld": found["w_enc_ld"], "b_gate_l": g_pi_bl.sum(axis=0)}
