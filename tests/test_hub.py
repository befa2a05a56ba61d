"""Models by name, fetched by the real code of the hub from a server on loopback."""

import functools
import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sae_jax.subjects import hub as hub_module
from sae_jax.subjects import load_subject
from sae_jax.subjects.hub import is_hub_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DEFAULT = Path(hub_module.__file__).parent / "default"
FETCHED = {file.name for file in DEFAULT.iterdir()} - {"README.md"}
UNFETCHED = {
    "pytorch_model.bin": b"a pickle",
    "modeling_own.py": b"raise SystemExit('code was run')",
    "onnx/model.onnx": b"-",
}
# The module alone: all that the package imports would take seconds a process.
RUN = """
import runpy
import sys
fetch = runpy.run_path(sys.argv[1])["fetch"]
try:
    print(fetch(sys.argv[2]))
except (OSError, ValueError) as error:
    print(f"{type(error).__name__}: {error}")
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as its client asks for to fetch a model."""

    files: dict[str, bytes]
    served: list[str]
    tokens: list[str | None]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.tokens.append(self.headers.get("Authorization"))
        path = self.path.partition("?")[0].removeprefix("/")
        if "absent" in path:
            self.refuse(401, "RepoNotFound")
        elif "@" in path or "v9" in path:
            self.refuse(404, "RevisionNotFound")
        elif path.startswith("api/models/"):
            self.answer(path)
        elif "gated" in path:
            self.refuse(403, "GatedRepo")
        else:
            self.give(path.partition(f"resolve/{COMMIT}/")[2])

    def answer(self, path: str) -> None:
        if "/tree/" in path:
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": _sha(data)}
                for name, data in self.files.items()
            ]
            self.send(json.dumps(listing).encode(), "tree")
            return
        is_pickled = "pickled" in path
        names = ["config.json", "pytorch_model.bin"] if is_pickled else self.files
        files = [{"rfilename": name} for name in names]
        model = path.removeprefix("api/models/").partition("/revision/")[0]
        info = {"id": model, "sha": COMMIT, "siblings": files}
        self.send(json.dumps(info).encode(), "info")

    def give(self, name: str) -> None:
        if name not in self.files:
            self.refuse(404, "EntryNotFound")
            return
        if self.command == "GET":
            self.served.append(name)
        self.send(self.files[name], _sha(self.files[name]))

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, content: bytes, tag: str) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


def _sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub():
    """A hub that has the default subject, among files that must not be fetched."""
    files = {file.name: file.read_bytes() for file in DEFAULT.iterdir()} | UNFETCHED
    names = {"files": files, "served": [], "tokens": []}
    handler = type("OneHub", (Hub,), names)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(
            target=functools.partial(server.serve_forever, poll_interval=0.05)
        )
        thread.start()
        handler.url = f"http://127.0.0.1:{server.server_port}"
        yield handler
        server.shutdown()
        thread.join()


