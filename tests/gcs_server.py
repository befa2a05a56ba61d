"""As much of Google Cloud Storage as tensorstore asks for, in memory, on loopback."""

import http.server
import json
import threading
import urllib.parse

_OBJECTS = "/storage/v1/b/bucket/o"


class Server:
    """Serves one bucket, `bucket`, at `endpoint`, until `close`.

    Nobody has a right of those that `denied` names: `list`, `get`, `write`, `delete`.
    """

    def __init__(self):
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.objects, self._http.n_written = {}, 0
        self._http.lock, self._http.denied = threading.Lock(), set()
        self.denied = self._http.denied
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def set_environment(self, monkeypatch):
        """Tells tensorstore of it; before its first use of gs:// in this process."""
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", self.endpoint)
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")

    def close(self):
        self._http.shutdown()
        self._http.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits for its header's receipt

    def do_GET(self):
        path, query = self._read_url()
        objects = self.server.objects
        if self._deny("list" if path == _OBJECTS else "get"):
            return None
        if path == _OBJECTS:
            start, stop = query.get("startOffset", ""), query.get("endOffset")
            names = sorted(
                n for n in objects if n >= start and (stop is None or n < stop)
            )
            return self._answer({"items": [_describe(n, *objects[n]) for n in names]})
        name = path.removeprefix(f"{_OBJECTS}/")
        if name not in objects:
            return self._fail(404)
        generation, data = objects[name]
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._fail(304)
        status, wanted = 200, self.headers.get("Range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            status, whole = 206, len(data)
            start = int(first) if first else max(0, whole - int(last))  # the last bytes
            data = data[start : int(last) + 1 if first and last else None]
        self.send_response(status)
        if wanted:
            stop = start + len(data)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{whole}")
        self.send_header("x-goog-generation", str(generation))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        _, query = self._read_url()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self._deny("write"):
            return None
        name, wanted = query["name"], query.get("ifGenerationMatch")
        with self.server.lock:
            now, _ = self.server.objects.get(name, (0, b""))
            if wanted is not None and int(wanted) != now:
                return self._fail(412)
            self.server.n_written += 1
            self.server.objects[name] = (self.server.n_written, data)
            described = _describe(name, *self.server.objects[name])
        return self._answer(described)

    def do_DELETE(self):
        path, _ = self._read_url()
        if self._deny("delete"):
            return None
        found = self.server.objects.pop(path.removeprefix(f"{_OBJECTS}/"), None)
        return self._fail(404) if found is None else self._answer({})

    def log_message(self, *_):
        pass

    def _read_url(self):
        url = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(url.query, keep_blank_values=True)
        return urllib.parse.unquote(url.path), {k: v[0] for k, v in query.items()}

    def _deny(self, right):
        is_denied = right in self.server.denied
        if is_denied:
            self._answer({"error": {"code": 403, "message": "Forbidden"}}, 403)
        return is_denied

    def _answer(self, values, status=200):
        data = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _fail(self, status):
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _describe(name, generation, data):
    return {"name": name, "generation": str(generation), "size": str(len(data))}
