"""How a run that is not done ends: exit codes, and the exceptions behind some.

This module imports nothing that takes long: the process that only waits for another
(`sae_jax.cli.supervise`) needs it.
"""

import errno

FAILED = 1
MISUSED = 2
PREEMPTED = 75
PEER_LOST = 76  # another process, or the bucket of the run
STOPPED = 130  # as a shell tells of a process that SIGINT ended

AGAIN = "run the same command again to go on from the last checkpoint"

# What such a parent tells its child in the environment: its own id, and the number of
# an open pipe, on which the child says that it met the others, and as what.
SUPERVISOR = "SAE_JAX_SUPERVISOR"
MET_PIPE = "SAE_JAX_MET_PIPE"


class Preempted(Exception):
    """SIGTERM came, as when a machine is taken back; the state is saved."""


class PeerLost(Exception):
    """Another process of the run is gone."""


def is_of_network(error: BaseException) -> bool:
    """Whether the same command may well go on later: what it needs was not reached."""
    is_unreachable = isinstance(error, OSError) and error.errno == errno.EHOSTUNREACH
    return is_unreachable or isinstance(error, PeerLost)
