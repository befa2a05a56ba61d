"""Errors that a user can cure, told in one line on stderr.

With --verbosity=1 the traceback is shown instead; the exit code is the same.
"""

import contextlib
import difflib
import inspect
import re
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from absl import flags, logging

from sae_jax import exits
from sae_jax.config import TrainConfig, settings_of

_OVERRIDE = re.compile(r"--?config\.([^=]+)")
_UNKNOWN_KEYWORD = re.compile(r"unexpected keyword argument '(\w+)'")
_BAD_NUMBER = re.compile(r"(?:invalid literal|could not convert).*?('[^']*')")
_NEAR = 1.3  # of 2; below it a field is no likely misspelling of another
_VERBOSE = re.compile(r"--?(v|verbosity)=[1-9]")
_CLOSED = "Event loop is closed"
_OUT_OF_MEMORY = re.compile("RESOURCE_EXHAUSTED|out of memory")  # of jax, of torch
_CURES = {
    "sae-jax harvest": "lower --batch_contexts or --context_length",
    "sae-jax train": "lower data.microbatch_rows or data.batch_rows, and with a stream "
    "stream.batch_contexts or stream.context_length; sae-jax plan tells what fits",
    "sae-jax evaluate": "lower --batch_rows or --batch_sequences",
}


class Misuse(Exception):
    """The command line itself is wrong."""


_EXPECTED = (
    Misuse,
    flags.Error,
    ValueError,
    OSError,
    FloatingPointError,
    KeyboardInterrupt,
    exits.Preempted,
    exits.PeerLost,
)


@contextlib.contextmanager
def in_one_line(program: str) -> Iterator[None]:
    """Exits with one line `program: message` where an expected error comes out."""
    try:
        yield
    except (*_EXPECTED, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
            raise  # a bug
        if any(map(_VERBOSE.fullmatch, sys.argv)):
            traceback.print_exception(error)
        else:
            print(f"{program}: {_message(error, program)}", file=sys.stderr)
        sys.exit(_status(error))


def quiet_libraries() -> None:
    """Keeps tracebacks off stderr that only accompany an error that is raised.

    Orbax logs what it will raise, up to four times; and where it gives up a save,
    tensorstore's threads have no event loop to tell of theirs.
    """
    logging.get_absl_handler().addFilter(lambda record: not record.exc_info)
    show = sys.excepthook

    def show_other(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if str(error) != _CLOSED:
            show(kind, error, trace)

    sys.excepthook = show_other
    tell = sys.unraisablehook

    def tell_other(unraisable: Any) -> None:
        is_closed = str(unraisable.exc_value) == _CLOSED
        if not (is_closed or inspect.iscoroutine(unraisable.object)):
            tell(unraisable)

    sys.unraisablehook = tell_other


def check_config(found: object) -> TrainConfig:
    """What `get_config()` of a --config file gave."""
    if not isinstance(found, TrainConfig):
        raise Misuse(f"get_config() returned {type(found).__name__}, not a TrainConfig")
    return found


def misuse(error: Exception, arguments: list[str]) -> Misuse:
    """What `error`, raised while `arguments` were parsed, means.

    ml_collections tells of a misspelt override by a KeyError and of an error in the
    config file by a text that ends in the file's traceback.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, KeyError):
        for override in filter(None, map(_OVERRIDE.match, arguments)):
            if override[1] not in settings_of(TrainConfig):
                return _unknown_field("--config." + override[1], override[1])
    if isinstance(error, flags.UnrecognizedFlagError):
        if error.flagname.startswith("config."):
            return Misuse(f"--{error.flagname} needs --config=FILE before it")
    if number := _BAD_NUMBER.search(lines[-1]):
        for argument in arguments:
            if repr(argument.partition("=")[2]) == number[1]:
                return Misuse(f"{argument}: {number[1]} is not a number of its type")
    if keyword := _UNKNOWN_KEYWORD.search(lines[-1]):
        return _unknown_field("the --config file", keyword[1])
    if isinstance(error, flags.Error) and len(lines) == 1:
        return Misuse(lines[0])
    return Misuse(f"the --config file: {lines[-1]}")


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def _message(error: BaseException, program: str) -> str:
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return where + error.strerror
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if _is_out_of_memory(error):
        cure = _CURES.get(program, "end what else uses it, or take a larger one")
        return f"the memory of a device is full ({line}): {cure}"
    return line


def _status(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return exits.STOPPED
    if isinstance(error, exits.Preempted):
        return exits.PREEMPTED
    if exits.is_of_network(error):
        return exits.PEER_LOST
    is_misuse = isinstance(error, Misuse | flags.Error)
    return exits.MISUSED if is_misuse else exits.FAILED


def _unknown_field(where: str, path: str) -> Misuse:
    """Names the field that is nearest in its last part and in its whole path."""

    def likeness(name: str) -> float:
        last, wanted = name.split(".")[-1], path.split(".")[-1]
        return _ratio(last, wanted) + _ratio(name, path)

    names = settings_of(TrainConfig)
    nearest = max(names, key=likeness)
    near = likeness(nearest) >= _NEAR
    hint = f"did you mean {nearest!r}?" if near else f"known: {', '.join(names)}"
    return Misuse(f"{where}: unknown field {path!r}: {hint}")


def _ratio(left: str, right: str) -> float:
    return difflib.SequenceMatcher(None, left, right).ratio()
