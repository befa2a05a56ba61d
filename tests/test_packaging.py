"""What a user gets before any of our code runs: metadata, scripts, wheel, README."""

import ast
import configparser
import fcntl
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("launch/environment.sh", "launch/quickstart.sh", "tests/run.sh", ".ci/run")
SHIPPED = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "sae_jax", "launch")

# Acts as python, as the python and the pip of the .venv it makes, and as sae-jax;
# writes down what it installs.
FAKE_PYTHON = f"""#!/bin/sh
case "$1 $2" in
  "-c import fcntl"*) exec {sys.executable} "$@" ;;
  "-c import sys; sys.exit"*) exit ${{FAKE_MISFIT:-0}} ;;
  "-c import sys; print"*) echo 3.12 ;;
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/sae-jax" ;;
  "-m pip") [ "$3" = --version ] || echo "$@" >>"$FAKE_LOG"
    exit ${{FAKE_FAILURE:-0}} ;;
  quickstart*) echo "ran: $@" ;;
  *) exit 3 ;;
esac
"""
FAKE_UV = """#!/bin/sh
[ "$1" = --version ] || {{ echo "$@" >>"$FAKE_LOG"; exit {}; }}
"""


def read_setup() -> configparser.ConfigParser:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup


def requirement_names(text: str) -> set[str]:
    """Distribution names, normalised, of requirements one a line."""
    lines = filter(None, text.splitlines())
    return {re.split(r"[<>=\[]", line)[0].lower().replace("_", "-") for line in lines}


def test_pyproject_says_only_how_to_build():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project) == {"build-system"}


def test_extras_are_the_documented_ones():
    extras = set(read_setup()["options.extras_require"])
    assert extras == {"cuda", "tpu", "torch", "text", "test"}
    build = (ROOT / "BUILD.md").read_text()
    assert all(f"`{extra}`" in build for extra in extras)


