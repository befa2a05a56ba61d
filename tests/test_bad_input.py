"""Bad input, as a user meets it: one clear line, a non-zero exit, nothing started."""

import subprocess
import sys

import numpy as np
import pytest
import synthetic
from test_subjects import CONFIG, make_tokenizer, make_weights

from sae_jax import store as stores
from sae_jax.subjects.folder import write_folder

_CONFIG = """
import sys
sys.path.insert(0, {tests!r})
import synthetic
def get_config():
    return synthetic.make_config({store!r})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stores, configs and texts with one fault each."""
    folder = tmp_path_factory.mktemp("bad input")
    good = synthetic.write_store(folder / "good", train_shards=2)
    synthetic.write_store(folder / "unfinished", train_shards=2, finish=False)
    synthetic.write_store(folder / "heldout", train_shards=0)
    torn = synthetic.write_store(folder / "torn", train_shards=2)
    file = torn / "acts" / synthetic.SITE / "c" / "1" / "0" / "0"
    file.write_bytes(file.read_bytes()[:-100])
    tests = str(synthetic.__file__).rpartition("/")[0]
    for store in (good, folder / "unfinished", folder / "heldout", torn):
        text = _CONFIG.format(tests=tests, store=str(store))
        (folder / f"{store.name}.py").write_text(text)
    tokenizer = make_tokenizer().to_str()
    write_folder(folder / "lm", CONFIG, make_weights(CONFIG, 0), tokenizer, np.float32)
    weights = folder / "lm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "no_text").mkdir()
    (folder / "no_text" / "image.bin").write_bytes(b"\x00\xff")
    (folder / "text").mkdir()
    for index in range(40):
        (folder / "text" / f"{index}.txt").write_text("words and more words " * 200)
    assert stores.open_store(good).rows("train") == 1024
    return folder


_FULL_DISK = (
    "import collections, shutil; "
    "shutil.disk_usage = lambda path: collections.namedtuple('U', 'free')(1000); "
)

CASES = {
    # With a text that cannot be either, which takes long to find out.
    "no such site": (
        "harvest --site=resid_post.99 --text=no_text --out=out",
        "resid_post.99",
    ),
    "no text": ("harvest --text=no_text --out=out", "no_text"),
    "torn subject": (
        "harvest --subject=lm --text=no_text --out=out",
        "lm/model.safetensors is damaged",
    ),
    "no such service": (
        "harvest --text=no_text --out=ftp://bucket/store",
        "ftp://bucket/store",
    ),
    "no folder can be there": ("harvest --text=no_text --out=good.py/out", "good.py"),
    "text given twice": (
        "harvest --text=text --text=text/7.txt --out=out",
        "7.txt' is given twice",
    ),
    "k above n_latents": (
        "train --config=good.py --workdir=out --config.sae.k=500",
        "sae.k = 500",
    ),
    "lanes do not divide the batch": (
        "train --config=good.py --workdir=out --config.data.lanes=7",
        "data.lanes = 7",
    ),
    "mesh does not divide the batch": (
        "train --config=good.py --workdir=out --cpu_devices=3 --config.mesh.data=3",
        "mesh.data = 3",
    ),
    "shards that are not two to a power": (
        "train --config=good.py --workdir=out --cpu_devices=3 --config.sae.n_latents=96"
        " --config.mesh.data=1"
        " --config.sae.exchange=tree",
        "mesh.latent = 3 is not a power of two",
    ),
    "micro-batch smaller than the mesh": (
        "train --config=good.py --workdir=out --cpu_devices=2 --config.mesh.data=2"
        " --config.data.microbatch_rows=1",
        "data.microbatch_rows = 1",
    ),
    "store still being written": (
        "train --config=unfinished.py --workdir=out",
        "unfinished",
    ),
    "torn shard": ("train --config=torn.py --workdir=out", "c/1/0/0"),
    "only held-out rows": ("train --config=heldout.py --workdir=out", "held-out"),
    "misspelt field": (
        "train --config=good.py --workdir=out --config.sae.n_latent=64",
        "did you mean 'sae.n_latents'",
    ),
    "no store named": ("inspect", "give one store: sae-jax inspect STORE"),
    "no store": ("inspect nothing", "no store at 'nothing'"),
    "store with a torn shard": ("inspect torn", "c/1/0/0: delete what"),
    "no run folder": ("evaluate nothing", "nothing"),
    "no argument": ("evaluate", "give one run folder"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gives_one_clear_line(case, folder):
    arguments, message = CASES[case]
    before = _list(folder)
    done = _run(folder, arguments)
    assert done.returncode in ((2,) if case == "no argument" else (1, 2)), done.stdout
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(f"sae-jax {arguments.split()[0]}: ")
    assert message in lines[0]
    assert _list(folder) == before


def test_a_full_disk_is_told_in_the_last_line(folder):
    """Behind the progress of packing: only then is the size of a store known."""
    done = _run(folder, "harvest --text=text --out=full", _FULL_DISK)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("sae-jax harvest: ") and "MB free" in last
    assert not list((folder / "full").glob("acts/*/c/*"))


def _run(folder, arguments, fault=""):
    code = f"{fault}from sae_jax.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments.split()],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def _list(folder):
    return sorted(p for p in folder.rglob("*") if "__pycache__" not in p.parts)
