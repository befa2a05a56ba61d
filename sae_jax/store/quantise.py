"""Rows as they are stored: in bfloat16, or in int8 with a scale for each row.

    scale = max |x| / 127,   stored = round(x / scale),   read = bfloat16(stored scale)

An int8 row takes half the bytes; the error is at most half a scale in each dimension.
"""

import dataclasses
from typing import Self

import ml_dtypes
import numpy as np

_LARGEST = 127


@dataclasses.dataclass(frozen=True)
class Stored:
    """Rows [n, D]: bfloat16, or int8 with `scales` [n] float32."""

    rows: np.ndarray
    scales: np.ndarray | None = None

    @classmethod
    def encode(cls, acts_nd: np.ndarray, dtype: str) -> Self:
        """bfloat16 rows in the dtype of a store."""
        if dtype == "bfloat16":
            return cls(np.asarray(acts_nd, ml_dtypes.bfloat16))
        rows_nd = acts_nd.astype(np.float32)
        scales_n = np.abs(rows_nd).max(axis=1, initial=0) / np.float32(_LARGEST)
        # A row that is not finite has such a scale, and is found by who adds rows up.
        with np.errstate(invalid="ignore"):
            rows_nd /= np.where(scales_n == 0, 1, scales_n)[:, None]
            return cls(np.rint(rows_nd).astype(np.int8), scales_n)

    def decode(self) -> np.ndarray:
        """bfloat16 rows, as a reader of the store gets them."""
        if self.scales is None:
            return self.rows
        return dequantise(self.rows, self.scales)


def dequantise(rows_nd: np.ndarray, scales_n: np.ndarray) -> np.ndarray:
    """int8 rows and their scales as bfloat16 rows."""
    rows = rows_nd.astype(np.float32)
    rows *= scales_n[:, None]
    return rows.astype(ml_dtypes.bfloat16)
