"""The fields of a config.json, read with their types checked."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Fields:
    """A JSON object of a file; a field that is null counts as missing.

    Each `read_*` gives the default for a missing field, and raises ValueError, with
    the file and the field, where there is no default or the value is of another type.
    """

    path: Path
    values: Mapping[str, Any]

    def read_int(self, name: str, default: int | None = None, above: int = 0) -> int:
        meaning = f"a whole number above {above}"
        return self._read(name, (int,), default, meaning, above)

    def read_float(self, name: str, default: float | None = None) -> float:
        # JSON may give 10000.0 as 10000.
        return self._read(name, (float, int), default, "a number above 0", 0)

    def read_bool(self, name: str, default: bool) -> bool:
        return self._read(name, (bool,), default, "true or false", -1)

    def read_object(self, name: str) -> dict[str, Any]:
        """The object under the name, empty where there is none."""
        value = self.values.get(name) or {}
        if not isinstance(value, dict):
            raise ValueError(f"{self.path}: {name} is {value!r}, not an object")
        return value

    def read_choice(self, name: str, choices: Mapping[str, Any], default: str) -> str:
        """One of the keys of `choices`."""
        value = self.values.get(name)
        value = default if value is None else value
        if not isinstance(value, str) or value not in choices:
            raise ValueError(
                f"{self.path}: {name} is {value!r}, only {', '.join(choices)} are "
                "supported"
            )
        return value

    def refuse_other(self, **supported: Any) -> None:
        """ValueError for a field that is there with another value than this one."""
        for name, value in supported.items():
            found = self.values.get(name)
            if found is not None and found != value:
                raise ValueError(
                    f"{self.path}: {name} is {found!r}, only {value!r} is supported"
                )

    def _read(
        self, name: str, kinds: tuple[type, ...], default: Any, meaning: str, above: int
    ) -> Any:
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{self.path}: field {name!r} is missing")
        if type(value) not in kinds or not value > above:
            raise ValueError(f"{self.path}: {name} is {value!r}, not {meaning}")
        return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file; ValueError names a file that holds none."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no JSON object")
    return fields
