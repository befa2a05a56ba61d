"""Files written whole, room on the disk, one writer a folder."""

import errno
import gc
import os
import signal
import subprocess
import sys

import pytest

from sae_jax.files import (
    check_space,
    has_no_right,
    is_full_disk,
    lock_folder,
    write_whole,
)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    write_whole(path, "caf\u00e9\n")
    assert path.read_bytes() == b"caf\xc3\xa9\n"
    monkeypatch.setattr(os, "replace", None)
    with pytest.raises(TypeError):
        write_whole(path, b"new")
    assert path.read_bytes() == b"caf\xc3\xa9\n"
    monkeypatch.undo()
    write_whole(str(path), b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == [path.name]


def test_space_is_that_of_the_nearest_folder_there(tmp_path):
    path = tmp_path / "a" / "b"
    check_space(path, 1, "a byte", "")
    with pytest.raises(OSError, match="a run needs .* MB more, .*: go away") as error:
        check_space(path, 10**18, "a run", "go away")
    assert error.value.errno == errno.ENOSPC
    assert f"the disk of {str(path)!r} has" in error.value.strerror
    assert "\n" not in error.value.strerror and not path.parent.exists()


def test_tensorstore_says_what_keeps_it_from_writing():
    full = "RESOURCE_EXHAUSTED: Error writing local file [os_error_code='28']"
    denied = "PERMISSION_DENIED: Error writing local file [os_error_code='13']"
    assert is_full_disk(ValueError(full)) and not has_no_right(ValueError(full))
    assert has_no_right(ValueError(denied)) and not is_full_disk(ValueError(denied))
    assert not is_full_disk(ValueError("[os_error_code='2']"))
    # No room, no more for this user, no larger file.
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert is_full_disk(OSError(number, ""))
    assert has_no_right(PermissionError(errno.EACCES, ""))


def test_a_lock_ends_when_closed_or_dropped(tmp_path):
    with lock_folder(tmp_path):
        with pytest.raises(ValueError, match="in use by another process"):
            lock_folder(tmp_path)
    lock = lock_folder(tmp_path)
    with pytest.raises(ValueError, match="wait for it, or choose another folder"):
        lock_folder(tmp_path)
    del lock
    gc.collect()
    lock_folder(tmp_path).close()


def test_a_lock_ends_with_its_process(tmp_path):
    code = "import sys, time; from sae_jax.files import lock_folder; "
    code += "lock = lock_folder(sys.argv[1]); print(1, flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    with process:
        assert process.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match="in use"):
            lock_folder(tmp_path)
        process.send_signal(signal.SIGKILL)
    lock_folder(tmp_path).close()
