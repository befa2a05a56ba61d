"""Where a store or a run lies: a folder on a disk, or below a prefix of a bucket.

    stores/a            a folder; file:///stores/a is the same
    s3://bucket/a       Amazon S3 and what speaks like it
    gs://bucket/a       Google Cloud Storage

Files are read and written by tensorstore: whole, and on a disk synced, so that after a
stop a file has the old contents or the new. For s3:// the usual variables count:
AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile, or the machine's role),
AWS_REGION, and AWS_ENDPOINT_URL for another service than Amazon's. A service that does
not answer is tried again for some seconds, and then is an OSError.
"""

import collections
import errno
import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import tensorstore as ts

from sae_jax.files import is_full_disk

_URL = re.compile(r"(file|gs|s3)://(.*)", re.DOTALL)
# pathlib makes one slash of the two.
_ANY_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_RETRIES = {"max_retries": 6, "initial_delay": "250ms", "max_delay": "4s"}
# Statuses of tensorstore are looked for where it puts them: a path may have any word.
_UNREACHABLE = re.compile(
    "^(UNAVAILABLE|DEADLINE_EXCEEDED):|CURL error|retry attempts failed"
)
_DENIED = re.compile(
    r"^(PERMISSION_DENIED|UNAUTHENTICATED):|\[http_response_code='40[13]'\]|"
    "<Code>(ExpiredToken|InvalidToken|TokenRefreshRequired)</Code>"  # S3: 400
)
_READS_AHEAD = 64  # of small files: a bucket takes some 50 ms for each


class Folder:
    """A folder of whole files; names are relative, with slashes."""

    def __init__(self, url: str | Path):
        self.url = _normalise(str(url))
        self.is_local = not self.url.startswith(("gs://", "s3://"))
        if not self.is_local:
            # A server that accepts and then says nothing would be waited for for ever.
            for name, value in {"TIME_SECONDS": "30", "LIMIT_BYTES": "1"}.items():
                os.environ.setdefault(f"TENSORSTORE_CURL_LOW_SPEED_{name}", value)

    def __str__(self) -> str:
        return self.url

    @property
    def path(self) -> Path:
        """Of a folder on a disk."""
        assert self.is_local
        return Path(self.url)

    def name_file(self, name: str) -> str:
        """The file as people know it, for messages."""
        return f"{self.url.rstrip('/')}/{name}"

    def kvstore(self, name: str = "") -> dict[str, Any]:
        """tensorstore's spec of the folder `name` below this one."""
        if self.is_local:
            path = str(self.path.resolve() / name)  # tensorstore refuses ..
            return {"driver": "file", "path": path.rstrip("/") + "/"}
        scheme, rest = self.url.split("://", 1)
        bucket, _, path = f"{rest.rstrip('/')}/{name}".partition("/")
        path = path.rstrip("/") + "/" if path.rstrip("/") else ""
        if scheme == "gs":
            return {"driver": "gcs", "bucket": bucket, "path": path}
        return {"driver": "s3", "bucket": bucket, "path": path} | _configure_s3()

    @property
    def context(self) -> ts.Context:
        """tensorstore's resources for whatever is read and written here."""
        if self.is_local:
            return ts.Context()
        return ts.Context({
            "s3_request_retries": _RETRIES,
            "gcs_request_retries": _RETRIES,
        })

    def read(self, name: str) -> bytes | None:
        """The contents of a file; None if there is none."""
        (data,) = self.read_each([name])
        return data

    def read_each(self, names: Iterable[str]) -> Iterator[bytes | None]:
        """The contents of each file in turn, some of them read ahead."""
        if self.is_local and not self.path.is_dir():
            yield from (None for _ in names)
            return
        pending: collections.deque[Any] = collections.deque()
        for name in names:
            pending.append(self._files.read(name))
            if len(pending) > _READS_AHEAD:
                yield self._find_value(pending.popleft())
        for read in pending:
            yield self._find_value(read)

    def write(self, name: str, data: bytes | str) -> None:
        contents = data.encode() if isinstance(data, str) else data
        self._finish(self._files.write(name, contents))

    def delete(self, name: str) -> None:
        """Deletes a file, if it is there."""
        self._finish(self._files.write(name, None))

    def delete_all(self, prefix: str) -> None:
        """Deletes all files whose names begin with `prefix`."""
        self._finish(self._files.delete_range(_range(prefix)))

    def list(self, prefix: str = "") -> list[str]:
        """The names of all files that begin with `prefix`, sorted."""
        if self.is_local and not self.path.is_dir():
            return []
        names = self._finish(self._files.list(_range(prefix)))
        return sorted(name.decode("utf-8", "replace") for name in names)

    @functools.cached_property
    def _files(self) -> ts.KvStore:
        return self._finish(ts.KvStore.open(self.kvstore(), context=self.context))

    def _find_value(self, read: Any) -> bytes | None:
        result = self._finish(read)
        return result.value if result.state == "value" else None

    def _finish(self, future: Any) -> Any:
        try:
            return future.result()
        except (ValueError, OSError) as error:
            raise_plainly(self, error)


