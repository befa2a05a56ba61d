"""Python source as a flat list of tokens, each with its brackets, indent and line.

Words inside strings and comments are tokens of their own, behind the string or comment
that holds them. An f-string is one string, fields and all, on every Python version.
"""

import io
import keyword
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass

# Between letters, digits and underscores there is no word; behind a backslash there
# may be an escape.
_WORD = re.compile(r"(?<![\\\w])[A-Za-z]{2,}(?!\w)")
_OPENING = re.compile(r"[A-Za-z]*('''|\"\"\"|'|\")")
_CLOSED_BY = {")": "(", "]": "[", "}": "{"}
CONSTANTS = frozenset({"None", "True", "False"})
_IGNORED = frozenset(
    {tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
)
# What begins and ends an f-string that is tokenised into parts (Python 3.12).
_FSTRING_START = getattr(tokenize, "FSTRING_START", None)
_FSTRING_END = getattr(tokenize, "FSTRING_END", None)


@dataclass(frozen=True)
class Token:
    """One token, or one word of a string or comment; offsets are in characters."""

    kind: str  # name, keyword, number, operator, string, comment, word
    text: str
    start: int
    end: int
    whole: int  # where the string or comment that holds the word starts
    brackets: tuple[str, ...]  # open around it: call, header, group, subscript, ...
    indent: int  # blocks around its logical line
    line: int  # the logical line's number
    before: str  # the code token before it, "" for none: not a comment, not a word
    is_operand: bool  # whether what comes before it can be an operator's left side


def read_tokens(text: str) -> tuple[list[Token], list[int]]:
    """The tokens in order, and the indent of every logical line.

    Raises:
        SyntaxError: the text is not tokens of Python.
    """
    starts = find_lines(text)
    tokens: list[Token] = []
    indents: list[int] = []
    brackets: list[str] = []
    indent, header, before = 0, "", ("", "")
    for kind, start, end in _merge_fstrings(text, starts):
        if kind == tokenize.INDENT:
            indent += 1
        elif kind == tokenize.DEDENT:
            indent -= 1
        elif kind == tokenize.NEWLINE:
            indents.append(indent)
            before, header = ("", ""), ""
        if kind in _IGNORED or kind == tokenize.NEWLINE:
            continue
        string = text[start:end]
        name = _name_kind(kind, string)
        if string in _CLOSED_BY and brackets:
            brackets.pop()
        common = (tuple(brackets), indent, len(indents), before[1])
        operand = _is_operand(*before)
        tokens.append(Token(name, string, start, end, start, *common, operand))
        if name in ("string", "comment"):
            for first, last in _find_words(name, string):
                span = (string[first:last], start + first, start + last, start)
                tokens.append(Token("word", *span, *common, operand))
        if string in _CLOSED_BY.values():
            # A def's or class's own brackets are no call; those inside them may be.
            is_call = bool(brackets) or header not in ("def", "class")
            brackets.append(_name_bracket(string, operand, is_call))
        if name != "comment":
            header = string if before[1] in ("", "async") else header
            before = (name, string)
    return tokens, [*indents, 0, 0]  # for comments behind the last line


def find_lines(text: str) -> list[int]:
    """The offset at which each line starts."""
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    return starts


def _merge_fstrings(text: str, starts: list[int]) -> Iterator[tuple[int, int, int]]:
    """(type, start, end) of every token, f-strings in one piece."""
    depth, opened = 0, 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            start = starts[token.start[0] - 1] + token.start[1]
            end = starts[token.end[0] - 1] + token.end[1]
            if token.type == _FSTRING_START:
                opened = opened if depth else start
                depth += 1
            elif token.type == _FSTRING_END:
                depth -= 1
                if not depth:
                    yield tokenize.STRING, opened, end
            elif not depth:
                if token.string.strip() and text[start:end] != token.string:
                    raise SyntaxError(f"offset {start}: not where the token is")
                yield token.type, start, end
    except tokenize.TokenError as error:
        raise SyntaxError(str(error)) from error


def _name_kind(kind: int, string: str) -> str:
    if kind == tokenize.NAME:
        return "keyword" if keyword.iskeyword(string) else "name"
    kinds = {
        tokenize.NUMBER: "number",
        tokenize.STRING: "string",
        tokenize.COMMENT: "comment",
    }
    return kinds.get(kind, "operator")


def _is_operand(kind: str, string: str) -> bool:
    return (
        kind in ("name", "number", "string")
        or string in CONSTANTS
        or string in _CLOSED_BY
    )


def _name_bracket(string: str, is_operand: bool, is_call: bool) -> str:
    """What an opening bracket opens."""
    if string == "(" and is_operand:
        return "call" if is_call else "header"
    if string == "[":
        return "subscript" if is_operand else "list"
    return "braces" if string == "{" else "group"


def _find_words(kind: str, string: str) -> Iterator[tuple[int, int]]:
    opening = _OPENING.match(string) if kind == "string" else None
    for word in _WORD.finditer(string, opening.end() if opening else 0):
        yield word.span()
