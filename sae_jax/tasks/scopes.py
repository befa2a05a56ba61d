"""What each name that is read stands for: parameter, local variable, import, ...

Names are looked up as Python does: in the function, then in the functions around it,
then in the module, then among the builtins; a class's own names are seen in its body
alone, a comprehension's in the comprehension.
"""

import ast
import builtins
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SCOPES = (*_FUNCTIONS, *_COMPREHENSIONS, ast.Lambda, ast.ClassDef)
_BUILTINS = frozenset(dir(builtins))
ROLES = (
    *("parameter", "local", "loop_variable", "imported", "builtin"),
    *("module_function", "module_class", "module_variable"),
)


@dataclass(frozen=True)
class _Scope:
    """What is bound in one piece of code, each name by what binds it first."""

    kind: str  # module, class, function, comprehension
    bound: dict[str, str] = field(default_factory=dict)
    around: "_Scope | None" = None
    loops: frozenset[str] = frozenset()  # variables of the `for`s around


def find_roles(tree: ast.Module) -> Iterator[tuple[str, ast.Name]]:
    """(role, name) of every name that is read outside f-strings.

    Of `ROLES` a name may have none, or be a local and a loop_variable.
    """
    module = _Scope("module", _bind(tree.body))
    todo: list[tuple[ast.AST, _Scope]] = [(node, module) for node in tree.body]
    while todo:
        node, scope = todo.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            for role in _look_up(node.id, scope):
                yield role, node
        elif not isinstance(node, ast.JoinedStr):
            todo += _enter(node, scope)


def _enter(node: ast.AST, scope: _Scope) -> Iterator[tuple[ast.AST, _Scope]]:
    """The children of the node, each with the scope that its names are read in."""
    inside: list[ast.AST] = []
    inner = scope
    if isinstance(node, (*_FUNCTIONS, ast.Lambda)):
        body = node.body if isinstance(node.body, list) else [node.body]
        parameters = dict.fromkeys(_list_parameters(node.args), "parameter")
        inside, inner = [*body], _Scope("function", _bind(body) | parameters, scope)
    elif isinstance(node, ast.ClassDef):
        inside, inner = [*node.body], _Scope("class", _bind(node.body), scope)
    elif isinstance(node, _COMPREHENSIONS):
        # The first iterable is evaluated outside.
        first = node.generators[0].iter
        names = frozenset(_bind([each.target for each in node.generators]))
        bound = dict.fromkeys(names, "variable")
        inner = _Scope("comprehension", bound, scope, scope.loops | names)
        inside = [child for child in _flatten(node) if child is not first]
        yield first, scope
    elif isinstance(node, (ast.For, ast.AsyncFor)):
        loops = scope.loops | frozenset(_bind([node.target]))
        inside = [*node.body]
        inner = _Scope(scope.kind, scope.bound, scope.around, loops)
    yield from ((child, inner) for child in inside)
    if not isinstance(node, _COMPREHENSIONS):
        seen = set(map(id, inside))
        for child in ast.iter_child_nodes(node):
            if id(child) not in seen:
                yield child, scope


def _flatten(node: ast.AST) -> Iterator[ast.AST]:
    """A comprehension's parts, and those of its `for`s."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.comprehension):
            yield from ast.iter_child_nodes(child)
        else:
            yield child


def _look_up(name: str, scope: _Scope) -> Iterator[str]:
    if name in scope.loops:
        yield "loop_variable"
    found: _Scope | None = scope
    while found and (
        name not in found.bound or (found.kind == "class" and found is not scope)
    ):
        found = found.around
    if found is None:
        if name in _BUILTINS:
            yield "builtin"
    elif found.bound[name] in ("imported", "parameter"):
        yield found.bound[name]
    elif found.kind == "function" and found.bound[name] == "variable":
        yield "local"
    elif found.kind == "module":
        yield "module_" + found.bound[name]


def _list_parameters(args: ast.arguments) -> list[str]:
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    return [arg.arg for arg in every if arg]


def _bind(nodes: Iterable[ast.AST]) -> dict[str, str]:
    """The names that the nodes bind, outside scopes of their own, and what they are.

    Of several bindings of a name the first counts.
    """
    bound: dict[str, str] = {}
    elsewhere: set[str] = set()
    todo = [*nodes][::-1]
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            elsewhere.update(node.names)
        for name, kind in _bound_by(node):
            bound.setdefault(name, kind)
        if not isinstance(node, _SCOPES):
            todo += [*ast.iter_child_nodes(node)][::-1]
    return {name: kind for name, kind in bound.items() if name not in elsewhere}


def _bound_by(node: ast.AST) -> list[tuple[str, str]]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        names = (alias.asname or alias.name.split(".")[0] for alias in node.names)
        return [(name, "imported") for name in names]
    if isinstance(node, _FUNCTIONS):
        return [(node.name, "function")]
    if isinstance(node, ast.ClassDef):
        return [(node.name, "class")]
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        return [(node.id, "variable")]
    if isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
        return [(node.name, "variable")]
    return []
