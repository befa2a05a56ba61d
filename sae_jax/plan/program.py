"""What a compiled program moves between devices, read from its HLO text.

A collective in a loop moves as often as the loop runs. The text says how often where
the compiler knows it, and only on CPUs; elsewhere it is counted once, and told apart.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_CALLS = r"(?:body|condition|calls|to_apply|\w+_computations?)=(\{.*?\}|%?[\w.\-]+)"
_COUNTED = r'"known_trip_count":\{"n":"(\d+)"'
_BITS = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Moved:
    """An array that a collective gives."""

    kind: str
    dtype: str
    n_elements: int
    times: int | None  # None: in a loop of unknown length

    @property
    def n_bytes(self) -> int:
        bits = _BITS.search(self.dtype)
        return self.n_elements * (max(1, int(bits[0]) // 8) if bits else 1)


def moved(program: str) -> list[Moved]:
    """Each array of each collective among two devices or more."""
    bodies: dict[str, list[str]] = {}
    body: list[str] = []
    for line in program.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            body = bodies.setdefault("ENTRY" if header[1] else header[2], [])
        else:
            body.append(line)
    return list(_walk(bodies, "ENTRY", 1))


def _walk(
    bodies: dict[str, list[str]], name: str, times: int | None
) -> Iterator[Moved]:
    for line in bodies[name]:
        match = re.search(rf"= (.*?) ({_KINDS})(?:-start)?\(", line)
        if match and _n_together(line) > 1:
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
                n_elements = math.prod(int(n) for n in dims.split(",") if n)
                yield Moved(match[2], dtype, n_elements, times)
        inside = times
        if " while(" in line:
            counted = re.search(_COUNTED, line)
            inside = times * int(counted[1]) if counted and times else None
        for called in re.findall(r"[\w.\-]+", " ".join(re.findall(_CALLS, line))):
            if called in bodies:
                yield from _walk(bodies, called, inside)


def _n_together(line: str) -> int:
    """The devices of one group, in pairs, listed, counted, or as axes of a mesh."""
    if "source_target_pairs=" in line:
        return 2
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\}", line):
        sizes = dict(re.findall(r"('\w+')=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in match[2].split(","))
    return 2
