"""Configs: JSON round trip, overrides from the command line, derived values."""

import dataclasses
import json
import subprocess
import sys

import pytest

from sae_jax import config as configs
from sae_jax.config import DataConfig, OptimizerConfig, SaeConfig, TrainConfig

# Runs the real command once for each list of arguments, but trains nothing. In one
# process a flag can be given to one command only.
DRIVER = '''
import contextlib, io, json, sys
from sae_jax import cli, config, loop

def show(config_of_run, workdir, profile_steps=None):
    print(config.to_json(config.checked(config_of_run)))

loop.train = show
for arguments in json.load(sys.stdin):
    sys.argv = ["sae-jax", "train", "--workdir=run", "--config=run.py", *arguments]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main()
    print(json.dumps(out.getvalue().rpartition("trained:")[0]))
'''
RUN = '''
from sae_jax.config import SaeConfig, TrainConfig
def get_config(): return TrainConfig(sae=SaeConfig(n_latents=128))
'''


def test_checked_sees_what_was_set_after_construction():
    config = TrainConfig()
    config.sae.k = config.sae.n_latents + 1
    with pytest.raises(ValueError, match="sae.k"):
        configs.checked(config)


@pytest.mark.parametrize(
    "sae",
    [
        dict(k=2, d_model=8),
        dict(k=2, prefixes=(8, 16, 32), norm_weighted=True),
        dict(architecture="jumprelu", sparsity_coefficient=0.5, target_l0=3.0),
    ],
)
def test_json_round_trip(sae):
    sae = SaeConfig(n_latents=32, **sae)
    config = TrainConfig(sae, OptimizerConfig(clip_norm=1.0), seed=7)
    read = configs.from_json(TrainConfig, configs.to_json(config), "x")
    assert read == config
    assert hash(read) == hash(config)  # so that compiled steps are found again


def test_fields_that_a_file_lacks_have_their_defaults():
    assert configs.from_json(TrainConfig, '{"seed": 3}', "x") == TrainConfig(seed=3)


def test_overrides_of_the_command_line_reach_the_run(tmp_path):
    """Where a field of another architecture is needed, and where it is a tuple."""
    overrides = [
        {"sae.architecture": "relu", "sae.sparsity_coefficient": "0.1"},
        {"sae.prefixes": "16,64,128", "optimizer.clip_norm": "1"},
    ]
    relu, matryoshka = _override(tmp_path, RUN, overrides)
    start = SaeConfig(n_latents=128)
    change = dict(architecture="relu", sparsity_coefficient=0.1)
    assert relu == TrainConfig(dataclasses.replace(start, **change))
    sae = dataclasses.replace(start, prefixes=(16, 64, 128))
    assert matryoshka == TrainConfig(sae, OptimizerConfig(clip_norm=1.0))


def test_a_tuple_may_be_set_back_to_the_empty_one(tmp_path):
    nested = RUN.replace("128", "128, prefixes=(16, 128)")
    (flat,) = _override(tmp_path, nested, [{"sae.prefixes": "()"}])
    assert flat == TrainConfig(SaeConfig(n_latents=128))


def _override(folder, file: str, overrides: list[dict[str, str]]) -> list[TrainConfig]:
    """The configs that `sae-jax train` gets from a config file and these overrides."""
    (folder / "run.py").write_text(file)
    cases = [[f"--config.{n}={v}" for n, v in case.items()] for case in overrides]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(cases),
        text=True,
        capture_output=True,
        cwd=folder,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    texts = map(json.loads, done.stdout.splitlines())
    return [configs.from_json(TrainConfig, text, "x") for text in texts]


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


def test_k_falls_in_stages_that_share_the_rows_evenly():
    config = _annealing(k=3, k_start=24, k_anneal_rows=64 * 12, rows=64 * 20)
    k_of_steps = [config.k_at(step) for step in range(config.n_steps)]
    assert k_of_steps == [24] * 4 + [12] * 4 + [6] * 4 + [3] * 8


