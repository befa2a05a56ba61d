"""Train one SAE on an activation store, or go on with an interrupted run.

    sae-jax train --config=experiments/quickstart.py --workdir=run/
    sae-jax train --config=experiments/quickstart.py --config.sae.k=64 --workdir=k64/

The config file has a `get_config()` that returns a sae_jax.config.TrainConfig; every
field can be overridden by its dotted name. The same command resumes after a kill.
"""

import dataclasses
import textwrap
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from sae_jax.cli.errors import Misuse
from sae_jax.config import TrainConfig, settings_of
from sae_jax.loop import train

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "file with get_config(), and --config.FIELD=VALUE overrides"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "the run folder, made if missing")
_PROFILE_STEPS = flags.DEFINE_list(
    "profile_steps", None, "profile the steps FIRST,STOP (STOP not included)"
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
    if not isinstance(_CONFIG.value, TrainConfig):
        raise Misuse(
            f"get_config() returned {type(_CONFIG.value).__name__}, not a TrainConfig"
        )
    train(_CONFIG.value, _WORKDIR.value, profile_steps=_profile_steps())
    print(f"trained: {_WORKDIR.value}")


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
