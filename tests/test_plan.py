"""The analytic model by hand, the mesh rule, what fits, and the command."""

import dataclasses
import itertools
import json
import subprocess
import sys

import jax
import pytest

from sae_jax import plan
from sae_jax.config import DataConfig, MeshConfig, SaeConfig, TrainConfig
from sae_jax.mesh import DATA, LATENT, make_mesh
from sae_jax.plan import ask, chips, limits, memory, parse, rule, traffic
from sae_jax.plan.compiler import compile_on
from sae_jax.plan.estimate import bytes_of, estimate, flops_of
from sae_jax.plan.step import Step, refusal
from sae_jax.plan.topology import Topology

AGREEMENT = 0.1
# None of them is a point that the model was made with.
POINTS = {
    "AuxK": ((1, 4), 4096, None, dict(n_latents=24_576, d_model=384, k=24)),
    "data shards": ((4, 2), 4096, None, dict(n_latents=65_536, d_model=128, k=16)),
    "no AuxK, exact": (
        (1, 1),
        1024,
        None,
        dict(
            n_latents=16_384, d_model=512, k=64, selection="exact", aux_coefficient=0.0
        ),
    ),
    "micro-batches": (
        (2, 2),
        16_384,
        4096,
        dict(n_latents=32_768, d_model=192, k=32),
    ),
    "Multi-TopK": (
        (2, 2),
        4096,
        None,
        dict(n_latents=16_384, d_model=512, k=16, multi_topk=True),
    ),
}


def make_config(rows=8192, microbatch_rows=None, mesh=MeshConfig(), **sae):
    sae = dict(n_latents=1024, d_model=64, k=8, selection="bucketed") | sae
    return TrainConfig(
        sae=SaeConfig(**sae),
        data=DataConfig(batch_rows=rows, microbatch_rows=microbatch_rows, lanes=8),
        mesh=mesh,
        rows=1000 * rows,
        dead_after_rows=100 * rows,
    )


