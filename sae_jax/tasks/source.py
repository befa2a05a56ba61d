"""What is known of each token of a Python file, as one table of yes and no.

Facts come from the whole file: from its tokens (`lexical`) and from its syntax tree,
which tells the regions that a token is in and what a name stands for.
"""

import ast
import bisect
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sae_jax.tasks.lexical import Facts, describe_tokens
from sae_jax.tasks.regions import REGIONS, find_regions, walk
from sae_jax.tasks.scopes import ROLES, find_roles
from sae_jax.tasks.tokens import Token, find_lines, read_tokens

_USES = (
    *("attribute", "attribute_of_self", "called", "declared", "keyword_name"),
    *("loaded", "stored"),
)


@dataclass(frozen=True, eq=False)
class Source:
    """A file: its text, its tokens, and by name the facts of them, bool [tokens]."""

    text: str
    tokens: list[Token]
    facts: Facts


def read_source(text: str) -> Source | None:
    """The file's tokens and facts, or None where it is no Python of this version.

    A text with carriage returns is none either: its lines can be counted in two ways.
    """
    if "\r" in text:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in strings
            tree = ast.parse(text)
        tokens, indents = read_tokens(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    places = _Places(text, tokens)
    return Source(
        text,
        tokens,
        describe_tokens(text, tokens, indents)
        | _describe_regions(tree, places)
        | _describe_names(tree, places),
    )


class _Places:
    """Finds the tokens that nodes of the syntax tree begin with, end with or hold."""

    def __init__(self, text: str, tokens: list[Token]):
        self._lines = text.split("\n")
        self._line_starts = find_lines(text)
        self._starts = [token.start for token in tokens]
        self._tokens = tokens

    def span(self, first: ast.AST, last: ast.AST) -> tuple[int, int]:
        """The tokens from `first` to `last`, as a range of indices."""
        start = self._locate(first.lineno, first.col_offset)  # type: ignore
        end = self._locate(last.end_lineno, last.end_col_offset)  # type: ignore
        return bisect.bisect_left(self._starts, start), bisect.bisect_left(
            self._starts, end
        )

    def mark(self, indices: Iterable[int]) -> NDArray[np.bool_]:
        marks = np.zeros(len(self._tokens), bool)
        marks[list(indices)] = True
        return marks

    def cover(self, spans: Iterable[tuple[int, int]]) -> NDArray[np.int64]:
        """How many of the spans each token is in."""
        steps = np.zeros(len(self._tokens) + 1, np.int64)
        for start, end in spans:
            steps[start] += 1
            steps[end] -= 1
        return np.cumsum(steps[:-1])

    def _locate(self, lineno: int, column: int) -> int:
        """The offset in characters of a place that is given in bytes of UTF-8."""
        line = self._lines[lineno - 1]
        if not line.isascii():
            column = len(line.encode()[:column].decode())
        return self._line_starts[lineno - 1] + column


def _describe_regions(tree: ast.Module, places: _Places) -> Facts:
    """`in_<region>` for every region, and which functions and calls are nested."""
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in REGIONS}
    for name, first, last in find_regions(tree):
        spans[name].append(places.span(first, last))
    depths = {name: places.cover(found) for name, found in spans.items()}
    facts = {f"in_{name}": depth_n > 0 for name, depth_n in depths.items()}
    return facts | {
        "in_inner_function": depths["function"] > 1,
        "in_inner_call": depths["argument"] > 1,
    }


def _describe_names(tree: ast.Module, places: _Places) -> Facts:
    """What names stand for, and how they are used."""
    marks: dict[str, list[int]] = {name: [] for name in (*ROLES, *_USES)}
    for role, name in find_roles(tree):
        marks[role].append(places.span(name, name)[0])
    for node in walk(tree):
        for use, index in _list_uses(node, places):
            marks[use].append(index)
    return {name: places.mark(indices) for name, indices in marks.items()}


def _list_uses(node: ast.AST, places: _Places) -> Iterator[tuple[str, int]]:
    """(use, token) of the node's own names."""
    if isinstance(node, ast.Name):
        use = "loaded" if isinstance(node.ctx, ast.Load) else "stored"
        yield use, places.span(node, node)[0]
    elif isinstance(node, ast.Attribute):
        last = places.span(node, node)[1] - 1
        yield "attribute", last
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            yield "attribute_of_self", last
    elif isinstance(node, ast.Call):
        if isinstance(node.func, (ast.Name, ast.Attribute)):
            yield "called", places.span(node.func, node.func)[1] - 1
    elif isinstance(node, ast.arg):
        yield "declared", places.span(node, node)[0]
    elif isinstance(node, ast.keyword) and node.arg:
        yield "keyword_name", places.span(node, node)[0]
