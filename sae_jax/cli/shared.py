"""What every command has: the flag that chooses virtual devices, parsing, and help."""

import inspect
import os
import sys
import types
from pathlib import Path

from absl import flags

from sae_jax.cli import errors

_CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices",
    None,
    "compute on this many virtual CPU devices instead of the machine's own",
    lower_bound=1,
)


def describe(command: types.ModuleType) -> str:
    """The command's docstring, its flags, and the shared ones."""
    modules = [command.__name__, "sae_jax.cli.part", __name__]
    helps = [flags.FLAGS.module_help(name) for name in modules if name in sys.modules]
    return (
        "\n".join((inspect.cleandoc(command.__doc__ or ""), *helps)) + "\n\n"
        "--verbosity=0 logs more; --verbosity=1 shows tracebacks; --helpfull lists all."
    )


def parse_flags(argv: list[str]) -> list[str]:
    """Parses `argv` and applies the shared flags; returns what are not flags."""
    _check_config_file(argv)
    try:
        positional = flags.FLAGS(argv)
    except Exception as error:  # a config file may raise anything
        raise errors.misuse(error, argv) from error
    # Left at its default of warnings, absl.app would raise the verbosity to INFO.
    flags.FLAGS["verbosity"].using_default_value = False
    if flags.FLAGS.verbosity < 1:
        errors.quiet_libraries()
    if _CPU_DEVICES.value is not None:
        # The threads of the CPU client, as in `sae_jax.cli.main`.
        n_threads = max(int(os.environ.get("NPROC", 1)), _CPU_DEVICES.value)
        os.environ["NPROC"] = str(n_threads)
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)
    return positional


def _check_config_file(argv: list[str]) -> None:
    """config_flags would tell of a missing file when a field is read, in five lines."""
    for argument, following in zip(argv, argv[1:] + [""], strict=True):
        name, _, value = argument.partition("=")
        if name.lstrip("-") != "config" or not argument.startswith("-"):
            continue
        path = value or following
        if not Path(path.split(":")[0]).is_file():
            raise errors.Misuse(f"--config={path}: there is no such file")
