"""Which pieces of a syntax tree a token can be inside: loops, defaults, imports, ...

An f-string is one piece: its fields have different places on different Python versions.
"""

import ast
from collections.abc import Iterator, Sequence

Span = tuple[str, ast.AST, ast.AST]  # a region's name, its first and its last node

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_STRINGS = (str, bytes)
REGIONS = (
    *("annotation", "argument", "assigned", "async_function", "base", "boolean"),
    *("class_body", "compared", "comprehension", "decorator", "default", "display"),
    *("docstring", "else_branch", "except_body", "except_type", "function"),
    *("function_docstring", "if_body", "if_test", "import", "init", "iterable"),
    *("keyword_value", "lambda", "loop", "method", "method_argument"),
    *("raised", "returned", "right_side", "string_argument"),
    *("subscript", "try_body", "with_body", "with_item"),
)


def find_regions(tree: ast.Module) -> Iterator[Span]:
    """Every region of the tree, those inside others too."""
    for node in walk(tree):
        yield from _list_definitions(node)
        yield from _list_statements(node)
        yield from _list_expressions(node)


def walk(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node outside f-strings."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, ast.JoinedStr):
            todo += ast.iter_child_nodes(node)


def _list_definitions(node: ast.AST) -> Iterator[Span]:
    if isinstance(node, (ast.Module, ast.ClassDef, *_FUNCTIONS)) and node.body:
        first = node.body[0]
        value = first.value if isinstance(first, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield "docstring", first, first
            if isinstance(node, _FUNCTIONS):
                yield "function_docstring", first, first
    if isinstance(node, (ast.ClassDef, *_FUNCTIONS)):
        yield from _each("decorator", node.decorator_list)
    if isinstance(node, ast.ClassDef):
        yield from _block("class_body", node.body)
        yield from _each("base", [*node.bases, *node.keywords])
        for method in node.body:
            if isinstance(method, _FUNCTIONS):
                yield from _block("method", method.body)
    if isinstance(node, _FUNCTIONS):
        yield from _block("function", node.body)
        if isinstance(node, ast.AsyncFunctionDef):
            yield from _block("async_function", node.body)
        if node.name == "__init__":
            yield from _block("init", node.body)
        if node.returns:
            yield "annotation", node.returns, node.returns
    if isinstance(node, ast.arguments):
        defaults = [*node.defaults, *node.kw_defaults]
        yield from _each("default", [value for value in defaults if value])
    if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation:
        yield "annotation", node.annotation, node.annotation


def _list_statements(node: ast.AST) -> Iterator[Span]:
    if isinstance(node, (ast.For, ast.AsyncFor, ast.While)):
        yield from _block("loop", node.body)
    if isinstance(node, (ast.For, ast.AsyncFor)):
        yield "iterable", node.iter, node.iter
    elif isinstance(node, ast.If):
        yield "if_test", node.test, node.test
        yield from _block("if_body", node.body)
        # An elif is an If with the place of its keyword, an else's if has its own.
        is_elif = len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If)
        if not (is_elif and node.orelse[0].col_offset == node.col_offset):
            yield from _block("else_branch", node.orelse)
    elif isinstance(node, (ast.Try, ast.TryStar)):
        yield from _block("try_body", node.body)
    elif isinstance(node, ast.ExceptHandler):
        yield from _block("except_body", node.body)
        if node.type:
            yield "except_type", node.type, node.type
    elif isinstance(node, (ast.With, ast.AsyncWith)):
        yield from _block("with_body", node.body)
        yield from _each("with_item", [item.context_expr for item in node.items])
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield "import", node, node
    elif isinstance(node, ast.Return) and node.value:
        yield "returned", node.value, node.value
    elif isinstance(node, ast.Raise):
        yield "raised", node, node
    elif isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)) and node.value:
        yield "assigned", node.value, node.value


def _list_expressions(node: ast.AST) -> Iterator[Span]:
    if isinstance(node, ast.Call):
        values = [keyword.value for keyword in node.keywords if keyword.arg]
        yield from _each("keyword_value", values)
        arguments = [*node.args, *node.keywords]
        yield from _each("argument", arguments)
        if isinstance(node.func, ast.Attribute):
            yield from _each("method_argument", arguments)
        strings = [value for value in [*node.args, *values] if _is_string(value)]
        yield from _each("string_argument", strings)
    elif isinstance(node, ast.Subscript):
        yield "subscript", node.slice, node.slice
    elif isinstance(node, _COMPREHENSIONS):
        yield "comprehension", node, node
    elif isinstance(node, ast.Lambda):
        yield "lambda", node.body, node.body
    elif isinstance(node, ast.Compare):
        yield from _each("compared", node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield from _each("boolean", node.values[1:])
    elif isinstance(node, ast.BinOp):
        yield "right_side", node.right, node.right
    elif isinstance(node, (ast.Dict, ast.List, ast.Set)):
        yield "display", node, node


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, _STRINGS)
    )


def _each(name: str, nodes: Sequence[ast.AST]) -> Iterator[Span]:
    return ((name, node, node) for node in nodes)


def _block(name: str, body: Sequence[ast.stmt]) -> Iterator[Span]:
    """From the first statement, or its decorators, to the last."""
    if body:
        before = getattr(body[0], "decorator_list", [])
        yield name, before[0] if before else body[0], body[-1]