@pytest.mark.parametrize("k, k_start", [(3, 4), (5, 64), (1, 2), (7, 63), (32, 64)])
@pytest.mark.parametrize("n_anneal_steps", [1, 10, 37])
def test_k_never_rises_and_ends_where_it_is_trained(k, k_start, n_anneal_steps):
    config = _annealing(k, k_start, k_anneal_rows=64 * n_anneal_steps, rows=64 * 40)
    k_of_steps = [config.k_at(step) for step in range(config.n_steps)]
    assert k_of_steps[0] == k_start
    assert all(a >= b for a, b in zip(k_of_steps, k_of_steps[1:]))
    assert set(k_of_steps[n_anneal_steps:]) == {k}
    assert k not in k_of_steps[:n_anneal_steps]
    assert set(k_of_steps) <= {k, *(k_start >> n for n in range(7))}


def test_k_stays_without_annealing():
    config = TrainConfig(rows=64 * 2048, dead_after_rows=2048)
    assert {config.k_at(step) for step in range(64)} == {32}


def _annealing(k: int, k_start: int, k_anneal_rows: int, rows: int) -> TrainConfig:
    return TrainConfig(
        sae=SaeConfig(n_latents=64, k=k),
        data=DataConfig(batch_rows=64),
        rows=rows,
        dead_after_rows=64,
        k_start=k_start,
        k_anneal_rows=k_anneal_rows,
    )


def test_durations_in_rows_become_whole_steps():
    """The paper's 10 M tokens at 131,072 a step are 76 steps."""
    paper = TrainConfig(data=DataConfig(batch_rows=131_072))
    assert (paper.dead_after_rows, paper.dead_after_steps) == (10_000_000, 76)
    assert paper.n_steps == 762
    few = TrainConfig(dead_after_rows=1, sparsity_warmup_rows=0)
    assert few.dead_after_steps == few.sparsity_warmup_steps == 1


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


def test_settings_reach_every_leaf_and_say_what_they_mean():
    settings = configs.settings_of(TrainConfig)
    assert {"sae.k", "data.lanes", "seed"} <= set(settings)
    leaves = str(dataclasses.asdict(TrainConfig())).count(": ") - 5  # five groups
    assert len(settings) == leaves
    for name, field in settings.items():
        meaning, given = field.metadata["meaning"], name == "sae.sparsity_coefficient"
        assert meaning and (field.default is not None or "None: " in meaning or given)
        assert not field.metadata["choices"] or field.default in (
            None,
            *field.metadata["choices"],
        )
        assert set(field.metadata["only"]) < set(configs.ARCHITECTURES)


def test_what_is_changed_is_named_with_its_value():
    assert configs.changed(TrainConfig()) == {}
    sae = SaeConfig(architecture="jumprelu", sparsity_coefficient=0.5, use_b_enc=False)
    config = TrainConfig(sae, OptimizerConfig(clip_norm=2), seed=3)
    assert configs.changed(config) == {
        "sae.architecture": "jumprelu",
        "sae.use_b_enc": False,
        "sae.sparsity_coefficient": 0.5,
        "optimizer.clip_norm": 2.0,
        "seed": 3,
    }


@pytest.mark.parametrize(
    "fields, expected",
    [
        (dict(k=3), dict(k=3)),
        (dict(architecture="batch_topk", k=3), dict(k=3)),
        (
            dict(architecture="relu", sparsity_coefficient=0.5),
            dict(sparsity_coefficient=0.5),
        ),
        (
            dict(architecture="jumprelu", sparsity_coefficient=0, target_l0=9),
            dict(sparsity_coefficient=0, target_l0=9),
        ),
    ],
)
def test_what_says_how_sparse_codes_are(fields, expected):
    assert configs.sparsity(SaeConfig(**fields)) == expected
