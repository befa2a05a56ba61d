"""The dispatcher: help, lazy commands, and expected errors in one line."""

import errno
import json
import os
import re
import subprocess
import sys

import pytest

from sae_jax import exits
from sae_jax.cli import errors
from sae_jax.config import TrainConfig, settings_of

# Runs the dispatcher once for each list of arguments on stdin, in one process because
# importing JAX takes seconds; a command `fake` raises what its first argument names.
DRIVER = '''
import contextlib, io, json, sys, types
from sae_jax import cli

fake = types.ModuleType("sae_jax.cli.fake", "What it is for.")
sys.modules[fake.__name__] = fake
exec("""
from absl import flags
flags.DEFINE_integer("size", 1, "how large", lower_bound=1)
def main(argv):
    import jax
    from absl import logging
    errors = {
        "value": ValueError("k = 9 is more than 8\\\\nand more"),
        "file": FileNotFoundError(2, "No such file or directory", "store/"),
        "stop": KeyboardInterrupt(), "bug": TypeError("not expected"),
        "internal": jax.errors.JaxRuntimeError("INTERNAL: a bug"),
    }
    if argv[1:]:
        raise errors[argv[1]]
    logging.info("not shown")
    import os
    backend = jax.default_backend()
    print(flags.FLAGS.size, jax.device_count(), backend, os.environ["NPROC"])
""", vars(fake))
cli.COMMANDS["fake"] = "a stand-in"
for arguments in json.load(sys.stdin):
    sys.argv = ["sae-jax", *arguments]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as exit:
            status = exit.code or 0
        except Exception as error:
            status = repr(error)
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
'''
CONFIG = "from sae_jax import config\ndef get_config(): return config.TrainConfig({})\n"
# Arguments, exit status, and what the one line on stderr holds.
ONE_LINE = [
    (["trian"], 2, "sae-jax: no command 'trian': did you mean 'train'?"),
    (["fake", "value"], 1, "sae-jax fake: k = 9 is more than 8"),
    (["fake", "file"], 1, "sae-jax fake: store/: No such file or directory"),
    (["fake", "stop"], 130, "sae-jax fake: interrupted"),
    (["fake", "--size=0"], 2, "--size=0"),
    (["fake", "--sise=2"], 2, "Did you mean: size"),
    (["harvest"], 2, "sae-jax harvest: --out is required"),
    (["harvest", "text"], 2, "sae-jax harvest: unexpected argument 'text'"),
    (["train", "--config.sae.k=1"], 2, "needs --config=FILE before it"),
    (["train", "--config=none.py"], 2, "--config=none.py: there is no such file"),
    (["train", "--config=good.py", "--config.sae.kk=1"], 2, "did you mean 'sae.k'?"),
    (["train", "--config=good.py", "--config.sea.k=1"], 2, "did you mean 'sae.k'?"),
    (["train", "--config=good.py", "--config.k=1"], 2, "did you mean 'sae.k'?"),
    (["train", "--config=good.py", "--config.sae.k=x"], 2, "k=x: 'x' is not a number"),
    (["train", "--config=good.py", "--config.steps=9"], 2, "'steps': known: sae.arch"),
    (["train", "--config=good.py"], 2, "give --config=FILE and --workdir=FOLDER"),
    (["train", "--config=misspelt.py"], 2, "field 'rowz': did you mean 'rows'?"),
    (["train", "--config=bad.py"], 2, "rows = 0: must be at least 1"),
]
OTHER = [
    [],
    ["--help"],
    ["fake", "--help"],
    ["train", "--help"],
    ["fake", "bug"],
    ["fake", "internal"],
    ["fake", "value", "--verbosity=1"],
    ["fake", "--cpu_devices=40", "--size=7", "--verbosity=-1"],
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """(status, stdout, stderr) by the arguments, as JSON."""
    folder = tmp_path_factory.mktemp("cli")
    for name, fields in (("good", ""), ("misspelt", "rowz=1"), ("bad", "rows=0")):
        (folder / f"{name}.py").write_text(CONFIG.format(fields))
    cases = [arguments for arguments, *_ in ONE_LINE] + OTHER
    environment = {k: v for k, v in os.environ.items() if k != "NPROC"}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(cases),
        text=True,
        capture_output=True,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    return {json.dumps(case): line for case, line in zip(cases, lines, strict=True)}


@pytest.mark.parametrize("arguments, status, message", ONE_LINE)
def test_expected_error_is_one_line(outcomes, arguments, status, message):
    got, out, err = outcomes[json.dumps(arguments)]
    assert got == status
    assert not out
    assert err.count("\n") == 1
    assert message in err


def test_help_lists_every_command(outcomes):
    _, bare, _ = outcomes["[]"]
    status, out, err = outcomes['["--help"]']
    assert (status, out, err) == (0, bare, "")
    for command in ("quickstart", "harvest", "inspect", "train", "evaluate", "fake"):
        assert f"\n  {command} " in out
    assert "--verbosity=1" in out


def test_help_of_a_command_starts_with_what_it_is_for(outcomes):
    status, out, _ = outcomes['["fake", "--help"]']
    assert status == 0
    assert out.startswith("What it is for.\n")
    assert out.index("--size") < out.index("--cpu_devices")


def test_help_of_train_tells_of_every_field(outcomes):
    status, out, _ = outcomes['["train", "--help"]']
    assert status == 0 and max(map(len, out.splitlines())) <= 88
    assert "--config.sae.prefixes=1024,4096" in out
    told = " ".join(out.split())
    for name, field in settings_of(TrainConfig).items():
        assert f" {name} = {field.default!r} {field.metadata['meaning']}" in told
    assert "what makes codes sparse; one of topk, batch_topk, relu" in told
    assert "weight of the penalty; to be given; only for relu, " in told


def test_bugs_and_verbose_errors_keep_their_traceback(outcomes):
    assert outcomes['["fake", "bug"]'][0] == "TypeError('not expected')"
    assert outcomes['["fake", "internal"]'][0] == "JaxRuntimeError('INTERNAL: a bug')"
    status, _, err = outcomes['["fake", "value", "--verbosity=1"]']
    assert status == 1 and err.startswith("Traceback (most recent call last):")
    assert "ValueError: k = 9 is more than 8" in err


def test_command_gets_its_flags_and_virtual_devices(outcomes):
    arguments = json.dumps(["fake", "--cpu_devices=40", "--size=7", "--verbosity=-1"])
    assert outcomes[arguments] == [0, "7 40 cpu 40\n", ""]


def test_every_command_has_a_module():
    from importlib.util import find_spec

    from sae_jax.cli import COMMANDS

    for command in COMMANDS:
        assert find_spec(f"sae_jax.cli.{command}") is not None


@pytest.mark.parametrize(
    "error, code",
    [
        (ValueError("bad"), 1),
        (OSError("disk"), 1),
        (errors.Misuse("what"), 2),
        (exits.Preempted("saved"), 75),
        (exits.PeerLost("gone"), 76),
        (OSError(errno.EHOSTUNREACH, "the bucket"), 76),
        (KeyboardInterrupt(), 130),
    ],
)
@pytest.mark.parametrize("is_verbose", [False, True])
def test_the_exit_code_tells_what_to_do_next(
    error, code, is_verbose, capsys, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["sae-jax", "x", *["--verbosity=1"] * is_verbose])
    with pytest.raises(SystemExit) as stop, errors.in_one_line("sae-jax x"):
        raise error
    assert stop.value.code == code
    err = capsys.readouterr().err
    assert ("Traceback" in err) == is_verbose and (err.count("\n") > 1) == is_verbose


@pytest.mark.parametrize(
    "command, cure",
    [
        ("harvest", "lower --batch_contexts or --context_length"),
        ("train", "lower data.microbatch_rows or data.batch_rows, .*sae-jax plan"),
        ("evaluate", "lower --batch_rows or --batch_sequences"),
        ("inspect", "end what else uses it, or take a larger one"),
    ],
)
def test_a_full_memory_is_told_with_its_cure(command, cure, capsys):
    """As XLA tells of it when an array is made, on whatever machine this is."""
    import jax.numpy as jnp

    with pytest.raises(SystemExit) as stop, errors.in_one_line(f"sae-jax {command}"):
        jnp.zeros((2**20, 2**20, 64)).block_until_ready()
    assert stop.value.code == 1
    line = rf"sae-jax {command}: the memory of a device is full \(RES.*\): {cure}.*\n"
    assert re.fullmatch(line, capsys.readouterr().err)
