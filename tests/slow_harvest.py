"""A harvest that takes its time, and tells on stdout where it is.

    python tests/slow_harvest.py OUT

In each of these it waits, so that each has about a quarter of the time:

    pack      between the two files of a block of text
    forward   in the subject
    write     after the write of an array of rows has started
    record    before a small file: the manifest, names, records and statistics
"""

import contextlib
import os
import sys
import time
from pathlib import Path

import jax

# As in conftest, so that the bits are those of the tests.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

import test_harvest  # noqa: E402

from sae_jax.store import Folder, StoreWriter  # noqa: E402

SECS = {"pack": 0.025, "forward": 0.015, "write": 0.007, "record": 0.01}


@contextlib.contextmanager
def be_in(phase):
    os.write(1, f"{phase}\n".encode())
    yield
    os.write(1, b"between\n")


def wait_first(phase, method):
    def call(*arguments):
        with be_in(phase):
            time.sleep(SECS[phase])
            return method(*arguments)

    return call


class SlowArrays(dict):
    """Those of a writer; the documents come late."""

    def __getitem__(self, name):
        if name == "documents":
            time.sleep(SECS["pack"])
        return super().__getitem__(name)


def write_block(writer, index, block, method=StoreWriter._write_block):
    writer._arrays = SlowArrays(writer._arrays)
    with be_in("pack"):
        method(writer, index, block)


def start_write(*arguments, method=StoreWriter._start_write):
    with be_in("write"):
        write = method(*arguments)
        time.sleep(SECS["write"])
        return write


if __name__ == "__main__":
    StoreWriter._write_block = write_block
    StoreWriter._start_write = start_write
    subject, Folder.write = test_harvest.TinySubject, wait_first("record", Folder.write)
    subject.capture = wait_first("forward", subject.capture)
    test_harvest.run_harvest(Path(sys.argv[1]))
    os._exit(0)  # at once, for no time after the harvest is to be counted
