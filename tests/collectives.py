"""What a compiled program moves between devices, read from its HLO text."""

import re

import numpy as np

_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
# Groups of one device each, as jax 0.10 writes them and as 0.12 does, by axes.
_ALONE = r"replica_groups=(\{\{\d+\}|\[\d+,1\]|mesh\['data'=1,.*?\] \{'data'\})"


def collectives(compiled) -> list[tuple[str, int]]:
    """(kind, elements of its result) of each collective among two devices or more."""
    found = []
    for line in compiled.as_text().splitlines():
        match = re.search(rf"= (.*?) ({_KINDS})(?:-start)?\(", line)
        if not match or re.search(_ALONE, line):
            continue
        result, kind = match.groups()
        shapes = re.findall(r"\w+\[([\d,]*)\]", result)
        sizes = [np.prod([int(n) for n in s.split(",") if n]) for s in shapes]
        found.append((kind, int(sum(sizes))))
    return found