@pytest.mark.parametrize(
    ("mesh_shape", "is_shared", "n_parts"),
    [((2, 4), None, 2), ((2, 4), False, 1), ((1, 4), None, 1), ((3, 4), None, 1)],
)
def test_state_is_eight_matrices_and_their_biases(mesh_shape, is_shared, n_parts):
    """Where 12 devices do not divide 1,024 latents, data shards share no optimizer."""
    config = make_config(24, mesh=MeshConfig(shard_optimizer=is_shared))
    spread, whole = 4 * (2 * 256 * 64 + 256), 4 * 64
    assert memory.state(Step(config, *mesh_shape, "tpu")) == {
        "parameters": spread + whole,
        "moments": 2 * (spread // n_parts + whole),
        "average": spread // n_parts + whole,
        "counters": 4 * 256,
        "batch": 2 * 24 // mesh_shape[0] * 64,
    }


def test_flops_and_traffic_are_those_of_the_equations():
    step = Step(make_config(aux_coefficient=0.0), 2, 4, "tpu")
    dense, sparse = 2 * 4096 * 256 * 64, 8 * 4096 * 8 * 64 // 4
    assert flops_of(step) == dense + sparse
    assert traffic.sent(step, LATENT) == pytest.approx(
        2 * 4 * 4096 * 64 * 3 / 4 + 4 * 4096 * 4 * 8 * 3 / 4
    )
    gradients = parameters = 8 * 256 * 64 + 4 * 256
    assert traffic.sent(step, DATA) == gradients + 4 * 256 + parameters / 2


def test_bytes_are_those_of_the_equations():
    config = make_config(aux_coefficient=0.0, compute_dtype="float32")
    alone, shared = Step(config, 1, 4, "cpu"), Step(config, 2, 4, "cpu")
    assert alone.own == shared.own == 256 and alone.choice.tile_rows == 1024
    kept = 8 * 256 * 64
    for step, n_tiles, optimizer in ((alone, 8, 9 * kept), (shared, 4, 5.5 * kept)):
        of_rows = 8 * 256 + 12 * 4 * 64 + 8 / 4 * 64 * (4 * 4 + 16)
        tiles = n_tiles * 4 * 256 * 64
        expected = step.rows * of_rows + tiles + optimizer + 2 * kept
        assert bytes_of(step) == expected


def test_dead_latents_cost_five_products_and_gradients_once_more():
    step = Step(make_config(), 2, 4, "tpu")
    dense = 2 * 4096 * 256 * 64
    assert flops_of(step, 0.25) - flops_of(step) == 5 * dense / 4
    more = traffic.sent(step, DATA) - traffic.sent(step, DATA, is_auxks=False)
    assert more == 8 * 256 * 64 + 4 * 256


def test_time_is_the_longer_of_compute_and_memory_and_the_network():
    chip = chips.Chip("x", "tpu", 1e9, 1e9, 1e9, 1e6, 1e6, 4, dimensions=2)
    step = Step(make_config(aux_coefficient=0.0), 1, 4, "tpu")
    cost = estimate(step, Topology("x", chip, 4))
    assert cost.compute_seconds == pytest.approx(flops_of(step) / 1e9)
    assert cost.network_seconds == pytest.approx(traffic.sent(step, LATENT) / 1e6)
    assert cost.bound == "network"
    assert cost.seconds == pytest.approx(
        max(cost.compute_seconds, cost.memory_seconds) + cost.network_seconds
    )
    half = estimate(step, Topology("x", chip, 4), efficiency=0.5)
    assert half.seconds == pytest.approx(2 * cost.seconds)


def test_between_machines_the_network_carries_a_part_of_what_links_do():
    chip = chips.Chip("x", "gpu", 1e9, 1e9, 1e9, 1e6, 1e3, 4)
    step = Step(make_config(aux_coefficient=0.0), 1, 8, "gpu")
    both = 2 * 4 * 8192 * 64 + 4 * 8192 * 8 * 8
    cost = estimate(step, Topology("x", chip, 8))
    expected = both * 3 / 4 / 1e6 + both / 4 * 1 / 2 / 1e3
    assert cost.network_seconds == pytest.approx(expected)


def test_all_devices_of_one_machine_are_linked():
    step = Step(make_config(aux_coefficient=0.0), 1, 4, "gpu")
    four, seven = (estimate(step, parse(f"gpu:{n}xh200")) for n in (4, 7))
    assert seven.network_seconds == four.network_seconds


@pytest.mark.parametrize("point", POINTS)
def test_the_model_agrees_with_the_cpus_compiler(point):
    mesh_shape, rows, part, sae = POINTS[point]
    config = make_config(rows, part, **sae)
    compiled = compile_on(config, make_mesh(MeshConfig(*mesh_shape)))
    step = Step(config, *mesh_shape, "cpu")
    ratio = memory.peak(step) / compiled.peak_bytes
    print(f"{point}: {ratio:.3f} of {compiled.peak_bytes / 2**20:.0f} MiB")
    assert compiled.argument_bytes == pytest.approx(
        sum(memory.state(step).values()), rel=0.01
    )
    assert abs(ratio - 1) < AGREEMENT


@pytest.mark.parametrize(
    ("mesh_shape", "exchange"),
    [((1, 8), "tree"), ((2, 4), "gather"), ((2, 4), "count"), ((8, 1), "count")],
)
def test_traffic_is_what_the_compiled_step_moves(mesh_shape, exchange):
    config = make_config(1024, n_latents=4096, aux_coefficient=0.0, exchange=exchange)
    compiled = compile_on(config, make_mesh(MeshConfig(*mesh_shape)))
    moved = sum(one["n_bytes"] * one["times"] for one in compiled.moved)
    step = Step(config, *mesh_shape, "cpu")
    told = sum(one.n_bytes * one.times for one in traffic.collectives(step))
    small = 4 * (8 * 64 + 64)  # vectors of D, and scalars
    assert told <= moved <= told + small


CASES = list(
    itertools.product(
        [(2**12, 64), (2**15, 768), (2**17, 4096), (2**20, 8192), (3 * 2**10, 256)],
        [1024, 65_536],
        ["tpu:v5e-16", "tpu:v5p-128", "gpu:8xh200", "gpu:2x8xh100", "cpu:8"],
    )
)


@pytest.mark.parametrize(("size", "rows", "name"), CASES)
def test_the_rule_takes_the_fastest_mesh_that_fits(size, rows, name):
    config = make_config(rows, n_latents=size[0], d_model=size[1], k=16)
    where = parse(name)
    best = rule.choose(config, where)[0]
    n_data, n_latent = best.shape
    assert refusal(best.step) is None and n_data * n_latent <= where.n_devices
    available = where.chip.hbm_bytes / where.chip.devices
    for n in (n for n in range(1, where.n_devices + 1) if where.n_devices % n == 0):
        other = Step(config, n, where.n_devices // n, where.platform, where.n_hosts)
        if refusal(other) is None and memory.peak(other) <= available:
            assert best.fits
            assert best.cost.seconds <= estimate(other, where).seconds
    if best.fits:
        assert memory.peak(best.step) <= available


def test_small_dictionaries_shard_data_and_large_ones_latents():
    where = parse("gpu:8xh200")
    small = make_config(2**20, n_latents=8192, d_model=768)
    large = make_config(8192, n_latents=2**20, d_model=4096)
    assert rule.choose(small, where)[0].shape == (8, 1)
    assert rule.choose(large, where)[0].shape == (1, 8)


def test_a_mesh_that_is_set_stays_and_its_open_part_is_chosen():
    config = make_config(mesh=MeshConfig(data=2))
    assert rule.choose(config, parse("cpu:8"))[0].shape == (2, 4)
    assert plan.choose_mesh(config, 8, "cpu") == (config.mesh, "as set")
    config = make_config(mesh=MeshConfig(latent=2))
    assert plan.choose_mesh(config, 8, "cpu")[0] == MeshConfig(4, 2)
    with pytest.raises(ValueError, match="mesh.data = 16 .* of 8 devices: it needs 16"):
        rule.choose(make_config(mesh=MeshConfig(16)), parse("cpu:8"))


def test_a_run_that_is_left_free_chooses_a_mesh_that_it_accepts():
    for n_latents, rows in ((1000, 24), (7, 8), (4096, 2048)):
        config = make_config(rows, n_latents=n_latents, d_model=None, k=4)
        chosen, why = plan.choose_mesh(config, 8, "cpu")
        mesh = make_mesh(chosen, n_latents)
        assert n_latents % mesh.shape[LATENT] == 0 and rows % mesh.shape[DATA] == 0
        assert why
    one, why = plan.choose_mesh(make_config(), 1, "cpu")
    assert (one.data, one.latent, why) == (1, 1, "the only one")


def test_processes_that_load_apart_have_lanes_each():
    config = make_config(2**20, n_latents=8192, d_model=768)
    config.data.lanes = 2
    wide, _ = plan.choose_mesh(config, 16, "gpu", "NVIDIA H200", 2)
    assert wide.data is not None and refusal(Step(config, 16, 1, "gpu", 16))
    assert refusal(Step(config, wide.data, wide.latent, "gpu", 2)) is None


def test_limits_fit_and_twice_as_much_does_not():
    where = parse("tpu:v5e-16")
    config = make_config(65_536, n_latents=2**18, d_model=4096, k=32)
    step = rule.choose(config, where)[0].step
    rows = limits.largest_batch(step, where)

    def peak(batch):
        data = dataclasses.replace(config.data, batch_rows=batch)
        changed = dataclasses.replace(config, data=data, rows=2**30)
        return memory.peak(dataclasses.replace(step, config=changed))

    assert peak(rows) <= where.chip.hbm_bytes < peak(2 * rows)


@pytest.mark.parametrize("name, n_data", [("gpu:4x8xh100", 32), ("cpu:6", 6)])
def test_limits_are_of_whole_data_shards(name, n_data):
    config = make_config(
        3 * 2**18,
        mesh=MeshConfig(data=n_data),
        n_latents=8190,
        d_model=768,
        k=32,
        aux_coefficient=0.0,
    )
    where = parse(name)
    step = rule.choose(config, where)[0].step
    rows = limits.largest_batch(step, where)
    assert rows and rows % n_data == 0 and (rows // n_data).bit_count() == 1
    batch = config.data.batch_rows
    fits = limits.largest_microbatch(step, where)
    assert fits == batch or batch > rows and fits and batch % fits == 0


def test_devices_that_no_mesh_takes_are_told():
    config = make_config(8192, n_latents=4096, d_model=64, k=8)
    found = plan.make_plan(config, parse("tpu:v5p:3x3x3"), is_compiled=False)
    text = plan.format_plan(found)
    n_data, n_latent = found.best.shape
    n_idle = 27 - n_data * n_latent
    assert n_idle > 0 and f"(data x latent), {n_idle} devices idle: " in text
    assert "if it did fit" not in text and found.fits


@pytest.mark.parametrize("efficiency", [0, -1, 1.1])
def test_an_efficiency_that_is_none_is_refused(efficiency):
    with pytest.raises(ValueError, match="must be above 0, at most 1"):
        plan.make_plan(make_config(), parse("gpu:8xh200"), efficiency=efficiency)


@pytest.mark.parametrize("rows", [0, -5, float("nan"), float("inf")])
def test_rows_that_are_none_are_refused(rows):
    with pytest.raises(ValueError, match=f"rows = {rows}: must be at least 1"):
        ask.with_flags(make_config(), {"rows": rows})


def test_the_smallest_topology_that_fits_is_named():
    config = make_config(8192, n_latents=2**20, d_model=4096, k=32)
    found = plan.make_plan(config, parse("tpu:v5e-1"), is_compiled=False)
    assert not found.fits and found.smallest is not None
    sold = [one.name for one in limits.topology.larger(parse("tpu:v5e-1"))]
    before = sold[sold.index(found.smallest.name) - 1]
    assert rule.choose(config, found.smallest)[0].fits
    assert not rule.choose(config, parse(before))[0].fits
    text = plan.format_plan(found)
    assert f"smallest topology that does: {found.smallest.name}" in text
    huge = make_config(8192, n_latents=2**30, d_model=16_384, k=32)
    none = plan.make_plan(huge, parse("tpu:v5e-1"), is_compiled=False)
    assert none.smallest is None
    assert "nor does any topology of v5e" in plan.format_plan(none)
    assert "\nif it did fit: " in plan.format_plan(none)


def test_the_model_says_that_it_is_one_where_nothing_is_compiled():
    found = plan.make_plan(make_config(), parse("gpu:8xh200"))
    assert found.compiled is None
    assert "by the analytic model alone: no compiler for G" in plan.format_plan(found)
    told = found.to_json()
    assert told["model"] == "analytic" and told["why_not_compiled"]
    assert json.loads(json.dumps(told)) == told
    assert told["days"] * told["rows_per_day"] == pytest.approx(told["rows"])
    assert told["chip_hours"] == pytest.approx(8 * 24 * told["days"])
    held = sum(told["state_bytes"].values())
    held += sum(v for v in told["temporary_bytes"].values() if isinstance(v, int))
    assert held == told["peak_bytes"]


def _command(*arguments):
    code = "import sys; from sae_jax import cli; cli.main()"
    return subprocess.run(
        [sys.executable, "-c", code, "plan", *arguments], capture_output=True, text=True
    )


def test_the_command_compiles_the_step_and_prints_json(tmp_path):
    arguments = ("--n_latents=4096", "--d_model=64", "--k=8", "--batch_rows=1024")
    done = _command("--topology=cpu:8", *arguments, "--data=2", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["mesh"]["data"], told["mesh"]["latent"]) == (2, 4)
    assert told["model"] == "compiler" and told["compiled"]["fits"]
    assert told["compiled"]["compiler"] == f"jaxlib {jax.lib.__version__}"
    assert told["compiled"]["peak_bytes"] > told["compiled"]["argument_bytes"] > 0
    (tmp_path / "run.py").write_text(
        "from sae_jax.config import SaeConfig, TrainConfig\n"
        "def get_config(): return TrainConfig(sae=SaeConfig(n_latents=512))\n"
    )
    done = _command(
        "--topology=gpu:2xh100", f"--config={tmp_path / 'run.py'}", "--d_model=64"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("topk, 512 latents of width 64, K = 32")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--n_latents=64"], 2, "give --topology=NAME"),
        (["--topology=tpu:v5q-8", "--d_model=64"], 1, "did you mean 'v5p'"),
        (["--topology=cpu:2"], 1, "sae.d_model is not set"),
        (["--topology=cpu:2", "--config=@"], 2, "get_config() returned dict, not a"),
    ],
)
def test_the_command_tells_what_is_wrong_in_one_line(
    arguments, status, message, tmp_path
):
    (tmp_path / "dict.py").write_text("def get_config(): return {1: 2}")
    done = _command(*(text.replace("@", f"{tmp_path}/dict.py") for text in arguments))
    assert done.returncode == status, done.stderr
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr
