"""An S3 server on loopback (moto's), behind a door that can be shut and opened.

moto keeps its objects in memory, so a server that is killed loses them: whoever starts
it again has to fill it. With the door shut nobody is let in, as with a server that is
down; the objects are there when it opens again. The server itself can deny everybody,
as it does those who have no rights.
"""

import contextlib
import math
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

from sae_jax.store import folder

_START = """
import sys, time
from moto.server import ThreadedMotoServer
ThreadedMotoServer("127.0.0.1", int(sys.argv[1])).start()
while True:
    time.sleep(1)
"""


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("moto")
    started = Server()
    yield started
    started.kill()


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    """The address of a new folder in the bucket."""
    set_environment(monkeypatch, server)
    return f"s3://bucket/{tmp_path.name}"


def set_environment(monkeypatch, server):
    """Tells tensorstore of the server, and not to try for long."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.delenv("AWS_REGION", raising=False)
    quickly = {"max_retries": 3, "initial_delay": "100ms", "max_delay": "200ms"}
    monkeypatch.setattr(folder, "_RETRIES", quickly)


class Server:
    """Serves one bucket, `bucket`, at `endpoint`, until `kill`."""

    def __init__(self):
        self._port = _find_port()
        self._door = _Door(self._port)
        self.endpoint = f"http://127.0.0.1:{self._door.port}"
        self._start()

    def shut(self):
        self._door.shut()

    def open(self):
        self._door.open()

    @contextlib.contextmanager
    def denying(self):
        """Answers all requests with 403."""
        self._let_in(0)
        try:
            yield
        finally:
            self._let_in(math.inf)

    def kill(self):
        self._process.kill()
        self._process.wait()
        self._door.shut()

    def start_again(self):
        """After `kill`, with an empty bucket."""
        self._door.open()
        self._start()

    def _start(self):
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, str(self._port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._make_bucket()

    def _let_in(self, n_requests):
        """From then on moto looks up who asks, and it knows nobody."""
        request = urllib.request.Request(
            f"{self.endpoint}/moto-api/reset-auth",
            data=str(n_requests).encode(),
            headers={"Content-Type": "text/plain"},
        )
        urllib.request.urlopen(request, timeout=5).close()

    def _make_bucket(self):
        request = urllib.request.Request(f"{self.endpoint}/bucket", method="PUT")
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(request, timeout=5).close()
                return
            time.sleep(0.1)
        raise TimeoutError("moto's server does not start")


class _Door:
    """Passes bytes on to a port while it is open."""

    def __init__(self, to_port):
        self._to_port = to_port
        self.port = _find_port()
        self._connections, self._listener = set(), None
        self.open()

    def open(self):
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._let_in, daemon=True).start()

    def shut(self):
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._connections.clear()

    def _let_in(self):
        listener = self._listener
        while True:
            try:
                inner, _ = listener.accept()
                outer = socket.create_connection(("127.0.0.1", self._to_port))
            except ConnectionRefusedError:
                inner.close()  # the server has not started yet
                continue
            except OSError:
                return
            threading.Thread(
                target=self._serve, args=(listener, inner, outer), daemon=True
            ).start()

    def _serve(self, listener, inner, outer):
        with inner, outer:  # moto ends a connection with every answer
            self._connections |= {inner, outer}
            if listener.fileno() < 0:
                return
            back = threading.Thread(target=_pass_on, args=(outer, inner), daemon=True)
            back.start()
            _pass_on(inner, outer)
            back.join()
            self._connections -= {inner, outer}


def _pass_on(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)
    for connection in (source, target):
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def _find_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
