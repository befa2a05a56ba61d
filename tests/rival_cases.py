"""Settings, parameters and rows that the tests of the rivals' oracle share."""

import dataclasses

import numpy as np
import oracle

B, D, L, K = 16, 12, 32, 6
SETTINGS = oracle.Settings(
    k=K,
    k_aux=8,
    loss_scale=1.7,
    aux_coefficient=0.3,
    sparsity_coefficient=0.2,
    bandwidth=0.4,
)
N_DEAD = 12
DEAD_L = np.random.default_rng(2).permutation(L) < N_DEAD
THRESHOLD = 0.7  # BatchTopK's running one

# Architecture, settings, and parameters that a synthetic gradient reaches.
CASES = {
    "relu": ("relu", {}, ()),
    "relu without subtraction": ("relu", {"subtract_b_dec": False}, ()),
    "relu_decoder_norm": ("relu_decoder_norm", {"subtract_b_dec": False}, ()),
    "prolu": ("prolu", {"subtract_b_dec": False}, ("w_enc_ld", "b_enc_l")),
    "gated": ("gated", {}, ()),
    "gated without subtraction": ("gated", {"subtract_b_dec": False}, ()),
    "jumprelu": ("jumprelu", {}, ("threshold_l",)),
    "jumprelu, target": ("jumprelu", {"target_l0": 9.0}, ("threshold_l",)),
    "jumprelu, no band": ("jumprelu", {"bandwidth": 1e-7, "target_l0": 9.0}, ()),
    "topk": ("topk", {}, ()),
    "multi-topk": ("topk", {"multi_topk": True}, ()),
    "matryoshka": ("topk", {"prefixes": (4, 12, L)}, ()),
    "norm-weighted": ("topk", {"norm_weighted": True}, ()),
    "all of topk": (
        "topk",
        {"multi_topk": True, "prefixes": (4, L), "norm_weighted": True},
        (),
    ),
    "batch_topk": ("batch_topk", {}, ()),
    "batch_topk, matryoshka": ("batch_topk", {"prefixes": (4, 12, L)}, ()),
}


def make_params(
    architecture: str, seed: int = 0, use_b_enc: bool = True
) -> oracle.Params:
    """Decoder rows of any length: nothing of a loss needs them to have unit norm."""
    rng = np.random.default_rng(seed)
    params = {
        "w_enc_ld": rng.normal(size=(L, D)),
        "w_dec_ld": rng.normal(size=(L, D)) / np.sqrt(D),
        "b_dec_d": 0.3 * rng.normal(size=D),
    }
    biases = ("b_enc_l",) if use_b_enc else ()
    if architecture == "gated":
        biases = ("b_gate_l", "b_mag_l", "r_mag_l")
    params |= {name: 0.5 * rng.normal(size=L) for name in biases}
    if architecture == "jumprelu":
        params["threshold_l"] = 0.5 * rng.normal(size=L)
    if architecture == "batch_topk":
        params["threshold"] = np.array(THRESHOLD)
    return params


def make_rows(seed: int = 1, n_rows: int = B) -> oracle.Array:
    return np.random.default_rng(seed).normal(size=(n_rows, D))


def make_settings(**changes) -> oracle.Settings:
    return dataclasses.replace(SETTINGS, **changes)