def _range(prefix: str) -> ts.KvStore.KeyRange:
    """All names that begin with `prefix`."""
    stop = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ""
    return ts.KvStore.KeyRange(prefix, stop)


def raise_plainly(folder: Folder, error: Exception) -> NoReturn:
    """`error` as OSError if the service or the disk is what failed, else as it is."""
    raise_unless_data(folder, error)
    raise error


def raise_unless_data(folder: Folder, error: Exception) -> None:
    """Raises OSError if the service, the disk or the right to it is what failed, and
    not the data. An OSError of a folder says so already."""
    text = " ".join(str(error).split())
    if is_full_disk(error):
        raise OSError(
            errno.ENOSPC,
            f"the disk of {str(folder)!r} is full: make room, and run the same command "
            "again",
        ) from error
    if isinstance(error, OSError):
        raise error
    if not folder.is_local and _UNREACHABLE.search(text):
        raise OSError(
            errno.EHOSTUNREACH,
            f"{folder} cannot be reached, after {_RETRIES['max_retries']} tries more "
            f"({_shorten(text)}): check the network and the service, and run the same "
            "command again",
        ) from error
    if _DENIED.search(text):
        cure = "check the credentials and the rights of the bucket"
        if folder.is_local:
            cure = "get the right to read and write there"
        raise PermissionError(
            errno.EACCES, f"{folder}: access denied ({_shorten(text)}): {cure}"
        ) from error
    if "NoSuchBucket" in text:
        raise FileNotFoundError(
            errno.ENOENT, f"{folder}: there is no such bucket: make it, or give another"
        ) from error


def _normalise(url: str) -> str:
    found = _ANY_URL.match(url)
    if found is None:
        return url
    if not _URL.match(url) and found[1] in ("file", "gs", "s3"):
        # A Path was made of it; of file:///x, file:/x.
        url = url.replace(":/", ":///" if found[1] == "file" else "://", 1)
    match = _URL.match(url)
    if match is None:
        raise ValueError(
            f"{url!r}: stores and runs lie in folders, at file://, gs:// or s3://, "
            f"not at {found[1]}:"
        )
    if match[1] == "file":
        return match[2] or "/"
    bucket = match[2].partition("/")[0]
    if not bucket or ".." in match[2].split("/"):
        raise ValueError(f"{url!r}: give {match[1]}://BUCKET/FOLDER")
    return url.rstrip("/")


def _configure_s3(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What the usual AWS variables say."""
    options: dict[str, Any] = {}
    endpoint = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    if endpoint:
        options["endpoint"] = endpoint.rstrip("/")
        region = region or "us-east-1"
    if region:
        options["aws_region"] = region
    if environ.get("AWS_ACCESS_KEY_ID"):
        # By name: else every provider is tried, with a complaint from each.
        options["aws_credentials"] = {"type": "environment"}
    return options


def _shorten(text: str) -> str:
    return text if len(text) <= 240 else text[:240] + "..."
