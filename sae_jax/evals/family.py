"""A family of language models: its table of (compute, loss), and the law of it.

    loss(C) = E + A C^-b,    E, A >= 0, b > 0
"""

import csv
import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar

from sae_jax.evals.figures import Array

_COLUMNS = ("compute", "loss")
_LEAST_COMPUTES = 3
_LOG_LARGEST = math.log(np.finfo(np.float64).max)
_EXPONENTS = np.geomspace(1e-3, 4, 200)


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """Models by rising compute."""

    names: list[str]
    computes_n: Array
    losses_n: Array


@dataclasses.dataclass(frozen=True)
class ComputeLaw:
    """loss(C) = floor + scale C^-exponent."""

    floor: float
    scale: float
    exponent: float

    def loss_of(self, compute: ArrayLike) -> Array:
        return self.floor + self.scale * np.power(compute, -self.exponent)

    def compute_of(self, loss: float) -> float:
        """The compute that gives this loss; infinite at the floor and below it."""
        if loss <= self.floor:
            return math.inf
        log = math.log(self.scale / (loss - self.floor)) / self.exponent
        return math.exp(log) if log < _LOG_LARGEST else math.inf


def fit_law(computes_n: Array, losses_n: Array) -> ComputeLaw:
    """The law of least squared relative error; the same input, the same law.

    For a given exponent the best floor and scale are a linear problem, so only the
    exponent is searched for: over a grid from 0.001 to 4, then between its neighbours.
    """
    centre = float(np.exp(np.mean(np.log(computes_n))))

    def solve(exponent: float) -> tuple[float, float, float]:
        """The squared error, the floor, and the scale at the centre."""
        powers_n = (computes_n / centre) ** -exponent / losses_n
        largest = np.max(powers_n)
        basis_n2 = np.stack([1 / losses_n, powers_n / largest], axis=1)
        floor, scale = np.linalg.lstsq(basis_n2, np.ones_like(losses_n))[0]
        if floor < 0:
            column_n = basis_n2[:, 1]
            floor, scale = 0.0, np.sum(column_n) / np.sum(column_n**2)
        error = np.sum((basis_n2 @ [floor, scale] - 1) ** 2)
        return float(error), float(floor), float(scale / largest)

    best = int(np.argmin([solve(exponent)[0] for exponent in _EXPONENTS]))
    bounds = _EXPONENTS[[max(best - 1, 0), min(best + 1, len(_EXPONENTS) - 1)]]
    found = minimize_scalar(
        lambda exponent: solve(exponent)[0],
        bounds=bounds,
        method="bounded",
        options={"xatol": 1e-12},
    )
    exponent = float(found.x)
    _, floor, scale = solve(exponent)
    return ComputeLaw(floor, scale * centre**exponent, exponent)


def read_family(path: str | Path) -> Family:
    """The models of a CSV file with columns compute, loss and, if it likes, name.

    Raises FileNotFoundError where there is no file, ValueError with file and line for
    what is not a family: at least three computes, and losses that fall with them.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(path)!r}: family names a CSV file with columns compute,loss"
        )
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    models = sorted(_read_models(path, text), key=lambda model: model.compute)
    by_compute = [
        list(group) for _, group in itertools.groupby(models, lambda m: m.compute)
    ]
    if len(by_compute) < _LEAST_COMPUTES:
        raise ValueError(
            f"{path} has models of {len(by_compute)} different computes: the law needs "
            f"{_LEAST_COMPUTES} or more"
        )
    for smaller, larger in itertools.pairwise(by_compute):
        before, after = (np.mean([m.loss for m in g]) for g in (smaller, larger))
        if after >= before:
            raise ValueError(
                f"{path}, line {larger[0].line}: loss {after:g} at compute "
                f"{larger[0].compute:g} is not below {before:g} at compute "
                f"{smaller[0].compute:g}: losses must fall with compute"
            )
    return Family(
        [model.name for model in models],
        np.array([model.compute for model in models]),
        np.array([model.loss for model in models]),
    )


@dataclasses.dataclass(frozen=True)
class _Model:
    line: int
    name: str
    compute: float
    loss: float


def _read_models(path: Path, text: str) -> Iterator[_Model]:
    lines = csv.reader(text.splitlines())
    header = [column.strip() for column in next(lines, [])]
    for column in _COLUMNS:
        if column not in header:
            raise ValueError(
                f"{path}, line 1: no column {column!r}: the first line must be "
                "compute,loss or name,compute,loss"
            )
    for row in lines:
        if not row:
            continue
        line = lines.line_num
        if len(row) != len(header):
            raise ValueError(
                f"{path}, line {line}: {len(row)} fields, the header has {len(header)}"
            )
        fields = dict(zip(header, (field.strip() for field in row)))
        numbers = [_read_number(path, line, column, fields) for column in _COLUMNS]
        yield _Model(line, fields.get("name") or f"line {line}", *numbers)


def _read_number(path: Path, line: int, column: str, fields: dict[str, str]) -> float:
    try:
        number = float(fields[column])
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError(
            f"{path}, line {line}: {column} is {fields[column]!r}: give a number "
            "above 0"
        )
    return number
