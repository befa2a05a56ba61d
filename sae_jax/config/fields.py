"""What every config does: tell of its fields, check them, become JSON and come back."""

import dataclasses
import difflib
import json
import math
import operator
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

_Config = TypeVar("_Config")
_Value = TypeVar("_Value")


def setting(
    default: _Value,
    meaning: str,
    choices: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
) -> _Value:
    """A field of a config, and what `sae-jax train --help` says of it.

    Args:
        default: of the field.
        meaning: one line; where the field may be None, with what None stands for.
        choices: what it may be; anything else is refused.
        only: the architectures that read it, where not all do.
    """
    metadata = {"meaning": meaning, "choices": choices, "only": only}
    return dataclasses.field(default=default, metadata=metadata)


def settings_of(config_type: Any, prefix: str = "") -> dict[str, dataclasses.Field]:
    """All leaf fields of a config type, by their dotted names."""
    found: dict[str, dataclasses.Field] = {}
    for field in dataclasses.fields(config_type):
        if dataclasses.is_dataclass(field.type):
            found |= settings_of(field.type, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = field
    return found


def changed(config: Any) -> dict[str, Any]:
    """Values of the leaf fields that are not at their default, by dotted names."""
    values = {
        name: (operator.attrgetter(name)(config), field.default)
        for name, field in settings_of(type(config)).items()
    }
    return {name: value for name, (value, usual) in values.items() if value != usual}


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


def check_fields(config: Any, prefix: str) -> None:
    """Refuses a field that is not of its declared type, not finite, or no choice of it.

    An int where a float is declared becomes one.
    """
    _check_types(config, prefix)
    for field in dataclasses.fields(config):
        choices, value = field.metadata.get("choices"), getattr(config, field.name)
        if choices and value is not None and value not in choices:
            hint = nearest_name(value, choices)
            raise ValueError(f"{prefix}{field.name} = {value!r}: {hint}")


def check_at_least(name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{name} = {value}: must be at least {least}")


def _check_types(config: Any, prefix: str) -> None:
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if typing.get_origin(hint) is tuple:
            kind = typing.get_args(hint)[0]
            setattr(config, name, _numbers(value, kind, f"{prefix}{name}"))
            continue
        allowed = typing.get_args(hint) if type(hint) is types.UnionType else (hint,)
        if float in allowed and type(value) is int:
            setattr(config, name, float(value))
        elif type(value) not in allowed:
            wanted = " or ".join(kind.__name__ for kind in allowed)
            raise ValueError(f"{prefix}{name} = {value!r} is not of type {wanted}")
        elif type(value) is float and not math.isfinite(value):
            raise ValueError(f"{prefix}{name} = {value}: must be finite")


def _numbers(value: Any, kind: type, name: str) -> tuple:
    """A tuple of ints or of floats; JSON has it as a list."""
    allowed, wanted = {
        int: ((int,), "whole numbers, such as (128, 512)"),
        float: ((int, float), "numbers, such as (0.25, 0.75)"),
    }[kind]
    if not isinstance(value, (list, tuple)) or any(
        type(v) not in allowed or not math.isfinite(v) for v in value
    ):
        raise ValueError(f"{name} = {value!r} is not a tuple of {wanted} or ()")
    return tuple(kind(v) for v in value)
