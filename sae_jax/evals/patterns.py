"""Patterns of tokens that end where a latent fires, and the trie that matches them.

A pattern is a short run of tokens, some of which may be any token; an anchored one must
begin where a context begins. A trie holds a latent's patterns in reverse. To predict
the activation at a token, walk backwards from it through the trie: at every step to the
child of that very token, else to that of any token, never back. The first pattern that
ends on the way gives the value, so of two that share a path the shorter wins.

Source: Neuron2Graph (Foote et al. 2023, arXiv:2305.19911), in the form of the released
code of Gao et al. 2024 (arXiv:2406.04093).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ANY = -1  # stands for any token

_NONE = -1  # no such node
_TOKENS = 2**32  # more than there are ids


@dataclass(frozen=True)
class Pattern:
    """Tokens in the order of the text, and the activation at the last of them."""

    tokens: tuple[int, ...]
    is_anchored: bool
    value: float


class Trie:
    """The patterns of one latent. Of two equal ones the later gives the value."""

    def __init__(self, patterns: Iterable[Pattern]):
        nodes = _insert(patterns)
        edges = sorted(
            (node * _TOKENS + token, child)
            for node, (children, _, _) in enumerate(nodes)
            for token, child in children.items()
            if token != ANY
        )
        self._edges_e = np.array([edge for edge, _ in edges], np.int64)
        self._targets_e = np.array([child for _, child in edges], np.int64)
        self._any_child_n = np.array([node[0].get(ANY, _NONE) for node in nodes])
        self._value_n, self._anchored_n = (
            np.array([node[i] for node in nodes], np.float32) for i in (1, 2)
        )

    def predict(self, tokens_st: NDArray[np.int32]) -> NDArray[np.float32]:
        """The activation at every token of contexts [S, T]; 0 where nothing matches."""
        predicted = np.zeros(tokens_st.size, np.float32)
        tokens, n_positions = tokens_st.reshape(-1), tokens_st.shape[1]
        at = np.arange(tokens.size)  # where walks that still go on began
        node = np.zeros_like(at)
        for depth in range(n_positions):
            node = self._descend(node, tokens[at - depth])
            at, node = at[node != _NONE], node[node != _NONE]
            value, is_first = self._value_n[node], at % n_positions == depth
            value = np.where(np.isnan(value) & is_first, self._anchored_n[node], value)
            is_match = ~np.isnan(value)
            predicted[at[is_match]] = value[is_match]
            goes_on = ~is_match & ~is_first
            at, node = at[goes_on], node[goes_on]
            if not at.size:
                break
        return predicted.reshape(tokens_st.shape)

    def _descend(
        self, node: NDArray[np.int64], token: NDArray[np.int32]
    ) -> NDArray[np.int64]:
        """The child of the token, else of any token, else none."""
        child = self._any_child_n[node]
        if self._edges_e.size:
            edge = node * _TOKENS + token
            found = np.searchsorted(self._edges_e, edge)
            found = np.minimum(found, self._edges_e.size - 1)
            is_exact = self._edges_e[found] == edge
            child = np.where(is_exact, self._targets_e[found], child)
        return child


def _insert(
    patterns: Iterable[Pattern],
) -> list[tuple[dict[int, int], float, float]]:
    """Of each node: children by token, the value that ends here, the same anchored."""
    children: list[dict[int, int]] = [{}]
    values: dict[bool, dict[int, float]] = {False: {}, True: {}}
    for pattern in patterns:
        node = 0
        for token in reversed(pattern.tokens):
            node = children[node].setdefault(token, len(children))
            if node == len(children):
                children.append({})
        values[pattern.is_anchored][node] = pattern.value
    nan = float("nan")
    return [
        (child, values[False].get(node, nan), values[True].get(node, nan))
        for node, child in enumerate(children)
    ]
