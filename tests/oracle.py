"""The TopK SAE, its losses and one training step in plain float64 NumPy.

This file is the definition of the maths that the package is tested against (Gao et al.
2024, "Scaling and evaluating sparse autoencoders"). It imports nothing of the package,
keeps every dense array, and derives its gradients by hand. Parameters are a dict of
`w_enc_ld`, `w_dec_ld`, `b_dec_d` and, unless the encoder bias is off, `b_enc_l`.
The other architectures are in oracle_rivals.py.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Params = dict[str, Array]

NORM_FLOOR = 1e-12  # a norm below this is taken to be this
LAYER_NORM_EPS = 1e-5  # added to the standard deviation, not to the variance


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the losses and a step need to know beside the parameters."""

    k: int
    k_aux: int
    loss_scale: float = 1.0
    aux_coefficient: float = 1 / 32
    subtract_b_dec: bool = True
    # Of the rivals (oracle_rivals.py, oracle_topk_family.py)
    sparsity_coefficient: float = 0.0  # of this step, already warmed up
    bandwidth: float = 1e-3
    target_l0: float | None = None
    multi_topk: bool = False
    norm_weighted: bool = False
    prefixes: tuple[int, ...] = ()  # none, or rising and the last all latents
    # Of a step
    firing_threshold: float = 0.0
    dead_after_steps: int = 1
    unit_norm: bool = True  # decoder rows are kept at unit norm
    clip_norm: float | None = None
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    decay_steps: int = 0
    n_steps: int = 0  # of the whole run, where `decay_steps` is not 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 6.25e-10
    ema_decay: float = 0.999


# Normalisation ------------------------------------------------------------------------


def normalize(
    kind: str, acts_bd: Array, mean_norm: float = 1.0, mean_square_norm: float = 1.0
) -> tuple[Array, Array, Array]:
    """(normed_bd, shift_b1, scale_b1) with acts = normed * scale + shift.

    A row of zeros stays a row of zeros under every kind.
    """
    acts_bd = np.asarray(acts_bd, np.float64)
    n_rows, d_model = acts_bd.shape
    shift_b1, scale_b1 = np.zeros((n_rows, 1)), np.ones((n_rows, 1))
    if kind in ("center_unit_norm", "layer_norm"):
        for row, acts_d in enumerate(acts_bd):
            shift_b1[row] = mean = acts_d.sum() / d_model
            sum_of_squares = ((acts_d - mean) ** 2).sum()
            if kind == "center_unit_norm":
                scale_b1[row] = max(np.sqrt(sum_of_squares), NORM_FLOOR)
            else:
                scale_b1[row] = np.sqrt(sum_of_squares / (d_model - 1)) + LAYER_NORM_EPS
    elif kind == "scale_to_sqrt_d":
        scale_b1[:] = mean_norm / np.sqrt(d_model)
    elif kind == "unit_mean_square":
        scale_b1[:] = np.sqrt(mean_square_norm)
    elif kind != "none":
        raise ValueError(kind)
    return (acts_bd - shift_b1) / scale_b1, shift_b1, scale_b1


def undo(normed_bd: Array, shift_b1: Array, scale_b1: Array) -> Array:
    return normed_bd * scale_b1 + shift_b1


# Encode and decode --------------------------------------------------------------------


def pre_activations(params: Params, x_bd: Array, subtract_b_dec: bool) -> Array:
    centred_bd = x_bd - params["b_dec_d"] if subtract_b_dec else x_bd
    return centred_bd @ params["w_enc_ld"].T + params.get("b_enc_l", 0.0)


def choose(pre_bl: Array, k: int, among_l: NDArray | None = None) -> list[list[int]]:
    """Each row's k largest pre-activations, largest first, ties to the lowest index.

    With `among_l`, only latents where it is true can be chosen: rows may be shorter.
    """
    latents = np.arange(pre_bl.shape[1])
    if among_l is not None:
        latents = latents[among_l]
    order_bk = np.argsort(-pre_bl[:, latents], axis=1, kind="stable")[:, :k]
    return latents[order_bk].tolist()


