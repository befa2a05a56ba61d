"""What all launchers share: settings, and how a command is checked, shown and run.

    python launch/NAME.py [--setting=value ...] -- [arguments of `sae-jax train`]

Exit codes are those of the run where there is one, else 0, 1 (failed) or 2 (misused).
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags

ROOT = Path(__file__).resolve().parents[1]
FAILED, MISUSED = 1, 2
REMOTE = re.compile(r"(gs|s3)://.")
PEER_TIMEOUT = "peer_timeout_secs"
PEER_TIMEOUT_SECS = 60  # unless it is given
# What launchers say of the processes of a run.
_OF_PROCESSES = ("multihost", "coordinator", "n_processes", "process")
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_VARIABLE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_SECRET = re.compile(r".*(TOKEN|SECRET|PASSWORD|KEY)", re.IGNORECASE)
_HELP = ("--help", "-h", "--helpshort", "--helpfull")

NAME = flags.DEFINE_string(
    "name", "sae-jax", "what the run, and what is made for it, is called"
)
MAX_RESTARTS = flags.DEFINE_integer(
    "max_restarts",
    3,
    "restarts without a new checkpoint in between; 0: none at all",
    lower_bound=0,
)
GRACE_SECS = flags.DEFINE_integer(
    "grace_secs",
    150,
    "how long processes may take to save and end once they are told to, or once one of "
    "them has died; more than twice train's --peer_timeout_secs",
    lower_bound=1,
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "print what would run, and do nothing")
_ENV = flags.DEFINE_multi_string("env", [], "NAME=VALUE for every process; repeatable")


def run(main: Callable[[list[str], list[str]], int]) -> None:
    """Exits with the status of main(words, arguments).

    `words` are what is neither flag nor behind `--`, `arguments` what is behind it.
    What is wrong with either is told in one line.
    """
    program, own = Path(sys.argv[0]).name, sys.argv[1:]
    arguments: list[str] = []
    if "--" in own:
        cut = own.index("--")
        own, arguments = own[:cut], own[cut + 1 :]
    flags.FLAGS(sys.argv[:1])
    if any(word in _HELP for word in own):
        print(_describe())
        sys.exit(0)
    try:
        words = flags.FLAGS([program, *own])[1:]
        if not _NAME.fullmatch(NAME.value):
            raise ValueError(
                f"--name={NAME.value}: give 1 to 40 lower-case letters, digits and -, "
                "a letter first, and no - last"
            )
        variables()
        sys.exit(main(words, arguments))
    except (flags.Error, ValueError, OSError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, flags.UnrecognizedFlagError):
            line += "; flags of sae-jax train come behind --"
        print(f"{program}: {line}", file=sys.stderr)
        sys.exit(FAILED if isinstance(error, OSError) else MISUSED)


def variables() -> dict[str, str]:
    """The environment that --env adds."""
    found = {}
    for pair in _ENV.value:
        match = _VARIABLE.fullmatch(pair)
        if match is None:
            raise ValueError(f"--env={pair.partition('=')[0]}: give --env=NAME=VALUE")
        if _SECRET.fullmatch(match[1]):
            raise ValueError(
                f"--env={match[1]} looks like a secret, which would be told in logs: "
                "give the machines an account with the rights instead"
            )
        found[match[1]] = match[2]
    return found


def check_training(
    arguments: Sequence[str], is_several: bool, sets_processes: bool = True
) -> str:
    """The workdir of these arguments of `sae-jax train`, which have what it needs."""
    if not value_of(arguments, "config"):
        raise ValueError("give --config=FILE of `sae-jax train` behind --")
    for name in _OF_PROCESSES:
        if sets_processes and (
            value_of(arguments, name) is not None or f"--{name}" in arguments
        ):
            raise ValueError(f"--{name} is set by the launcher: leave it out behind --")
    workdir = value_of(arguments, "workdir")
    if not workdir:
        raise ValueError("give --workdir=FOLDER behind --, where the run is saved")
    peer_timeout = value_of(arguments, PEER_TIMEOUT)
    if peer_timeout is None and (is_several or "--multihost" in arguments):
        peer_timeout = str(PEER_TIMEOUT_SECS)
    _check_grace(peer_timeout)
    return workdir


def value_of(arguments: Sequence[str], name: str) -> str | None:
    """Of the last `--name=value` or `--name value`, as absl reads them."""
    value = None
    following = [*arguments, ""][1:]
    for argument, after in zip(arguments, following, strict=True):
        key, equals, text = argument.partition("=")
        if key in (f"--{name}", f"-{name}"):
            value = text if equals else after
    return value


def train_program() -> list[str]:
    """`sae-jax train` of the environment that this Python is of, else of the path."""
    beside = Path(sys.executable).with_name("sae-jax")
    return [str(beside) if beside.is_file() else "sae-jax", "train"]


def forwarded() -> list[str]:
    """The settings that launch/local.py takes over, as its flags."""
    return [
        f"--name={NAME.value}",
        f"--max_restarts={MAX_RESTARTS.value}",
        f"--grace_secs={GRACE_SECS.value}",
        *(f"--env={name}={value}" for name, value in variables().items()),
    ]


def show(command: Sequence[str]) -> str:
    """The command as a shell would read it."""
    return shlex.join(map(str, command))


def execute(*commands: Sequence[str], text: str | None = None) -> int:
    """Runs them in turn, to the first that fails, with `text` as their input.

    With --dry_run they are printed instead, or `text` where there is one.
    """
    for command in commands:
        if DRY_RUN.value:
            print(show(command) if text is None else text.rstrip())
            continue
        print(f"+ {show(command)}", file=sys.stderr)
        try:
            status = subprocess.run(command, input=text, text=True).returncode
        except FileNotFoundError as error:
            raise OSError(
                f"{command[0]} is not on PATH: install it, or run this where it is"
            ) from error
        if status:
            return status if status > 0 else 128 - status
    return 0


def _check_grace(peer_timeout: str | None) -> None:
    if peer_timeout is None:
        return
    try:
        peer_secs = float(peer_timeout)
    except ValueError:
        raise ValueError(f"--{PEER_TIMEOUT}={peer_timeout}: give seconds") from None
    if GRACE_SECS.value <= 2 * peer_secs:
        raise ValueError(
            f"--grace_secs={GRACE_SECS.value} is not more than twice "
            f"--{PEER_TIMEOUT}={peer_timeout}: processes would be killed before they "
            "notice that another is lost; give more grace, or a shorter "
            f"--{PEER_TIMEOUT} behind --"
        )


def _describe() -> str:
    main = sys.modules["__main__"]
    own = flags.FLAGS.module_help(main)
    others = [
        flags.FLAGS.module_help(module)
        for name in ("slices", "settings")
        if (module := sys.modules.get(name))
    ]
    return "\n".join([(main.__doc__ or "").strip(), own, *others])
