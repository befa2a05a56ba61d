"""What a compiled program moves between devices, read from its HLO text."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
# Groups of one device each, as jax 0.10 writes them and as 0.12 does, by axes.
_ALONE = r"replica_groups=(\{\{\d+\}|\[\d+,1\]|mesh\['data'=1,.*?\] \{'data'\})"


class Moved(NamedTuple):
    """An array that a collective gives."""

    kind: str
    dtype: str
    elements: int
    is_inside: bool  # a loop, or whatever else the program calls


def collectives(compiled) -> list[tuple[str, int]]:
    """(kind, elements of its result) of each collective among two devices or more."""
    return [
        (kind, sum(elements for _, elements in arrays))
        for kind, arrays, _ in _collectives(compiled.as_text())
    ]


def arrays_moved(program: str) -> list[Moved]:
    """Each array of each collective among two devices or more."""
    return [
        Moved(kind, dtype, elements, is_inside)
        for kind, arrays, is_inside in _collectives(program)
        for dtype, elements in arrays
    ]


def _collectives(program: str) -> Iterator[tuple[str, list[tuple[str, int]], bool]]:
    is_inside = True
    for line in program.splitlines():
        if line.endswith("{"):
            is_inside = not line.startswith("ENTRY")
        match = re.search(rf"= (.*?) ({_KINDS})(?:-start)?\(", line)
        if not match or re.search(_ALONE, line):
            continue
        result, kind = match.groups()
        arrays = [
            (dtype, math.prod(int(n) for n in dims.split(",") if n))
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", result)
        ]
        yield kind, arrays, is_inside