def chosen_values(pre_bl: Array, chosen: list[list[int]]) -> Array:
    """Dense z_bl: ReLU of the chosen pre-activations (ReLU after choosing), else 0."""
    z_bl, indices_bk = np.zeros_like(pre_bl), np.array(chosen, int)
    values_bk = np.maximum(np.take_along_axis(pre_bl, indices_bk, axis=1), 0.0)
    np.put_along_axis(z_bl, indices_bk, values_bk, axis=1)
    return z_bl


def encode(
    params: Params, x_bd: Array, k: int, subtract_b_dec: bool = True
) -> tuple[Array, NDArray]:
    """(values_bk descending and >= 0, indices_bk)."""
    pre_bl = pre_activations(params, x_bd, subtract_b_dec)
    indices_bk = np.array(choose(pre_bl, k))
    return np.maximum(np.take_along_axis(pre_bl, indices_bk, axis=1), 0.0), indices_bk


def decode(params: Params, values_bk: Array, indices_bk: NDArray) -> Array:
    x_hat_bd = np.tile(params["b_dec_d"], (len(values_bk), 1))
    for row in range(values_bk.shape[0]):
        for value, latent in zip(values_bk[row], indices_bk[row], strict=True):
            x_hat_bd[row] += value * params["w_dec_ld"][latent]
    return x_hat_bd


# Losses and gradients -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Forward:
    """Everything one forward pass computes; `residual_bd` is a constant to AuxK."""

    z_bl: Array
    x_hat_bd: Array
    residual_bd: Array
    z_aux_bl: Array
    aux_hat_bd: Array
    main: float
    aux: float
    total: float


def loss_scale(sample_bd: Array) -> float:
    """1 / the mean square error of predicting the mean of (normalised) rows."""
    return float(1 / np.mean((sample_bd - sample_bd.mean(axis=0)) ** 2))


def main_loss(x_hat_bd: Array, x_bd: Array, scale: float) -> float:
    """scale * mean square error; with `loss_scale` of the data, this is nmse."""
    return float(scale * ((x_hat_bd - x_bd) ** 2).sum() / x_bd.size)


def aux_loss(residual_bd: Array, aux_hat_bd: Array, any_dead: bool) -> float:
    """The residual's unexplained variance, about its own batch mean.

    0 when no latent is dead, and when the quotient is no finite number: the residual
    does not vary (0/0, or x/0), or something overflowed before.
    """
    variation = ((residual_bd - residual_bd.mean(axis=0)) ** 2).sum()
    if not any_dead or variation == 0:
        return 0.0
    loss = float(((residual_bd - aux_hat_bd) ** 2).sum() / variation)
    return loss if np.isfinite(loss) else 0.0


def forward(
    params: Params,
    x_bd: Array,
    dead_l: NDArray,
    settings: Settings,
    residual_bd: Array | None = None,
) -> Forward:
    """Both losses. `residual_bd` freezes the residual, as stop-gradient does."""
    pre_bl = pre_activations(params, x_bd, settings.subtract_b_dec)
    z_bl = chosen_values(pre_bl, choose(pre_bl, settings.k))
    x_hat_bd = z_bl @ params["w_dec_ld"] + params["b_dec_d"]
    if residual_bd is None:
        residual_bd = x_bd - x_hat_bd
    z_aux_bl = chosen_values(pre_bl, choose(pre_bl, settings.k_aux, among_l=dead_l))
    aux_hat_bd = z_aux_bl @ params["w_dec_ld"]
    main = main_loss(x_hat_bd, x_bd, settings.loss_scale)
    aux = aux_loss(residual_bd, aux_hat_bd, bool(dead_l.any()))
    total = main + settings.aux_coefficient * aux
    return Forward(z_bl, x_hat_bd, residual_bd, z_aux_bl, aux_hat_bd, main, aux, total)


def main_gradients(
    params: Params, x_bd: Array, dead_l: NDArray, settings: Settings
) -> Params:
    """Gradients of the main loss alone."""
    out = forward(params, x_bd, dead_l, settings)
    g_bd = 2 * settings.loss_scale / x_bd.size * (out.x_hat_bd - x_bd)
    gradients = code_gradients(params, x_bd, out.z_bl, g_bd, settings)
    gradients["b_dec_d"] += g_bd.sum(axis=0)
    return gradients


