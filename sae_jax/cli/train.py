"""Train one SAE on an activation store, or go on with an interrupted run.

    sae-jax train --config=experiments/quickstart.py --workdir=run/
    sae-jax train --config=experiments/quickstart.py --config.sae.k=64 --workdir=k64/
    sae-jax train --config=F --workdir=gs://bucket/run --multihost   # on every host

The config file has a `get_config()` that returns a sae_jax.config.TrainConfig; every
field can be overridden by its dotted name. The same command resumes after a kill.
"""

import contextlib
import dataclasses
import sys
import textwrap
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from sae_jax.cli import part, supervise
from sae_jax.cli.errors import Misuse, check_config
from sae_jax.config import Cluster, TrainConfig, settings_of

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "file with get_config(), and --config.FIELD=VALUE overrides"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "the run folder, made if missing")
_PROFILE_STEPS = flags.DEFINE_list(
    "profile_steps", None, "profile the steps FIRST,STOP (STOP not included)"
)
_MULTIHOST = flags.DEFINE_bool(
    "multihost",
    False,
    "one process of several that share the run: on Cloud TPU, GKE, Slurm and under "
    "Open MPI they find each other; elsewhere give --coordinator, --n_processes and "
    "--process",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0")
_START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout_secs", 300, "how long to wait until all have come"
)
_PEER_TIMEOUT = flags.DEFINE_float(
    "peer_timeout_secs",
    Cluster.peer_timeout_secs,
    "another process that says nothing for so long is lost",
)
_STALL_TIMEOUT = flags.DEFINE_float(
    "stall_timeout_secs", 1800, "the run ends if no process does a step for so long"
)

_SYNTAX = """
A switch is given as --config.sae.multi_topk or --noconfig.sae.use_b_enc, a tuple as
--config.sae.prefixes=1024,4096, an empty one as '--config.sae.prefixes=()'. None cannot
be given: leave the field out.

Fields and their defaults:

"""


def main(argv: Sequence[str]) -> None:
    """Checks the flags and trains."""
    if len(argv) > 1:
        raise Misuse(f"unexpected argument {argv[1]!r}: give flags only")
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise Misuse("give --config=FILE and --workdir=FOLDER; see train --help")
    config = check_config(_CONFIG.value)
    cluster = _find_cluster()
    if cluster is not None and not supervise.is_supervised():
        sys.exit(supervise.run(cluster.start_timeout_secs))
    # Only here: the process that waits for this one has no use for jax.
    from sae_jax import processes
    from sae_jax.loop import train

    with processes.join(cluster) if cluster else contextlib.nullcontext():
        train(config, _WORKDIR.value, profile_steps=_profile_steps())
        is_first = processes.is_first()
    if is_first:
        print(f"trained: {_WORKDIR.value}")


def _find_cluster() -> Cluster | None:
    """Where the processes meet; None if this is the only one."""
    is_said = [flags.FLAGS[name].present for name in ("n_processes", "process")]
    if not _MULTIHOST.value:
        if any(is_said) or _COORDINATOR.value:
            raise Misuse("--coordinator, --n_processes and --process need --multihost")
        return None
    return Cluster(
        _COORDINATOR.value,
        part.N_PROCESSES.value if is_said[0] else None,
        part.PROCESS.value if is_said[1] else None,
        _START_TIMEOUT.value,
        _PEER_TIMEOUT.value,
        _STALL_TIMEOUT.value,
    )


def _profile_steps() -> tuple[int, int] | None:
    if _PROFILE_STEPS.value is None:
        return None
    first, *others = _PROFILE_STEPS.value
    if len(others) != 1 or not first.isdigit() or not others[0].isdigit():
        raise Misuse("--profile_steps wants two step numbers, as 10,15")
    return int(first), int(others[0])


def _describe(name: str, field: dataclasses.Field) -> str:
    """A field, its default, and beneath what it means and may be."""
    text = field.metadata["meaning"]
    if field.metadata["choices"]:
        text += f"; one of {', '.join(field.metadata['choices'])}"
    if field.metadata["only"]:
        text += f"; only for {', '.join(field.metadata['only'])}"
    lines = textwrap.wrap(text, 72, break_on_hyphens=False)
    return "\n        ".join((f"    {name} = {field.default!r}", *lines))


# Shown by --help, behind the docstring above.
__doc__ += _SYNTAX + "\n".join(
    _describe(name, field) for name, field in settings_of(TrainConfig).items()
)
