"""Runs in which K or the learning rate changes: what they compile, write and resume."""

import jax
import numpy as np
import pytest
import synthetic

from sae_jax import loop, run, writers
from sae_jax.config import MeshConfig, OptimizerConfig, SaeConfig
from sae_jax.step import make_step

ONE = MeshConfig(1, 1)


@pytest.fixture
def steps_made(monkeypatch):
    """K of each step that is compiled."""
    made = []

    def make_and_watch(setup):
        made.append(setup.config.sae.k)
        return make_step(setup)

    monkeypatch.setattr(loop, "make_step", make_and_watch)
    return made


def _column(workdir, name: str) -> list[float]:
    return [row[name] for row in writers.read_json_lines(workdir / "metrics.jsonl")]


def test_k_is_annealed_in_stages_and_a_stopped_run_goes_on_to_the_same_bits(
    steps_made, planted_store, tmp_path
):
    """12 steps: K is 6 for six of them, and then 3; step 4 was saved."""
    annealing = dict(k_start=6, k_anneal_rows=6 * 64, rows=12 * 64)
    annealing |= dict(mesh=ONE, checkpoint_every_steps=4)
    config = synthetic.make_config(planted_store, **annealing)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = jax.device_get(loop.train(config, whole))
    assert steps_made == [6, 3]
    # Every latent that is chosen fires, but where fewer than K are positive.
    for l0, k in zip(_column(whole, "l0"), [6] * 6 + [3] * 6, strict=True):
        assert k / 2 < l0 <= k
    assert run.load(whole).config.k == run.read_config(whole).sae.k == 3
    with pytest.raises(synthetic.Killed):
        loop.train(config, stopped, synthetic.KillAt(6))
    assert run.locate(stopped) == (stopped, 4)
    del steps_made[:]
    final = jax.device_get(loop.train(config, stopped))
    assert steps_made == [6, 3]
    jax.tree.map(np.testing.assert_array_equal, final, expected)
    for name in ("loss", "l0", "n_dead"):
        assert _column(stopped, name) == _column(whole, name)


def test_a_run_whose_rate_falls_to_its_end_keeps_its_length(planted_store, tmp_path):
    """Without a fall it can be made longer: tests/test_loop.py."""
    schedule = dict(learning_rate=1e-3, warmup_rows=2 * 64, decay_rows=4 * 64)
    fields = dict(mesh=ONE, optimizer=OptimizerConfig(**schedule))
    config = synthetic.make_config(planted_store, **fields, rows=10 * 64)
    loop.train(config, tmp_path)
    want = [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    rates = _column(tmp_path, "learning_rate")
    assert rates == pytest.approx([1e-3 * share for share in want], rel=1e-6)
    longer = synthetic.make_config(planted_store, **fields, rows=20 * 64)
    message = "rows = 640, now 1280 is asked: .* as optimizer.decay_rows counts from"
    with pytest.raises(ValueError, match=message):
        loop.train(longer, tmp_path)
    loop.train(config, tmp_path)  # the same is no other run


def test_a_penalty_is_warmed_up_over_the_rows_asked_for(planted_store, tmp_path):
    """Nothing moves at this learning rate, so the penalty is seen by itself."""
    config = synthetic.make_config(
        planted_store,
        mesh=ONE,
        sae=SaeConfig(architecture="relu", n_latents=128, sparsity_coefficient=1.0),
        optimizer=OptimizerConfig(learning_rate=1e-12),
        rows=6 * 64,
        sparsity_warmup_rows=4 * 64,
    )
    loop.train(config, tmp_path)
    penalty = np.array(_column(tmp_path, "sparsity_loss"))
    shares = penalty / penalty[-2:].mean()
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.75, 1, 1, 1], rtol=0.1)
