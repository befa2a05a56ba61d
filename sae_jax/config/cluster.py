"""Where the processes of a run meet, and how long each waits for another."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where the processes of a run meet.

    What is None is found by jax: on Cloud TPU, GKE, Slurm and under Open MPI.
    """

    coordinator: str | None = None  # HOST:PORT of process 0
    n_processes: int | None = None
    process: int | None = None  # which of them this is, from 0
    start_timeout_secs: int = 300  # until all have come
    peer_timeout_secs: float = 60
    stall_timeout_secs: float = 1800

    def __post_init__(self) -> None:
        n, process = self.n_processes, self.process
        if (n is None) != (process is None) or (n is None) != (not self.coordinator):
            raise ValueError(
                f"coordinator = {self.coordinator}, n_processes = {n}, process = "
                f"{process}: give all three, or none of them to have them found"
            )
        if self.coordinator and not self.coordinator.rpartition(":")[2].isdigit():
            raise ValueError(
                f"coordinator = {self.coordinator!r}: give HOST:PORT of process 0, as "
                "10.0.0.2:8476"
            )
        if n is not None and process is not None and not 0 <= process < n:
            raise ValueError(
                f"process = {process} of n_processes = {n}: the first is 0, the last "
                f"{n - 1}"
            )
        for name in ("start", "peer", "stall"):
            secs = getattr(self, f"{name}_timeout_secs")
            if secs <= 0:
                raise ValueError(f"{name}_timeout_secs = {secs}: must be above 0")
