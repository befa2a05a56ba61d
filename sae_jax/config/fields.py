"""What every config does: check its fields, be copied, become JSON and come back."""

import dataclasses
import difflib
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

_Config = TypeVar("_Config")


def checked(config: _Config) -> _Config:
    """A copy of `config` whose field checks have run, at every depth."""
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    fields = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        fields[field.name] = (
            checked(value) if dataclasses.is_dataclass(value) else value
        )
    return type(config)(**fields)


def to_json(config: Any) -> str:
    """The config as indented JSON text."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(config_type: type[_Config], text: str, source: str | Path) -> _Config:
    """The config that `to_json` wrote. `source` names the file in errors."""
    try:
        return _from_dict(config_type, json.loads(text), prefix="")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def nearest_name(name: str, names: typing.Iterable[str]) -> str:
    """A hint for a misspelt `name`: the nearest of `names`, or all of them."""
    names = sorted(names)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


def field_names(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of all leaf fields of a config or a config type."""
    names = []
    for name, hint in typing.get_type_hints(
        config if isinstance(config, type) else type(config)
    ).items():
        if dataclasses.is_dataclass(hint):
            names += field_names(hint, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _from_dict(config_type: Any, values: Any, prefix: str) -> Any:
    hints = typing.get_type_hints(config_type)
    if not isinstance(values, dict):
        raise ValueError(f"{prefix or 'the file'} is not a JSON object")
    for name in values:
        if name not in hints:
            raise ValueError(
                f"unknown field {prefix + name!r}: {nearest_name(name, hints)}"
            )
    fields = {}
    for name, value in values.items():
        is_group = dataclasses.is_dataclass(hints[name])
        fields[name] = (
            _from_dict(hints[name], value, f"{prefix}{name}.") if is_group else value
        )
    return config_type(**fields)


def check_types(config: Any, prefix: str) -> None:
    """Refuses a field that is not of its declared type, or not finite.

    An int where a float is declared becomes one.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if typing.get_origin(hint) is tuple:
            setattr(config, name, _whole_numbers(value, f"{prefix}{name}"))
            continue
        allowed = typing.get_args(hint) if type(hint) is types.UnionType else (hint,)
        if float in allowed and type(value) is int:
            setattr(config, name, float(value))
        elif type(value) not in allowed:
            wanted = " or ".join(kind.__name__ for kind in allowed)
            raise ValueError(f"{prefix}{name} = {value!r} is not of type {wanted}")
        elif type(value) is float and not math.isfinite(value):
            raise ValueError(f"{prefix}{name} = {value}: must be finite")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} = {value!r}: {nearest_name(str(value), choices)}")


def check_at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{name} = {value}: must be at least {least}")


def _whole_numbers(value: Any, name: str) -> tuple[int, ...]:
    """A tuple of ints; JSON has it as a list."""
    if not isinstance(value, (list, tuple)) or any(type(v) is not int for v in value):
        raise ValueError(f"{name} = {value!r} is not a tuple of whole numbers")
    return tuple(value)