def aux_gradients(
    params: Params, x_bd: Array, dead_l: NDArray, settings: Settings
) -> Params:
    """Gradients of aux_coefficient * AuxK alone; the residual is a constant."""
    out = forward(params, x_bd, dead_l, settings)
    g_bd = np.zeros_like(x_bd)
    if out.aux:
        variation = ((out.residual_bd - out.residual_bd.mean(axis=0)) ** 2).sum()
        error_bd = out.aux_hat_bd - out.residual_bd
        g_bd = settings.aux_coefficient * 2 * error_bd / variation
    return code_gradients(params, x_bd, out.z_aux_bl, g_bd, settings)


def gradients(
    params: Params, x_bd: Array, dead_l: NDArray, settings: Settings
) -> Params:
    main = main_gradients(params, x_bd, dead_l, settings)
    aux = aux_gradients(params, x_bd, dead_l, settings)
    return {name: main[name] + aux[name] for name in params}


def code_gradients(
    params: Params, x_bd: Array, z_bl: Array, g_bd: Array, settings: Settings
) -> Params:
    """Gradients through z @ w_dec, where g_bd is the gradient of that product."""
    g_pre_bl = (g_bd @ params["w_dec_ld"].T) * (z_bl > 0)
    gradients = pre_gradients(params, x_bd, g_pre_bl, settings)
    return gradients | {"w_dec_ld": z_bl.T @ g_bd}


def pre_gradients(
    params: Params, x_bd: Array, g_pre_bl: Array, settings: Settings
) -> Params:
    """Gradients through the pre-activations, where g_pre_bl is theirs."""
    b_dec_d = params["b_dec_d"]
    x_in_bd = x_bd - b_dec_d if settings.subtract_b_dec else x_bd
    gradients = {"w_enc_ld": g_pre_bl.T @ x_in_bd, "b_dec_d": np.zeros_like(b_dec_d)}
    if settings.subtract_b_dec:
        gradients["b_dec_d"] -= g_pre_bl.sum(axis=0) @ params["w_enc_ld"]
    if "b_enc_l" in params:
        gradients["b_enc_l"] = g_pre_bl.sum(axis=0)
    return gradients


# One step -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class State:
    """What a run carries from step to step."""

    params: Params
    mean: Params
    mean_square: Params
    ema: Params
    steps_since_l: NDArray
    n_steps: int = 0


def initial_state(params: Params) -> State:
    zeros = {name: np.zeros_like(value) for name, value in params.items()}
    return State(params, zeros, zeros, zeros, np.zeros(len(params["w_dec_ld"]), int))


def train_step(state: State, x_bd: Array, settings: Settings) -> tuple[State, Forward]:
    """One step of the TopK SAE.

    A latent is dead or not by its counter before the step.
    """
    dead_l = is_dead(state.steps_since_l, settings.dead_after_steps)
    out = forward(state.params, x_bd, dead_l, settings)
    g = gradients(state.params, x_bd, dead_l, settings)
    return update(state, g, fires(out.z_bl, settings), settings), out


def update(
    state: State, gradients: Params, fired_l: NDArray, settings: Settings
) -> State:
    """Projection, clipping, Adam, unit rows, weight average, firing counters."""
    g = dict(gradients)
    if settings.unit_norm:
        g["w_dec_ld"] = project_rows(g["w_dec_ld"], state.params["w_dec_ld"])
    if settings.clip_norm is not None:
        g = clip(g, settings.clip_norm)
    steps_since_l = update_firing(state.steps_since_l, fired_l)
    new = State({}, {}, {}, {}, steps_since_l, state.n_steps + 1)
    for name, value in state.params.items():
        moments = state.mean[name], state.mean_square[name]
        value, new.mean[name], new.mean_square[name] = adam(
            value, g[name], *moments, new.n_steps, settings
        )
        is_unit = settings.unit_norm and name == "w_dec_ld"
        new.params[name] = unit_norm_rows(value) if is_unit else value
        new.ema[name] = ema_update(
            state.ema[name], new.params[name], settings.ema_decay
        )
    return new


