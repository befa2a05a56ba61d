"""Logistic probes by Newton's method: one for each of many features, or one of all.

Over rows with label y and weight m, of sum 1, and with t = w·x + b, p = σ(t) and
s = p (1 - p),

    J        = sum m (ln(1 + e^t) - y t) + λ |w|^2 / 2 + λ_b b^2 / 2
    gradient = [sum m (p - y) x, sum m (p - y)] + [λ w, λ_b b]
    Hessian  = [sum m s x x^T, sum m s x; sum m s x^T, sum m s] + diag(λ, λ_b)

where x is standardised: of mean 0 and variance 1 over the weighted rows, so that
shifting or scaling a feature changes nothing. λ_b is RIDGE, and λ too unless given.

A whole step of Newton can go too far. Where J rises at the end of a step by more than
a part of its fall at the start, the step is cut at the zero of the line through both
slopes. No logarithm is needed to tell, for slopes are gradients times steps.

Source: Gao et al. 2024 (arXiv:2406.04093), section 4.2, fits such probes by Newton's
method; the care with its steps is ours.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.sparse.linalg import cg

RIDGE = 1e-4
_MAX_EVALUATIONS = 25  # of gradient and Hessian; 10 are enough for most
_LEAST_GAIN = 1e-8  # nats: steps that promise less are not taken
_LONGEST = 8.0  # a step in any parameter, where the Hessian all but vanishes
_STEEPEST_RISE = 0.25  # relative to the fall at the start of a step
_STEP_ERROR = 1e-2  # of the linear system of a step, relative to the gradient
_MAX_PRODUCTS = 100  # of the Hessian with a vector, for a step
_CONSTANT = 1e-6  # deviation relative to size; what is below is rounding

# Gradient, and the step of Newton, both [parameters, ...].
Derive = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
# Evaluations, parameters, the fall at the start of the next step, and that step.
_State = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe:
    """The logit slope · feature + intercept, and its mean loss in nats, without ridge.

    With a probe for each feature all are [F]; of all features slope is [D] and the rest
    are scalars.
    """

    slope: jax.Array
    intercept: jax.Array
    loss: jax.Array


def fit_each(
    features_nf: jax.Array, labels_n: jax.Array, weights_n: jax.Array
) -> Probe:
    """A probe for each feature by itself.

    Rows of weight 0 do not count, but must be finite. A constant feature has slope 0.
    A feature with a NaN has a loss of NaN, and leaves the others alone.
    """
    x_nf, m_n, mean_f, deviation_f = _standardise(features_nf, weights_n)
    m_n1, y_n1 = m_n[:, None], labels_n.astype(x_nf.dtype)[:, None]

    def derive(at_2f: jax.Array) -> tuple[jax.Array, jax.Array]:
        p_nf = jax.nn.sigmoid(x_nf * at_2f[0] + at_2f[1])
        error_nf, s_nf = m_n1 * (p_nf - y_n1), m_n1 * p_nf * (1 - p_nf)
        sx_nf = s_nf * x_nf
        g_w_f = jnp.sum(error_nf * x_nf, axis=0) + RIDGE * at_2f[0]
        g_b_f = jnp.sum(error_nf, axis=0) + RIDGE * at_2f[1]
        h_ww_f = jnp.sum(sx_nf * x_nf, axis=0) + RIDGE
        h_wb_f = jnp.sum(sx_nf, axis=0)
        h_bb_f = jnp.sum(s_nf, axis=0) + RIDGE
        step_2f = jnp.stack(
            [h_wb_f * g_b_f - h_bb_f * g_w_f, h_wb_f * g_w_f - h_ww_f * g_b_f]
        )
        determinant_f = h_ww_f * h_bb_f - h_wb_f * h_wb_f
        return jnp.stack([g_w_f, g_b_f]), step_2f / determinant_f

    slope_f, intercept_f = _minimise(derive, jnp.zeros_like(x_nf[:2]))
    loss_f = _mean_loss(x_nf * slope_f + intercept_f, y_n1, m_n1)
    slope_f = slope_f / deviation_f
    return Probe(slope_f, intercept_f - slope_f * mean_f, loss_f)


def fit_together(
    features_nd: jax.Array,
    labels_n: jax.Array,
    weights_n: jax.Array,
    ridge: float | jax.Array = RIDGE,
) -> Probe:
    """One probe of all features; λ is `ridge`.

    Rows of weight 0 do not count, but must be finite. Steps are found by conjugate
    gradients, so nothing of size [D, D] is held.
    """
    x_nd, m_n, mean_d, deviation_d = _standardise(features_nd, weights_n)
    y_n = labels_n.astype(x_nd.dtype)
    x_nc = jnp.concatenate([x_nd, jnp.ones_like(y_n)[:, None]], axis=1)
    ridge_c = jnp.full(x_nc.shape[1], ridge, x_nc.dtype).at[-1].set(RIDGE)

    def derive(at_c: jax.Array) -> tuple[jax.Array, jax.Array]:
        p_n = jax.nn.sigmoid(_multiply(x_nc, at_c))
        gradient_c = _multiply(m_n * (p_n - y_n), x_nc) + ridge_c * at_c
        s_n = m_n * p_n * (1 - p_n)

        def curve(step_c: jax.Array) -> jax.Array:
            return _multiply(s_n * _multiply(x_nc, step_c), x_nc) + ridge_c * step_c

        # A rough step is enough, since the next begins where it ends.
        step_c, _ = cg(curve, -gradient_c, tol=_STEP_ERROR, maxiter=_MAX_PRODUCTS)
        return gradient_c, step_c

    at_c = _minimise(derive, jnp.zeros_like(ridge_c))
    loss = _mean_loss(_multiply(x_nc, at_c), y_n, m_n)
    slope_d = at_c[:-1] / deviation_d
    return Probe(slope_d, at_c[-1] - jnp.sum(slope_d * mean_d), loss)


def _standardise(
    features_nf: jax.Array, weights_n: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Features of mean 0 and variance 1, and the weights m of sum 1 that say so.

    Also what was taken off each feature, and what it was divided by then. Constant ones
    become 0, divided by 1.
    """
    m_n = weights_n.astype(features_nf.dtype) / jnp.sum(weights_n)
    mean_f = jnp.sum(m_n[:, None] * features_nf, axis=0)
    centred_nf = features_nf - mean_f
    size_f = jnp.sqrt(jnp.sum(m_n[:, None] * jnp.square(features_nf), axis=0))
    deviation_f = jnp.sqrt(jnp.sum(m_n[:, None] * jnp.square(centred_nf), axis=0))
    is_constant_f = deviation_f <= _CONSTANT * size_f
    deviation_f = jnp.where(is_constant_f, 1, deviation_f)
    x_nf = jnp.where(is_constant_f, 0, centred_nf / deviation_f)
    return x_nf, m_n, mean_f, deviation_f


