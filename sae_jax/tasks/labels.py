"""The binary tasks about Python source: a table.

A task asks one question of the tokens of a population. The population is chosen so that
the answer takes the context: names are told from other names, words of text from other
words of text, and where one spelling has several uses, that spelling is the population.
Facts are those of `sae_jax.tasks.source`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sae_jax.tasks.lexical import Facts

# By population: the facts that make it (-fact: that must not hold), and its tasks, each
# a name, the fact that is the label, and what is so of a token that is positive.
_TABLE: dict[str, tuple[str, tuple[tuple[str, str, str], ...]]] = {
    "names in functions": (
        "name in_function",
        (
            ("loop_body", "in_loop", "is in the body of a loop"),
            ("if_body", "in_if_body", "is in the body of an if or elif"),
            ("else_branch", "in_else_branch", "is in the else of an if"),
            ("try_body", "in_try_body", "is in the body of a try"),
            ("except_body", "in_except_body", "is in the body of an except"),
            ("with_body", "in_with_body", "is in the body of a with"),
            ("inner_function", "in_inner_function", "is in a function in a function"),
            ("method", "in_method", "is in a method of a class"),
            ("async_function", "in_async_function", "is in an async function"),
            ("returned", "in_returned", "is in the value of a return"),
            ("raised", "in_raised", "is in a raise statement"),
            ("if_test", "in_if_test", "is in the test of an if or elif"),
            ("except_type", "in_except_type", "is in what an except catches"),
            ("iterable", "in_iterable", "is in what a for statement goes through"),
            ("with_item", "in_with_item", "is in what a with opens"),
            ("assigned_value", "in_assigned", "is in a value that is assigned"),
            ("argument", "in_argument", "is in the arguments of a call"),
            ("compared", "in_compared", "is to the right of a comparison"),
            ("boolean", "in_boolean", "is to the right of an `and` or `or`"),
            ("right_side", "in_right_side", "is to the right of +, -, %, or the like"),
            ("lambda_body", "in_lambda", "is in the body of a lambda"),
            ("attribute", "attribute", "is an attribute"),
            ("bracketed", "bracketed", "is in brackets"),
            ("indented_twice", "indented_twice", "is in two blocks or more"),
            ("indented_thrice", "indented_thrice", "is in three blocks or more"),
            ("first_of_line", "first_of_line", "is the first token of its statement"),
            ("block_end", "last_of_block", "is in the last statement of its block"),
            ("then_newline", "then_newline", "ends its line"),
            ("then_call", "then_opening", "is followed by ("),
            ("then_dot", "then_dot", "is followed by a dot"),
            ("then_equals", "then_equals", "is followed by ="),
            ("then_colon", "then_colon", "is followed by a colon"),
        ),
    ),
    "names in methods": (
        "name in_method",
        (("init_method", "in_init", "is in __init__"),),
    ),
    "names outside functions": (
        "name -in_function",
        (
            ("import", "in_import", "is in an import"),
            ("decorator", "in_decorator", "is in a decorator"),
            ("class_body", "in_class_body", "is in the body of a class"),
            ("base_class", "in_base", "is in the bases of a class"),
            ("annotation", "in_annotation", "is in an annotation"),
        ),
    ),
    "names in brackets": (
        "name bracketed",
        (
            ("comprehension", "in_comprehension", "is in a comprehension"),
            ("subscript", "in_subscript", "is in a subscript"),
            ("display", "in_display", "is in a list, set or dictionary"),
            ("declared", "declared", "is a parameter that is declared"),
            ("continued_line", "continued", "is not on its statement's first line"),
            ("then_closing", "then_closing", "is followed by a closing bracket"),
            ("then_comma", "then_comma", "is followed by a comma"),
        ),
    ),
    "names in arguments of calls": (
        "name in_argument",
        (
            ("keyword_name", "keyword_name", "is the keyword of an argument"),
            ("keyword_value", "in_keyword_value", "is in a keyword's value"),
            ("inner_call", "in_inner_call", "is in a call in a call"),
            ("method_argument", "in_method_argument", "is in a method's arguments"),
        ),
    ),
    "names that are read": (
        "name loaded",
        (
            ("imported", "imported", "was imported"),
            ("module_function", "module_function", "is a function of this file"),
            ("builtin", "builtin", "is a builtin"),
        ),
    ),
    "names that are read in functions": (
        "name loaded in_function",
        (
            ("parameter", "parameter", "is a parameter of a function around it"),
            ("local", "local", "is a local variable of a function around it"),
            ("module_variable", "module_variable", "is a variable of the module"),
            ("loop_variable", "loop_variable", "is the variable of a for around it"),
        ),
    ),
    "capitalised names that are read": (
        "name loaded capital",
        (("own_class", "module_class", "is a class of this file"),),
    ),
    "names that are attributes": (
        "name attribute",
        (
            ("of_self", "attribute_of_self", "is an attribute of self"),
            ("method_called", "called", "is called"),
        ),
    ),
    "names that open a statement": (
        "name first_of_line",
        (("assigned", "stored", "is assigned to"),),
    ),
    "names": (
        "name",
        (("seen_before", "seen_before", "occurs before in the text"),),
    ),
    "names and constants after = in brackets": (
        "value after_equals bracketed",
        (("default", "in_default", "is the default of a parameter"),),
    ),
    "names and constants in brackets": (
        "value bracketed",
        (("bracketed_twice", "bracketed_twice", "is in two pairs or more"),),
    ),
    "names and constants in two pairs of brackets": (
        "value bracketed_twice",
        (("bracketed_thrice", "bracketed_thrice", "is in three pairs or more"),),
    ),
    "words in comments and strings": (
        "text",
        (
            ("docstring", "in_docstring", "is in a docstring"),
            ("comment", "comment", "is in a comment"),
        ),
    ),
    "words in comments": (
        "comment",
        (("own_line_comment", "own_line", "is in a comment on its own line"),),
    ),
    "words in docstrings": (
        "text in_docstring",
        (("function_docstring", "in_function_docstring", "is in that of a function"),),
    ),
    "words in strings that are no docstrings": (
        "string -in_docstring",
        (
            ("f_string", "formatted", "is in an f-string"),
            ("string_argument", "in_string_argument", "is in an argument of a call"),
            ("single_quoted", "single_quoted", "is in a string in single quotes"),
        ),
    ),
    "`-` between blanks": (
        "'-' spaced",
        (("subtraction", "after_operand", "subtracts, and is no sign"),),
    ),
    "`*` after a blank": (
        "'*' spaced",
        (("multiplication", "after_operand", "multiplies, and does not unpack"),),
    ),
    "`,` after a word and before a blank": (
        "',' joined then_blank",
        (("argument_comma", "in_call", "separates the arguments of a call"),),
    ),
    "`:` after a word and before a blank": (
        "':' joined then_blank",
        (("header_colon", "ends_header", "ends the header of a block"),),
    ),
    "`if`": ("'if'", (("if_statement", "opens_statement", "opens a statement"),)),
    "`for`": ("'for'", (("for_statement", "opens_statement", "opens a statement"),)),
    "`in`": ("'in'", (("in_of_for", "for_in", "belongs to a for"),)),
    "`else` that opens a line": (
        "'else' first_of_line",
        (("else_of_if", "else_of_if", "belongs to an if"),),
    ),
    "`as`": ("'as'", (("as_of_import", "in_import", "is in an import"),)),
    "`None`": (
        "'None'",
        (
            ("none_default", "in_default", "is the default of a parameter"),
            ("none_argument", "in_argument", "is in the arguments of a call"),
        ),
    ),
}


@dataclass(frozen=True)
class Task:
    """A question about the tokens of a population, in words and by facts."""

    name: str
    meaning: str
    among: str
    label: str
    population: tuple[str, ...]


TASKS = tuple(
    Task(name, meaning, among, label, tuple(population.split()))
    for among, (population, tasks) in _TABLE.items()
    for name, label, meaning in tasks
)
_BY_NAME = {task.name: task for task in TASKS}

# Pairs of tasks of one population: one is wanted, the other spurious.
PAIRS: tuple[tuple[Task, Task], ...] = tuple(
    (_BY_NAME[wanted], _BY_NAME[spurious])
    for wanted, spurious in (
        ("loop_body", "method"),
        ("method", "loop_body"),
        ("if_body", "argument"),
        ("argument", "if_body"),
        ("attribute", "if_body"),
        ("if_body", "attribute"),
        ("bracketed", "method"),
        ("method", "bracketed"),
        ("assigned_value", "attribute"),
        ("then_newline", "method"),
    )
)


def split_classes(
    task: Task, facts: Facts
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which tokens of the task's population are negative, and which positive."""
    label_n = facts[task.label]
    belongs_n = np.ones(len(label_n), bool)
    for fact in task.population:
        holds_n = facts[fact.removeprefix("-")]
        belongs_n &= ~holds_n if fact.startswith("-") else holds_n
    return np.flatnonzero(belongs_n & ~label_n), np.flatnonzero(belongs_n & label_n)


def split_kinds(
    pair: tuple[Task, Task], facts: Facts
) -> tuple[NDArray[np.int64], ...]:
    """Tokens with neither of a pair, with the wanted, the spurious, and both."""
    wanted, spurious = (split_classes(task, facts) for task in pair)
    return tuple(
        np.intersect1d(wanted[label], spurious[other])
        for other in (0, 1)
        for label in (0, 1)
    )
