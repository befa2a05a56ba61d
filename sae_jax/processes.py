"""Several processes on one mesh: how they meet, agree and part.

Each process has devices of its own and runs the same program; arrays and computations
span them all. Process 0 alone writes and tells.
"""

import contextlib
import errno
import json
import os
import re
import socket
import sys
import time
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

# No public name gives jax's store; Orbax takes it from here too.
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from sae_jax.config import Cluster
from sae_jax.exits import (
    AGAIN,
    FAILED,
    MET_PIPE,
    PEER_LOST,
    PeerLost,
    Preempted,
    is_of_network,
)
from sae_jax.watch import Watch

_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
_STATUS = re.compile("(ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|UN[A-Z]+): ")
_MEETING_MSECS = 24 * 3600 * 1000


@contextlib.contextmanager
def join(cluster: Cluster) -> Iterator[None]:
    """Meets all other processes, before any device is asked for; the body runs in all.

    When another process is lost this one ends, whatever it does: `sae_jax.watch`.

    Raises:
        ValueError: nothing tells where the others are, or this process has asked for a
            device before, or has none.
        PeerLost: they cannot meet, or the body failed in what all do together.
    """
    global _watch
    _meet_all(cluster)
    _tell_supervisor()
    _watch = Watch(
        global_state.client,
        global_state.process_id,
        cluster.peer_timeout_secs,
        cluster.stall_timeout_secs,
    )
    _watch.start()
    try:
        _open_devices()
        yield
    except Preempted:  # as all others are, after the same step
        _part(_watch)
        raise
    except BaseException as error:
        _leave(_watch, error, cluster.peer_timeout_secs)
        raise
    else:
        _part(_watch)
    finally:
        _watch = None


def is_first() -> bool:
    """Whether this process is the one that writes and tells."""
    return jax.process_index() == 0


def note(where: str, n_done: int = 0) -> None:
    """Tells the other processes, if there are any, where this one's main thread is."""
    if _watch is not None:
        _watch.note(where, n_done)


def check_joined() -> None:
    """ValueError if other processes have devices here that this one has not met."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ValueError(
            f"{jax.process_count()} processes share these devices: start each of them "
            "with --multihost"
        )


def check_same(**values: Any) -> None:
    """ValueError, in every process, unless all come here with the same JSON values."""
    if jax.process_count() == 1:
        return
    hashes = [zlib.crc32(json.dumps(value).encode()) for value in values.values()]
    found = multihost_utils.process_allgather(np.array(hashes, np.uint32))
    for name, column in zip(values, found.T.tolist(), strict=True):
        for process, value in enumerate(column):
            if value != column[0]:
                raise ValueError(
                    f"process {process} has another {name} than process 0: give all "
                    "processes the same command, config and folders"
                )


def from_first(value: int) -> int:
    """The value that process 0 has."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def wait_for_all(name: str) -> None:
    """Returns when every process is at the place of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def meet(name: str) -> None:
    """As `wait_for_all`, once for each name, from any thread while devices compute.

    A process that does not come is lost, and `Watch` sees that.
    """
    client: Any = global_state.client
    if jax.process_count() > 1:
        client.wait_at_barrier(name, _MEETING_MSECS)


def _meet_all(cluster: Cluster) -> None:
    if cluster.process == 0 and cluster.coordinator:
        _check_port(cluster.coordinator)
    if cluster.coordinator:
        print(
            f"sae-jax: process {cluster.process} of {cluster.n_processes} meets the "
            f"others at {cluster.coordinator}, and waits for them up to "
            f"{cluster.start_timeout_secs} s",
            file=sys.stderr,
        )
    try:
        jax.distributed.initialize(
            coordinator_address=cluster.coordinator,
            num_processes=cluster.n_processes,
            process_id=cluster.process,
            initialization_timeout=cluster.start_timeout_secs,
            # Later than the watch, which knows who is silent. Heartbeats come twice in
            # this time: half of it may have gone by when a process dies.
            heartbeat_timeout_seconds=max(4, round(4 * cluster.peer_timeout_secs)),
        )
    except ValueError as error:
        raise ValueError(
            f"no cluster was found ({error}): give --coordinator, --n_processes and "
            "--process, or leave out --multihost"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        address = global_state.coordinator_address or cluster.coordinator
        raise _cannot_meet(address, error) from error
    except RuntimeError as error:  # a device was asked for, or this is the second time
        raise ValueError(str(error)) from error


def _check_port(address: str) -> None:
    """PeerLost if it is another program's: jaxlib 0.10 dies of that, without a word."""
    try:
        socket.create_server(("", int(address.rpartition(":")[2]))).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _cannot_meet(address, error) from error


def _cannot_meet(address: str | None, error: Exception) -> PeerLost:
    return PeerLost(
        f"process {global_state.process_id}: the processes cannot meet at {address} "
        f"({_first_line(error)}): see that no other program has this port, or give "
        f"another --coordinator; {AGAIN}"
    )


def _open_devices() -> None:
    """The first that asks for them, when the others hear what comes of it."""
    note("opening its devices")
    try:
        jax.devices()
    except RuntimeError as error:
        raise ValueError(
            f"process {global_state.process_id} cannot open its devices "
            f"({_first_line(error)}): see to its driver, and to JAX_PLATFORMS"
        ) from error


def _part(watch: Watch) -> None:
    """Watched until all have come: one may have much more to do than another."""
    watch.note("the end", sys.maxsize)
    meet("the end")
    watch.stop()
    # What one that dies only now breaks is nobody's run any more.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.distributed.shutdown()


def _leave(watch: Watch, error: BaseException, peer_timeout_secs: float) -> None:
    message = _first_line(error)
    if _is_of_devices(error) or _is_of_devices(error.__cause__):
        # A peer that dies breaks what all do together, and saves. The watch finds out
        # who it was, and ends this process, long before that.
        time.sleep(2 * peer_timeout_secs)
    if not _is_of_devices(error):
        watch.leave(PEER_LOST if is_of_network(error) else FAILED, message)
        return
    watch.leave(PEER_LOST, message)
    raise PeerLost(f"what all processes do together broke: {message}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _is_of_devices(error: BaseException | None) -> bool:
    """jax raises some failures of collectives as ValueError, with their status."""
    text = str(error)
    has_status = isinstance(error, ValueError) and bool(_STATUS.match(text))
    is_jaxs = isinstance(error, jax.errors.JaxRuntimeError) or has_status
    return is_jaxs and _OUT_OF_MEMORY not in text


def _tell_supervisor() -> None:
    if MET_PIPE in os.environ:
        met = {
            "process": global_state.process_id,
            "coordinator": global_state.coordinator_address,
        }
        with os.fdopen(int(os.environ.pop(MET_PIPE)), "w") as pipe:
            json.dump(met, pipe)


_watch: Watch | None = None
