"""The package's modules import downwards only, and importing it does nothing else.

A module imports from lower floors, or from its own floor so long as no circle closes.
A room that is missing here fails: give it a floor.
"""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sae_jax"
FLOORS = (
    (
        "config",
        "files",
        "writers",
        "progress",
        "exits",
        "interrupt",
        "watch",
        "processes",
    ),
    (
        "mesh",
        "checksum",
        "store",
        "mirror",
        "normalize",
        "losses",
        "scaling",
        "logistic",
        "directions",
        "matching",
        "firing",
        "geometric_median",
        "optim",
        "dead_latents",
        "kernels",
        "topk",
        "matmul",
        "sparse",
        "text",
    ),
    ("saes", "loader", "subjects", "packing", "tasks"),
    ("state", "formats", "readout", "harvest", "stream", "diagnostics"),
    ("gradients", "bucket", "checkpoint", "resample"),
    ("step",),
    ("run", "header", "resume", "loop", "evals", "baselines", "plan"),
    (
        "viewer",
        "plots",
        "pages",
        "report",
        "inspection",
        "evaluation",
        "compare",
        "quickstart",
    ),
    ("", "cli"),  # "" is sae_jax/__init__.py
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def _modules() -> dict[str, Path]:
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        modules[".".join(p for p in parts if p != "__init__")] = path
    return modules


def _imports(source: str, name: str, is_package: bool, modules: set[str]) -> set[str]:
    """Dotted names that a module imports, at any depth of its code.

    `from a import b` is an import of a.b where that is a module, else of a.
    """
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            here = name.split(".")
            base = here[: len(here) - node.level + is_package] if node.level else []
            source_name = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names:
                member = f"{source_name}.{alias.name}"
                imported.add(member if member in modules else source_name)
    return imported


def _floor(name: str) -> int:
    room = name.removeprefix("sae_jax").removeprefix(".").split(".")[0]
    assert room in FLOOR_OF, f"{name}: room {room!r} has no floor in {__file__}"
    return FLOOR_OF[room]


def _faults(imports: dict[str, set[str]]) -> list[str]:
    """Imports from a higher floor, and circles on one floor, in plain words."""
    faults, beside = [], {}
    for name, imported in imports.items():
        own = {other for other in imported if other.split(".")[0] == "sae_jax"}
        for other in sorted(own):
            if _floor(other) > _floor(name):
                faults.append(
                    f"{name} (floor {_floor(name)}) imports {other} "
                    f"(floor {_floor(other)})"
                )
        beside[name] = {o for o in own if _floor(o) == _floor(name)}
        for other in sorted(imported - own):
            if other.split(".")[0] in ("experiments", "tests", "oracle"):
                faults.append(f"{name} imports {other}")
    try:
        graphlib.TopologicalSorter(beside).prepare()
    except graphlib.CycleError as error:
        faults.append("a circle: " + " <- ".join(error.args[1]))
    return faults


def test_modules_import_from_lower_floors_only():
    modules = _modules()
    imports = {
        name: _imports(
            path.read_text(), name, path.name == "__init__.py", set(modules)
        )
        for name, path in modules.items()
    }
    assert any(imports.values())
    assert not _faults(imports)


@pytest.mark.parametrize(
    ("imports", "fault"),
    [
        ({"sae_jax.mesh": {"sae_jax.config", "jax"}}, None),
        ({"sae_jax.mesh": {"sae_jax.saes.topk"}}, "(floor 1) imports sae_jax.saes"),
        ({"sae_jax.loop": {"sae_jax"}}, "sae_jax.loop (floor 6) imports sae_jax "),
        ({"sae_jax.plan": {"experiments.laptop"}}, "imports experiments.laptop"),
        (
            {"sae_jax.mesh": {"sae_jax.optim"}, "sae_jax.optim": {"sae_jax.mesh"}},
            "a circle",
        ),
    ],
)
def test_the_check_finds_faults(imports, fault):
    faults = _faults(imports)
    assert not faults if fault is None else fault in faults[0]


@pytest.mark.parametrize(
    ("source", "imported"),
    [
        ("import sae_jax.mesh as m", {"sae_jax.mesh"}),
        ("from sae_jax import mesh, load", {"sae_jax.mesh", "sae_jax"}),
        ("def f():\n    from sae_jax.saes.topk import T", {"sae_jax.saes.topk"}),
        ("from . import topk", {"sae_jax.saes.topk"}),
        ("from .. import mesh", {"sae_jax.mesh"}),
        ("from .topk import T", {"sae_jax.saes.topk"}),
    ],
)
def test_imports_are_read_from_any_form(source, imported):
    modules = {"sae_jax", "sae_jax.mesh", "sae_jax.saes", "sae_jax.saes.topk"}
    assert _imports(source, "sae_jax.saes", True, modules) == imported
    if "from ." in source:
        assert _imports(source, "sae_jax.saes.code", False, modules) == imported


IMPORT_ALL = """
import sys
import jax
from absl import flags
for name in sys.argv[1:]:
    __import__(name)
assert not jax._src.xla_bridge.backends_are_initialized(), "a backend was started"
modules = flags.FLAGS.flags_by_module_dict()
own = [m for m in modules if m.split(".")[0] == "sae_jax" and modules[m]]
assert not own, f"flags were defined by {own}"
"""


def test_importing_starts_no_backend_and_defines_no_flag():
    """Every module but the commands, so that no order of imports matters."""
    names = [name for name in _modules() if ".cli" not in name]
    subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *names],
        check=True,
        cwd=PACKAGE.parent,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def test_a_process_that_only_waits_imports_no_jax():
    """One waits for each process of a pod: jax would take 0.2 GB of its host."""
    program = "import sae_jax.cli.train, sys; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PACKAGE.parent)


def test_every_public_name_is_there():
    import sae_jax

    assert {getattr(sae_jax, name).__name__ for name in sae_jax.__all__} == {
        *sae_jax.__all__
    }
    assert set(sae_jax.__all__) <= set(dir(sae_jax))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        sae_jax.lode