def test_every_import_is_required_and_every_requirement_imported():
    """`torch` and `transformers` come from an extra and are imported where used."""
    imported = set()
    for path in (ROOT / "sae_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    imported -= {"sae_jax", "torch", "transformers"} | set(sys.stdlib_module_names)
    distributions = importlib.metadata.packages_distributions()
    used = {distributions[name][0].lower().replace("_", "-") for name in imported}
    assert used == requirement_names(read_setup()["options"]["install_requires"])


def test_readme_lists_every_file_of_the_package():
    package = ROOT / "sae_jax"
    there = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    there = {re.sub(r"^subjects/default/.*", "subjects/default/", p) for p in there}
    tree = re.search(r"```text\nsae_jax/\n(.*?)```", read_readme(), re.DOTALL)
    assert tree is not None
    listed, folders = set(), {0: ""}
    for line in filter(None, tree[1].splitlines()):
        depth = len(line) - len(line.lstrip())
        path = folders[depth - 2 if depth > 2 else 0] + line.split()[0]
        folders[depth] = path
        listed.add(path)
    listed -= {path for path in listed if path.endswith("/")} - {"subjects/default/"}
    assert listed == there


def read_readme() -> str:
    return (ROOT / "README.md").read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_parses_and_names_no_index(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    assert not re.search(r"https?://|index-url", (ROOT / script).read_text())
    assert script == "launch/environment.sh" or os.access(ROOT / script, os.X_OK)


class Sandbox:
    """A repository with a space in its path, where a fake Python installs."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a repository"
        self.log = folder / "installs.log"
        self.bin = folder / "bin"
        (self.root / "launch").mkdir(parents=True)
        for name in ("setup.cfg", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        for script in ("environment.sh", "quickstart.sh"):
            shutil.copy(ROOT / "launch" / script, self.root / "launch")
        self.bin.mkdir()
        self.write("python3", FAKE_PYTHON)
        self.write("uv", "#!/bin/sh\necho no such version >&2\nexit 127\n")

    def write(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    @property
    def lock(self) -> Path:
        return self.root / ".venv.lock"

    def start(self, **environment: str) -> subprocess.Popen[str]:
        inherited = {"PATH": f"{self.bin}:/usr/bin:/bin", "FAKE_LOG": str(self.log)}
        return subprocess.Popen(
            ["bash", self.root / "launch/quickstart.sh", "--flag=a b"],
            env=inherited | environment,
            cwd=self.bin,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(**environment)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess("", process.returncode, out, err)

    def installs(self) -> int:
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


def test_second_launch_installs_nothing_until_setup_changes(sandbox):
    for _ in range(2):
        done = sandbox.run()
        assert done.stdout == "ran: quickstart --flag=a b\n", done.stderr
        assert sandbox.installs() == 1
    with open(sandbox.root / "setup.cfg", "a") as setup:
        setup.write("\n# another requirement\n")
    assert sandbox.run().returncode == 0
    assert sandbox.installs() == 2
    assert sandbox.lock.stat().st_size == 0


def test_uv_installs_where_it_works_and_pip_where_it_fails(sandbox):
    sandbox.write("uv", FAKE_UV.format(0))
    assert sandbox.run().returncode == 0
    assert sandbox.log.read_text().startswith("pip install --python ")
    assert sandbox.installs() == 1
    shutil.rmtree(sandbox.root / ".venv")
    sandbox.write("uv", FAKE_UV.format(1))
    assert sandbox.run().returncode == 0
    assert sandbox.log.read_text().splitlines()[2].startswith("-m pip install ")


@pytest.mark.parametrize("is_runnable", [True, False])
def test_half_made_venv_is_made_anew(sandbox, is_runnable):
    """One of a killed install (its lock is left), and one whose Python is gone."""
    assert sandbox.run().returncode == 0
    left = sandbox.root / ".venv" / "left"
    left.touch()
    if is_runnable:
        sandbox.lock.write_text("installing\n")
    else:
        (sandbox.root / ".venv/bin/python").unlink()
    assert sandbox.run().returncode == 0
    assert not left.exists()
    assert sandbox.installs() == 2


def test_those_who_wait_for_an_install_install_nothing(sandbox):
    """All find a half-made .venv; the first makes it anew, and the rest use that."""
    assert sandbox.run().returncode == 0
    sandbox.lock.write_text("installing\n")
    with open(sandbox.lock) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = [sandbox.start() for _ in range(4)]
        for process in waiting:
            assert process.stderr.readline().startswith("waiting for the install")
        assert (sandbox.root / ".venv/bin/python").exists()
    outs = [process.communicate(timeout=60) for process in waiting]
    assert [out for out, _ in outs] == 4 * ["ran: quickstart --flag=a b\n"]
    assert sum("cut off" in err for _, err in outs) == 1
    assert sandbox.installs() == 2


def test_failed_install_is_told_and_tried_again(sandbox):
    failed = sandbox.run(FAKE_FAILURE="1")
    assert failed.returncode == 1
    assert "the install failed" in failed.stderr.splitlines()[-1]
    assert sandbox.run().returncode == 0


def test_no_python_that_fits_is_one_line(sandbox):
    for version in ("3.11", "3.12", "3.13"):
        sandbox.write(f"python{version}", FAKE_PYTHON)
    for environment in ({}, {"PYTHON": "python3"}):
        failed = sandbox.run(FAKE_MISFIT="1", **environment)
        assert failed.returncode == 1
        assert len(failed.stderr.splitlines()) == 1
        assert "3.11, 3.12 or 3.13" in failed.stderr
        assert not sandbox.lock.exists()


@pytest.mark.parametrize("is_module_wide", [True, False])
def test_full_run_fails_on_a_skip_for_a_missing_package(tmp_path, is_module_wide):
    skip = "pytest.importorskip('no_such_package')"
    body = f"{skip}\ndef test(): pass" if is_module_wide else f"def test(): {skip}"
    (tmp_path / "test_it.py").write_text(f"import pytest\n{body}\n")
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "test_it.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    for arguments, status in (([], {0, 5}), (["-p", "refuse_skips"], {1, 2})):
        done = subprocess.run(
            command + arguments, cwd=tmp_path, env=environment, capture_output=True
        )
        assert done.returncode in status, done.stdout


@pytest.fixture
def shipped(tmp_path):
    """A copy of the tree: a build in place would leave its folders in the real one."""
    root = tmp_path / "a copy"
    root.mkdir()
    for name in SHIPPED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / name)
    return root


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wheel_works_in_an_empty_folder(shipped, tmp_path):
    empty, venv = tmp_path / "empty", tmp_path / "venv"
    empty.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=empty, env=environment, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "venv", venv)
    pip = (venv / "bin/python", "-m", "pip")
    run(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, shipped)
    run(*pip, "install", next(tmp_path.glob("*.whl")))
    code = (
        "import sae_jax, pathlib; print(pathlib.Path(sae_jax.__file__).parent);"
        "from sae_jax.subjects import load_subject; load_subject()"
    )
    package = Path(run(venv / "bin/python", "-c", code).strip())
    assert package.is_relative_to(venv)
    for name in ("py.typed", "pages/report.html", "subjects/default/model.safetensors"):
        assert (package / name).is_file()
    assert "quickstart" in run(venv / "bin/sae-jax", "--help")
    assert "--workdir" in run(venv / "bin/sae-jax", "train", "--help")
    assert not list(empty.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quickstart_launches_from_another_folder(shipped, tmp_path):
    for _ in range(2):
        done = subprocess.run(
            ["bash", shipped / "launch/quickstart.sh", "--help"],
            env=os.environ | {"PYTHON": sys.executable},
            cwd=tmp_path,
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        assert "sae_jax.cli.quickstart" in done.stdout
    assert "installing" not in done.stderr
