"""Files written whole, room on the disk, and folders that one process writes at a time.

A lock is `flock` on an empty file `.lock` in the folder: it ends with its process,
however that ends, so the file may lie there for ever and means nothing by itself.
"""

import errno
import fcntl
import os
import shutil
import weakref
from pathlib import Path
from typing import Self

LOCK_FILE = ".lock"
PARTIAL = ".partial"  # ends the name of a file that is being written
_MB = 10**6
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # or no more for this user
_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)
# Some network file systems have no locks; there nobody is kept out.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


def write_whole(path: str | Path, data: bytes | str) -> None:
    """Replaces the file at once: after a stop it has the old contents, or the new."""
    path = Path(path)
    partial = path.with_name(path.name + PARTIAL)
    with open(partial, "wb") as stream:
        stream.write(data.encode() if isinstance(data, str) else data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def is_full_disk(error: BaseException) -> bool:
    """Whether there was no room for what was to be written."""
    return _has_number(error, _DISK_FULL)


def has_no_right(error: BaseException) -> bool:
    """Whether the file may not be read or written."""
    return _has_number(error, _NO_RIGHT)


def check_space(path: str | Path, needed_bytes: int, what: str, cure: str) -> None:
    """OSError (ENOSPC), one line, if the disk of `path`, which need not be there yet,
    has less than `needed_bytes` free for `what`."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise OSError(
            errno.ENOSPC,
            f"{what} needs {-(-needed_bytes // _MB)} MB more, the disk of "
            f"{str(path)!r} has {free // _MB} MB free: {cure}",
        )


def make_writable(path: str | Path) -> None:
    """Makes the folder if it is missing; PermissionError, one line, unless files can be
    written there."""
    probe = Path(path) / f".probe{PARTIAL}"
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        if not has_no_right(error):
            raise
        raise PermissionError(
            error.errno,
            f"{str(path)!r}: {error.strerror}: get the right to write there, or choose "
            "another folder",
        ) from error


class FolderLock:
    """A folder kept for one writer; ends with `close`, with `with`, or when dropped."""

    def __init__(self, descriptor: int):
        self.close = weakref.finalize(self, os.close, descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lock_folder(path: str | Path, part: int = 0) -> FolderLock:
    """Keeps the folder, which is there, or a part of it; ValueError if somebody else
    has it."""
    name = f"{LOCK_FILE}-{part}" if part else LOCK_FILE
    descriptor = os.open(Path(path) / name, os.O_RDWR | os.O_CREAT, 0o644)
    lock = FolderLock(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ValueError(
            f"{str(path)!r} is in use by another process: wait for it, or choose "
            "another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return lock


def _has_number(error: BaseException, numbers: tuple[int, ...]) -> bool:
    if isinstance(error, OSError):
        return error.errno in numbers
    # tensorstore gives the number in its text.
    return any(f"os_error_code='{number}'" in str(error) for number in numbers)
