"""Configs: field checks, JSON round trip, derived values."""

import dataclasses

import pytest

from sae_jax import config as configs
from sae_jax.config import DataConfig, OptimizerConfig, SaeConfig, TrainConfig


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SaeConfig(k=65, n_latents=64), "sae.k = 65 is more than .* = 64"),
        (lambda: SaeConfig(k=0), "sae.k = 0: must be at least 1"),
        (lambda: SaeConfig(normalization="layernorm"), "did you mean 'layer_norm'"),
        (lambda: SaeConfig(architecture="tpok"), "did you mean 'topk'"),
        (lambda: DataConfig(batch_rows=10, lanes=4), "10 is not a multiple .* = 4"),
        (lambda: OptimizerConfig(learning_rate=-1.0), "must be above 0"),
        (lambda: OptimizerConfig(ema_decay=1.0), r"must be in \[0, 1\)"),
        (lambda: TrainConfig(rows=5), "rows = 5 is less than one batch"),
        (lambda: TrainConfig(rows=1e6), "rows = 1000000.0 is not of type int"),
        (lambda: SaeConfig(k="32"), "sae.k = '32' is not of type int"),
        (lambda: TrainConfig(sae=None), "sae = None is not of type SaeConfig"),
        (lambda: OptimizerConfig(learning_rate=float("nan")), "must be finite"),
        (lambda: OptimizerConfig(eps=-1.0), "optimizer.eps = -1.0: must be at least"),
    ],
)
def test_bad_fields_are_refused_with_their_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_checked_sees_what_was_set_after_construction():
    config = TrainConfig()
    config.sae.k = config.sae.n_latents + 1
    with pytest.raises(ValueError, match="sae.k"):
        configs.checked(config)


def test_json_round_trip():
    config = TrainConfig(sae=SaeConfig(d_model=8, n_latents=32, k=2), seed=7)
    assert configs.from_json(TrainConfig, configs.to_json(config), "x") == config


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"sae": {"kk": 3}}', "x.json: unknown field 'sae.kk': did you mean 'k'"),
        ('{"seed": 1.5}', "x.json: seed = 1.5 is not of type int"),
        ('{"seed": ', "x.json: "),
        ("[]", "not a JSON object"),
    ],
)
def test_bad_json_names_file_and_field(text, message):
    with pytest.raises(ValueError, match=message):
        configs.from_json(TrainConfig, text, "x.json")


def test_learning_rate_follows_the_rule_unless_set():
    config = TrainConfig(sae=SaeConfig(n_latents=2**16))
    assert configs.learning_rate(config) == pytest.approx(1e-4)
    config.optimizer.learning_rate = 0.5
    assert configs.learning_rate(config) == 0.5


@pytest.mark.parametrize("d_model, expected", [(256, 128), (768, 512), (12, 8), (1, 1)])
def test_k_aux_is_the_power_of_two_nearest_to_half_the_width(d_model, expected):
    assert configs.k_aux(SaeConfig(), d_model) == expected


def test_k_aux_is_at_most_the_latents():
    assert configs.k_aux(SaeConfig(n_latents=64, k=4), 4096) == 64


def test_field_names_reach_every_leaf():
    names = configs.field_names(TrainConfig)
    assert {"sae.k", "data.lanes", "seed"} <= set(names)
    leaves = str(dataclasses.asdict(TrainConfig())).count(": ") - 4  # four groups
    assert len(names) == leaves
