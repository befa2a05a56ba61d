"""Logistic probes in plain float64 NumPy and SciPy, one at a time."""

import numpy as np
from scipy.optimize import minimize

RIDGE = 1e-4


def fit(features_nd, labels_n, weights_n=None, ridge=RIDGE):
    """Slope [D], intercept, and the loss without ridge."""
    features_nd = np.asarray(features_nd, np.float64)
    if features_nd.ndim == 1:
        features_nd = features_nd[:, None]
    y = np.asarray(labels_n, np.float64)
    m = np.ones(len(y)) if weights_n is None else np.asarray(weights_n, np.float64)
    m = m / m.sum()
    mean_d = m @ features_nd
    deviation_d = np.sqrt(m @ (features_nd - mean_d) ** 2)
    deviation_d = np.where(deviation_d < 1e-6, np.inf, deviation_d)
    x = (features_nd - mean_d) / deviation_d
    penalty = np.append(np.full(x.shape[1], ridge), RIDGE)

    def evaluate(at):
        t = x @ at[:-1] + at[-1]
        error = m * (1 / (1 + np.exp(-t)) - y)
        gradient = np.append(error @ x, error.sum()) + penalty * at
        return m @ log_loss(t, y) + 0.5 * penalty @ at**2, gradient

    start = np.zeros(x.shape[1] + 1)
    found = minimize(evaluate, start, jac=True, method="BFGS", options={"gtol": 1e-9})
    slope_d = found.x[:-1] / deviation_d
    intercept = found.x[-1] - slope_d @ mean_d
    return slope_d, intercept, m @ log_loss(x @ found.x[:-1] + found.x[-1], y)


def log_loss(logits_n, labels_n):
    """Nats of each row."""
    return np.logaddexp(0, np.where(np.asarray(labels_n) > 0, -logits_n, logits_n))