@pytest.fixture
def fetch(tmp_path):
    """What `fetch` in a process of its own prints, all of stdout and stderr."""

    def run(url: str, name: str, **environment: str) -> str:
        own = {
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_ETAG_TIMEOUT": "2",
            "HF_TOKEN": "hf_secret",
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-c", RUN, hub_module.__file__, name],
            env={**os.environ, **own, **environment},
            text=True,
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        out = done.stdout.strip()
        assert len(out.splitlines()) == 1
        assert "hf_secret" not in out + done.stderr
        return out

    return run


@pytest.mark.parametrize(
    ("text", "is_name"),
    [
        ("gpt2", True),
        ("org/model-1.5_b", True),
        ("org/model@v1.0", True),
        ("org/model@refs/pr/1", True),
        ("gpt2@", False),
        ("./gpt2", False),
        ("../gpt2", False),
        ("/org/model", False),
        ("~/model", False),
        ("org/model/", False),
        ("runs/org/model", False),
        ("", False),
        ("a b", False),
    ],
)
def test_names_and_paths_are_told_apart(tmp_path, monkeypatch, text, is_name):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(text) == is_name
    Path("org/model-1.5_b").mkdir(parents=True)
    Path("gpt2").mkdir()
    assert is_hub_name(text) == (is_name and "@" in text)


def test_a_model_is_fetched_once_and_then_found_without_the_hub(hub, fetch):
    folder = Path(fetch(hub.url, "org/model"))
    assert set(hub.served) == FETCHED < set(hub.files)
    assert {file.name for file in folder.iterdir()} == FETCHED
    assert "Bearer hf_secret" in hub.tokens
    subject, default = load_subject(str(folder)), load_subject()
    assert subject.identity == default.identity
    np.testing.assert_array_equal(
        subject.weights["embed_vd"], default.weights["embed_vd"]
    )
    n_served = len(hub.served)
    assert fetch(hub.url, "org/model") == str(folder)
    assert fetch(hub.url, "org/model@main") == str(folder)
    assert fetch("http://127.0.0.1:9", "org/model") == str(folder)
    assert fetch(hub.url, "org/model", HF_HUB_OFFLINE="1") == str(folder)
    assert len(hub.served) == n_served


def test_a_name_and_a_folder_of_the_same_files_are_one_subject(hub, fetch, tmp_path):
    """Also where one of the files that not every model has says what tokens begin and
    end a text."""
    config = json.loads(hub.files["config.json"])
    config |= {"bos_token_id": None, "eos_token_id": None}
    hub.files["config.json"] = json.dumps(config).encode()
    hub.files["tokenizer_config.json"] = b"{}"
    generation = {"bos_token_id": 5, "eos_token_id": [6, 7]}
    hub.files["generation_config.json"] = json.dumps(generation).encode()
    local = tmp_path / "local"
    local.mkdir()
    for name, content in hub.files.items():
        if "/" not in name:
            (local / name).write_bytes(content)
    found = load_subject(fetch(hub.url, "org/model"))
    expected = load_subject(str(local))
    assert (found.bos_id, found.special_ids) == (5, (0, 5, 6, 7))
    for field in ("identity", "bos_id", "special_ids", "pad_id"):
        assert getattr(found, field) == getattr(expected, field)


def test_a_torn_cache_is_not_taken_for_the_model(hub, fetch):
    folder = Path(fetch(hub.url, "org/model"))
    (folder / "model.safetensors").unlink()
    out = fetch("http://127.0.0.1:9", "org/model")
    assert out.startswith("ConnectionError: no folder 'org/model' here")
    assert fetch(hub.url, "org/model") == str(folder)
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/absent", "FileNotFoundError: no folder 'org/absent' here and no such "),
        ("org/model@v9", "FileNotFoundError: model 'org/model' has no revision 'v9'"),
        ("org/gated", "PermissionError: model 'org/gated' is gated: ask for access"),
        ("org/pickled", "ValueError: model 'org/pickled' has no model.safetensors"),
        ("a--b", "FileNotFoundError: 'a--b' is neither a folder here nor a name"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(hub, fetch, name, message):
    assert fetch(hub.url, name).startswith(message)
    assert not hub.served


def test_a_hub_that_cannot_be_reached_is_told_in_seconds(fetch):
    """One that refuses, one that never answers, and one that must not be asked."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for endpoint in ("http://127.0.0.1:9", url, "http://no-such-host.invalid"):
            start = time.monotonic()
            out = fetch(endpoint, "org/model")
            assert out.startswith("ConnectionError: no folder 'org/model' here, and ")
            assert f"the hub at {endpoint} cannot be reached (" in out
            assert out.endswith("): try again, or give a folder")
            assert time.monotonic() - start < 30
    out = fetch("http://127.0.0.1:9", "org/model", HF_HUB_OFFLINE="1")
    assert "which HF_HUB_OFFLINE keeps from being asked: unset it" in out
