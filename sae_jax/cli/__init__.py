"""The console script `sae-jax`: one command a module of this folder.

A command's module defines its absl flags when it is imported and has `main(argv)`;
its docstring is its help. Only the named command is imported.
"""

import importlib
import os
import sys
import traceback
from typing import NoReturn

from absl import app

from sae_jax import exits
from sae_jax.cli import errors
from sae_jax.config import nearest_name

COMMANDS = {
    "quickstart": "train, evaluate and picture an SAE of the default subject",
    "harvest": "run a subject model over text and store its activations",
    "inspect": "look into a store: figures, pictures, all checksums",
    "train": "train an SAE on an activation store, or resume an interrupted run",
    "tasks": "write binary tasks about Python source, to probe latents with",
    "evaluate": "measure a trained SAE: table, evaluation.json, report.html",
    "compare": "put evaluated SAEs side by side: table, frontiers",
    "plan": "what a run will hold, move and take on a machine that need not be there",
}
HELP_FLAGS = ("-h", "-help", "--help")


def run() -> None:
    """`main`, for a process of its own."""
    try:
        main()
    except SystemExit as stop:
        if stop.code in (exits.STOPPED, exits.PREEMPTED) or _is_joined():
            _end(int(stop.code or 0))
        raise
    except Exception:
        if not _is_joined():
            raise
        traceback.print_exc()
        _end(exits.FAILED)


def _is_joined() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _end(code: int) -> NoReturn:
    """Ends without taking the interpreter down: computations that go on meanwhile would
    crash the process, and other processes that are gone would be waited for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Runs `sae-jax COMMAND ...`; see `sae_jax.exits` for its exit codes."""
    # Read at the first device query: with fewer threads than virtual CPU devices, a
    # collective among them can deadlock.
    os.environ.setdefault("NPROC", "32")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    name, *arguments = sys.argv[1:] or ["help"]
    if name in ("help", *HELP_FLAGS):
        print(_list_commands())
        return
    program = f"sae-jax {name}" if name in COMMANDS else "sae-jax"
    with errors.in_one_line(program):
        _run(name, arguments)


def _list_commands() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {line}" for name, line in COMMANDS.items()]
    return "\n".join(
        (
            "usage: sae-jax COMMAND [--flag=value ...]\n",
            *lines,
            "\n`sae-jax COMMAND --help` lists the flags of a command; --verbosity=1 "
            "shows the\ntraceback of an error.",
        )
    )


def _run(name: str, arguments: list[str]) -> None:
    if name not in COMMANDS:
        raise errors.Misuse(f"no command {name!r}: {nearest_name(name, COMMANDS)}")
    command = importlib.import_module(f"sae_jax.cli.{name}")
    from sae_jax.cli import shared  # its flags belong after the command's

    if any(argument in HELP_FLAGS for argument in arguments):
        print(shared.describe(command))
        return
    app.run(
        command.main,
        argv=[f"sae-jax {name}", *arguments],
        flags_parser=shared.parse_flags,
    )
