"""Which of how many processes this is: flags of the commands that several can share."""

from absl import flags

N_PROCESSES = flags.DEFINE_integer(
    "n_processes", 1, "how many processes share the work", lower_bound=1
)
PROCESS = flags.DEFINE_integer(
    "process", 0, "which of n_processes this is, from 0", lower_bound=0
)
