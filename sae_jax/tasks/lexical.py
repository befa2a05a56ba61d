"""Facts that the tokens alone give: kind, brackets, line, neighbours, use of operators.

Each is an array of booleans, one a token.
"""

import bisect
import re
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from sae_jax.tasks.tokens import CONSTANTS, Token, find_lines

Facts = dict[str, NDArray[np.bool_]]

# Tokens of one spelling and several uses.
_AMBIGUOUS = ("-", "*", ",", ":", "if", "for", "in", "else", "as", "None")
_EQUALS = re.compile(r" ?=(?!=)")
_HEADERS = frozenset(
    ["if", "elif", "else", "for", "while", "def", "class", "with", "try", "except"]
    + ["finally", "async", "match", "case"]
)
_IFS = ("if", "elif")


def describe_tokens(text: str, tokens: list[Token], indents: list[int]) -> Facts:
    """The facts of the text's tokens; `indents` are those of its logical lines."""
    depth_n = np.array([len(token.brackets) for token in tokens], int)
    indent_n = np.array([token.indent for token in tokens], int)
    facts = {
        # What ends in an underscore may share a subject's token with what follows.
        "name": _tell(
            t.kind == "name" and t.text not in ("self", "cls") and t.text[-1].isalnum()
            for t in tokens
        ),
        "number": _tell(t.kind == "number" for t in tokens),
        "constant": _tell(t.text in CONSTANTS for t in tokens),
        "capital": _tell(t.text[0].isupper() for t in tokens),
        "bracketed": depth_n > 0,
        "bracketed_twice": depth_n > 1,
        "bracketed_thrice": depth_n > 2,
        "in_call": _tell(t.brackets[-1:] == ("call",) for t in tokens),
        "indented_twice": indent_n > 1,
        "indented_thrice": indent_n > 2,
        "first_of_line": _tell(t.kind != "word" and not t.before for t in tokens),
        "last_of_block": _tell(indents[t.line] > indents[t.line + 1] for t in tokens),
        "continued": _tell(_find_continued(text, tokens)),
        "after_operand": _tell(t.is_operand for t in tokens),
        "after_equals": _tell(t.before == "=" for t in tokens),
        "opens_statement": _tell(t.before in ("", "async") for t in tokens),
        "for_in": _tell(_find_for_in(tokens)),
        "ends_header": _tell(_find_header_ends(tokens)),
        "else_of_if": _tell(_find_else_of_if(tokens)),
    }
    facts["value"] = facts["name"] | facts["number"] | facts["constant"]
    for string in _AMBIGUOUS:
        facts[f"'{string}'"] = _tell(
            t.kind != "word" and t.text == string for t in tokens
        )
    return facts | _describe_neighbours(text, tokens) | _describe_words(text, tokens)


def _tell(holds: Iterable[bool]) -> NDArray[np.bool_]:
    return np.fromiter(holds, bool)


def _describe_neighbours(text: str, tokens: list[Token]) -> Facts:
    """The characters right before and behind each token."""
    before = [text[token.start - 1 : token.start] for token in tokens]
    behind_n = np.array([text[token.end : token.end + 1] for token in tokens], "U1")
    return {
        "spaced": _tell(character == " " for character in before),
        "joined": _tell(character.isalnum() for character in before),
        "then_closing": np.isin(behind_n, [")", "]", "}"]),
        "then_opening": behind_n == "(",
        "then_newline": behind_n == "\n",
        "then_blank": np.isin(behind_n, [" ", "\n"]),
        "then_dot": behind_n == ".",
        "then_comma": behind_n == ",",
        "then_colon": behind_n == ":",
        "then_equals": _tell(_EQUALS.match(text, t.end) is not None for t in tokens),
    }


def _describe_words(text: str, tokens: list[Token]) -> Facts:
    """Of the words in strings and comments: what they are in."""
    # What opens the string, as rb' or f", or # for a comment.
    openings = [
        text[t.whole : t.start].partition(quote)[0].lower() + quote
        if t.kind == "word" and (quote := _find_quote(text, t))
        else ""
        for t in tokens
    ]
    own_line = [
        opening == "#" and not text[text.rfind("\n", 0, t.whole) + 1 : t.whole].strip()
        for opening, t in zip(openings, tokens, strict=True)
    ]
    return {
        "text": _tell(t.kind == "word" for t in tokens),
        "string": _tell(opening[-1:] in ("'", '"') for opening in openings),
        "comment": _tell(opening == "#" for opening in openings),
        "formatted": _tell("f" in opening for opening in openings),
        "single_quoted": _tell(opening.endswith("'") for opening in openings),
        "own_line": _tell(own_line),
    }


def _find_quote(text: str, token: Token) -> str:
    return next(c for c in text[token.whole : token.start] if c in "#'\"")


def _find_continued(text: str, tokens: list[Token]) -> Iterator[bool]:
    """Whether the token is behind the first line break of its logical line."""
    starts = find_lines(text)
    first, line = 0, -1
    for token in tokens:
        row = bisect.bisect_right(starts, token.start)
        if token.line != line and token.kind not in ("word", "comment"):
            first, line = row, token.line
        yield row > first


def _find_for_in(tokens: list[Token]) -> Iterator[bool]:
    """Whether an `in` belongs to a `for`, and is no test of membership."""
    pending: set[int] = set()  # how many brackets are around a `for` without its `in`
    for token in tokens:
        depth = len(token.brackets)
        if token.kind == "keyword" and token.text == "for":
            pending.add(depth)
        yield token.text == "in" and depth in pending
        if token.kind == "keyword" and token.text == "in":
            pending.discard(depth)


def _find_header_ends(tokens: list[Token]) -> Iterator[bool]:
    """Whether a colon ends the header of a block: an `if`, a `def`, ..."""
    header, n_lambdas, is_over = "", 0, False
    for token in tokens:
        if token.kind in ("word", "comment"):
            yield False
            continue
        if not token.before:
            header, n_lambdas, is_over = token.text, 0, False
        is_open = not token.brackets and header in _HEADERS and not is_over
        n_lambdas += is_open and token.text == "lambda"
        is_colon = is_open and token.text == ":"
        yield is_colon and not n_lambdas
        is_over |= is_colon and not n_lambdas
        n_lambdas -= is_colon and n_lambdas > 0


def _find_else_of_if(tokens: list[Token]) -> Iterator[bool]:
    """Whether an `else` that opens a line belongs to an `if`."""
    headers: dict[int, str] = {}  # by indent, what the last line began with
    for token in tokens:
        opens = token.kind == "keyword" and not token.before
        yield opens and token.text == "else" and headers.get(token.indent) in _IFS
        if token.kind not in ("word", "comment") and not token.before:
            headers[token.indent] = token.text