def _minimise(derive: Derive, start_p: jax.Array) -> jax.Array:
    """Where convex functions are least; all of a batch [P, ...] take steps at once."""

    def bound(step_p: jax.Array) -> jax.Array:
        return step_p * jnp.minimum(1, _LONGEST / jnp.max(jnp.abs(step_p), axis=0))

    def move(state: _State) -> _State:
        count, at_p, fall, step_p = state
        trial_p = at_p + step_p
        gradient_p, next_p = derive(trial_p)
        next_p = bound(next_p)
        rise = jnp.sum(gradient_p * step_p, axis=0)
        # Not so for a NaN, which leaves the parameters where they were.
        is_taken = rise <= _STEEPEST_RISE * fall
        cut = jnp.clip(fall / (fall + rise), 0.1, 0.9)
        return (
            count + 1,
            jnp.where(is_taken, trial_p, at_p),
            jnp.where(is_taken, -jnp.sum(gradient_p * next_p, axis=0), cut * fall),
            jnp.where(is_taken, next_p, cut * step_p),
        )

    def is_moving(state: _State) -> jax.Array:
        count, _, fall, _ = state
        # Half of the fall is what a step gains where J is a parabola.
        return (count < _MAX_EVALUATIONS) & jnp.any(fall / 2 > _LEAST_GAIN)

    gradient_p, step_p = derive(start_p)
    step_p = bound(step_p)
    fall = -jnp.sum(gradient_p * step_p, axis=0)
    start = (jnp.int32(1), start_p, fall, step_p)
    return lax.while_loop(is_moving, move, start)[1]


def _mean_loss(logits_n: jax.Array, y_n: jax.Array, m_n: jax.Array) -> jax.Array:
    wrong_n = jnp.where(y_n > 0, -logits_n, logits_n)
    return jnp.sum(m_n * jax.nn.softplus(wrong_n), axis=0)


def _multiply(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