def fires(z_bl: Array, settings: Settings) -> NDArray:
    """Which latents fired in any row."""
    return np.asarray((z_bl > settings.firing_threshold).any(axis=0))


def clip(gradients: Params, clip_norm: float) -> Params:
    """The gradients made no longer than `clip_norm`, as one vector."""
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    return {name: g * clip_norm / max(norm, clip_norm) for name, g in gradients.items()}


def warm_up(n_done: int, n_steps: int) -> float:
    """The share of the full value after `n_done` steps; no steps: at once."""
    return min(1.0, (n_done + 1) / n_steps) if n_steps else 1.0


def learning_rate(n_done: int, settings: Settings) -> float:
    """Warmed up linearly and, at the run's end, lowered linearly to 0."""
    rate = settings.learning_rate * warm_up(n_done, settings.warmup_steps)
    if settings.decay_steps:
        rate *= min(1.0, (settings.n_steps - n_done) / settings.decay_steps)
    return rate


def project_rows(g_ld: Array, w_ld: Array) -> Array:
    """g without its component along each row of w (any length but 0)."""
    along_l1 = (g_ld * w_ld).sum(axis=1, keepdims=True)
    return g_ld - along_l1 / (w_ld**2).sum(axis=1, keepdims=True) * w_ld


def unit_norm_rows(w_ld: Array) -> Array:
    return w_ld / np.sqrt((w_ld**2).sum(axis=1, keepdims=True))


def adam(
    value: Array,
    gradient: Array,
    mean: Array,
    mean_square: Array,
    n_steps: int,
    settings: Settings,
) -> tuple[Array, Array, Array]:
    """(value, mean, mean_square) after step number `n_steps`, the first being 1."""
    mean = settings.b1 * mean + (1 - settings.b1) * gradient
    mean_square = settings.b2 * mean_square + (1 - settings.b2) * gradient**2
    mean_hat = mean / (1 - settings.b1**n_steps)
    mean_square_hat = mean_square / (1 - settings.b2**n_steps)
    change = mean_hat / (np.sqrt(mean_square_hat) + settings.eps)
    rate = learning_rate(n_steps - 1, settings)
    return value - rate * change, mean, mean_square


def ema_update(ema: Array, value: Array, decay: float) -> Array:
    """The zero-initialised running average of `value`."""
    return decay * ema + (1 - decay) * value


def ema_read(ema: Array, decay: float, n_steps: int) -> Array:
    """The average without its bias to the zero start."""
    return ema / (1 - decay**n_steps)


def update_firing(steps_since_l: NDArray, fired_l: NDArray) -> NDArray:
    """Steps since each latent last fired: 0 after a step in which it did."""
    return np.where(fired_l, 0, steps_since_l + 1)


def is_dead(steps_since_l: NDArray, dead_after_steps: int) -> NDArray:
    return np.asarray(steps_since_l >= dead_after_steps)


# Initialisation -----------------------------------------------------------------------


def geometric_median(rows_bd: Array, n_iterations: int = 1000) -> Array:
    """The point of least summed distance to the rows (Weiszfeld, from the mean)."""
    median_d = rows_bd.mean(axis=0)
    for _ in range(n_iterations):
        distance_b = np.sqrt(((rows_bd - median_d) ** 2).sum(axis=1))
        weight_b = 1 / np.maximum(distance_b, NORM_FLOOR)
        median_d = (weight_b @ rows_bd) / weight_b.sum()
    return median_d


def encoder_rescale(params: Params, unit_bd: Array, settings: Settings) -> Array:
    """w_enc_ld that rebuilds unit vectors about b_dec at unit length on average.

    For the code at initialisation: TopK, without an encoder bias.
    """
    start = {name: a for name, a in params.items() if name != "b_enc_l"}
    x_bd = params["b_dec_d"] + unit_bd
    code = encode(start, x_bd, settings.k, settings.subtract_b_dec)
    from_b_dec_bd = decode(start, *code) - params["b_dec_d"]
    return params["w_enc_ld"] / np.sqrt((from_b_dec_bd**2).sum(axis=1)).mean()
