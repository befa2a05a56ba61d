"""Statistics of a site's rows, as sums that merge exactly.

Each shard of rows has its own sums, in float64. A store's statistics are those of its
train shards added in the order of the shards, so they are the same bits for any number
of processes that wrote them, and whether or not they were stopped.
"""

import dataclasses
import io
import zipfile
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

_ROWS_AT_ONCE = 1024  # float64 of a whole shard is four times it


@dataclasses.dataclass(frozen=True)
class Sums:
    """Of n rows, float64: over rows by dimension [D], and by position [T].

    `norm_t` and `largest_t` are the sum and the largest of the rows' norms.
    """

    rows: int
    sum_d: np.ndarray
    square_d: np.ndarray
    rows_t: np.ndarray
    norm_t: np.ndarray
    largest_t: np.ndarray

    @classmethod
    def empty(cls, width: int, context_length: int) -> Self:
        by_position = [np.zeros(context_length) for _ in range(3)]
        return cls(0, np.zeros(width), np.zeros(width), *by_position)

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(
            self.rows + other.rows,
            self.sum_d + other.sum_d,
            self.square_d + other.square_d,
            self.rows_t + other.rows_t,
            self.norm_t + other.norm_t,
            np.maximum(self.largest_t, other.largest_t),
        )


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of a site's train rows, in float64; lengths are Euclidean norms of rows."""

    rows: int
    mean_d: np.ndarray
    second_moment_d: np.ndarray  # the mean of squares, by dimension
    mean_norm: float
    mean_square_norm: float
    norm_t: np.ndarray  # mean norm by position; NaN where no row is
    largest_norm_t: np.ndarray

    @property
    def variance_d(self) -> np.ndarray:
        """To some 1e-16 of the squared mean: 1e-7 of it at a mean of 1e4 deviations."""
        return np.maximum(self.second_moment_d - self.mean_d**2, 0)


def add_up(acts_nd: np.ndarray, positions_n: np.ndarray, context_length: int) -> Sums:
    """The sums of rows [n, D] at these positions of their contexts."""
    n, width = acts_nd.shape
    sum_d, square_d, norms_n = np.zeros(width), np.zeros(width), np.empty(n)
    for start in range(0, n, _ROWS_AT_ONCE):
        acts_bd = acts_nd[start : start + _ROWS_AT_ONCE].astype(np.float64)
        squares_bd = np.square(acts_bd)
        sum_d += acts_bd.sum(0)
        square_d += squares_bd.sum(0)
        norms_n[start : start + _ROWS_AT_ONCE] = np.sqrt(squares_bd.sum(1))
    largest_t = np.zeros(context_length)
    with np.errstate(invalid="ignore"):  # a NaN stays one, see `is_finite`
        np.maximum.at(largest_t, positions_n, norms_n)
    return Sums(
        n,
        sum_d,
        square_d,
        np.bincount(positions_n, minlength=context_length).astype(np.float64),
        np.bincount(positions_n, norms_n, context_length),
        largest_t,
    )


def is_finite(sums: Sums) -> bool:
    """Whether all rows were; a NaN or an infinity anywhere stays in the sums."""
    return bool(np.isfinite(sums.square_d).all())


def finish(sums: Sums) -> Statistics:
    """The statistics of the rows that were added up."""
    rows = max(sums.rows, 1)  # a store may be wholly held out
    with np.errstate(invalid="ignore"):
        norm_t = sums.norm_t / sums.rows_t
    return Statistics(
        rows=sums.rows,
        mean_d=sums.sum_d / rows,
        second_moment_d=sums.square_d / rows,
        mean_norm=float(sums.norm_t.sum() / rows),
        mean_square_norm=float(sums.square_d.sum() / rows),
        norm_t=norm_t,
        largest_norm_t=sums.largest_t,
    )


def mix(parts: Sequence[Statistics], weights: Sequence[float]) -> Statistics:
    """The statistics of a stream that takes rows of each part by its weight; without
    those by position."""

    def average(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return np.average(np.asarray(values), axis=0, weights=weights)

    return Statistics(
        rows=sum(part.rows for part in parts),
        mean_d=average("mean_d"),
        second_moment_d=average("second_moment_d"),
        mean_norm=float(average("mean_norm")),
        mean_square_norm=float(average("mean_square_norm")),
        norm_t=np.empty(0),
        largest_norm_t=np.empty(0),
    )


def to_bytes(values: Sums | Statistics) -> bytes:
    """A .npz file, read by `read_sums` and `read_statistics`."""
    stream = io.BytesIO()
    np.savez(stream, **dataclasses.asdict(values))
    return stream.getvalue()


def read_sums(data: bytes) -> Sums:
    fields = _read(data)
    return Sums(**fields | {"rows": int(fields["rows"])})


def read_statistics(data: bytes) -> Statistics:
    fields = _read(data)
    numbers = {name: float(fields[name]) for name in ("mean_norm", "mean_square_norm")}
    return Statistics(**fields | numbers | {"rows": int(fields["rows"])})


def _read(data: bytes) -> dict[str, Any]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (EOFError, OSError, RuntimeError, zipfile.BadZipFile) as error:
        # RuntimeError: a flipped bit says that it is encrypted, or of a newer version.
        raise ValueError(f"it is damaged: {error}") from error
