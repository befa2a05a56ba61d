"""What a TPU core's memory looks like to a kernel."""

LANES = 128  # columns of a vector register
SUBLANES = 8  # rows of a vector register of 32-bit values
# Of the 64 MiB of a v5p core, the smallest of the chips in use; the rest is XLA's.
VMEM_LIMIT = 56 * 2**20


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is at least n."""
    return -(-n // multiple) * multiple
