"""Plan a run before there is a machine: does it fit, how fast, how long, which mesh.

    sae-jax plan --topology=tpu:v5p-256 --n_latents=16777216 --d_model=12288 --k=128
    sae-jax plan --topology=gpu:8xh200 --n_latents=131072 --d_model=4096 --rows=8e9
    sae-jax plan --topology=tpu:v6e-16 --config=experiments/x.py --d_model=768 --json

Topologies have the clouds' names: tpu:v5p-128 counts cores, so it is 64 chips;
tpu:v6e-16 counts chips; tpu:v5p:4x4x4, gpu:8xh200, gpu:4x8xh100 and cpu:8 say all. For
TPUs (with the extra `tpu`) and CPUs the real step is compiled, without the hardware.
For GPUs an analytic model answers, which elsewhere stands beside the compiler's.
Without --data and --latent a run's own choice is taken. Flags override --config.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from sae_jax.cli.errors import Misuse, check_config
from sae_jax.config import COMPUTE_DTYPES, TrainConfig
from sae_jax.plan import EFFICIENCY, format_plan, make_plan, parse
from sae_jax.plan.ask import with_flags
from sae_jax.plan.compiler import why_not

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "file with get_config(), and --config.FIELD=VALUE overrides"
)
_TOPOLOGY = flags.DEFINE_string("topology", None, "as tpu:v5p-128, gpu:8xh200, cpu:8")
_INTEGERS = {
    name: flags.DEFINE_integer(name, None, text, lower_bound=1)
    for name, text in (
        ("n_latents", "sae.n_latents"),
        ("d_model", "sae.d_model, the width of a row"),
        ("k", "sae.k"),
        ("batch_rows", "data.batch_rows"),
        ("microbatch_rows", "data.microbatch_rows"),
        ("data", "mesh.data"),
        ("latent", "mesh.latent"),
    )
}
_ROWS = flags.DEFINE_float("rows", None, "rows (tokens) to train on, as 40e9")
_DTYPE = flags.DEFINE_enum("dtype", None, COMPUTE_DTYPES, "sae.compute_dtype")
_EFFICIENCY = flags.DEFINE_float(
    "efficiency", EFFICIENCY, "part of the published figures taken to be reached"
)
_COMPILE = flags.DEFINE_bool("compile", True, "ask the compiler, where there is one")
_JSON = flags.DEFINE_bool("json", False, "print one JSON object, and no table")


def main(argv: Sequence[str]) -> None:
    """Prints the plan."""
    if len(argv) > 1 or _TOPOLOGY.value is None:
        raise Misuse("give --topology=NAME, and flags only; see plan --help")
    given: dict[str, Any] = {name: flag.value for name, flag in _INTEGERS.items()}
    given |= {"rows": _ROWS.value, "compute_dtype": _DTYPE.value}
    config = check_config(_CONFIG.value) if _CONFIG.value else TrainConfig()
    config = with_flags(config, given)
    topology = parse(_TOPOLOGY.value)
    if _COMPILE.value and config.sae.d_model and why_not(topology) is None:
        print(
            f"plan: compiling the step for {topology.name}, which may take minutes; "
            "--nocompile answers at once",
            file=sys.stderr,
        )
    plan = make_plan(config, topology, _COMPILE.value, _EFFICIENCY.value)
    print(json.dumps(plan.to_json(), indent=2) if _JSON.value else format_plan(plan))
