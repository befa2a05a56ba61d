"""Files that are appended to, of a run folder that may be in a bucket.

An object in a bucket can only be replaced. There such files are kept in a temporary
folder of this machine and uploaded whole, with every checkpoint and at the end.
"""

import contextlib
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Self

from sae_jax.store import Folder


class Mirror:
    """`path` is a folder on this machine: the run folder, or what stands for it.

    As a context manager it sends, at the end, what has changed.
    """

    def __init__(self, folder: Folder):
        self._folder = folder
        self._check: Callable[[], None] | None = None
        self._sent: dict[Path, tuple[int, int]] = {}  # size, and when it was changed
        if folder.is_local:
            self.path = folder.path
            return
        self.path = Path(tempfile.mkdtemp(prefix="sae_jax-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def fetch(self, name: str) -> None:
        """Has the file in `path`, if there is such a file."""
        if self._folder.is_local:
            return
        if (data := self._folder.read(name)) is not None:
            file = self.path / name
            file.write_bytes(data)
            self._sent[file] = _describe(file)

    def guarded(self, check: Callable[[], None]) -> Self:
        """This mirror, which now sends nothing when `check` raises ValueError."""
        self._check = check
        return self

    def send(self) -> None:
        """Uploads what has changed since the last time."""
        if self._folder.is_local:
            return
        files = [file for file in sorted(self.path.rglob("*")) if file.is_file()]
        changed = [file for file in files if self._sent.get(file) != _describe(file)]
        if changed and self._check:
            self._check()
        for file in changed:
            now = _describe(file)
            name = file.relative_to(self.path).as_posix()
            self._folder.write(name, file.read_bytes())
            self._sent[file] = now

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.send()
        elif not issubclass(kind, OSError):  # it may be the bucket that failed
            with contextlib.suppress(OSError, ValueError):  # the first error is told
                self.send()


def _describe(file: Path) -> tuple[int, int]:
    about = file.stat()
    return about.st_size, about.st_mtime_ns
