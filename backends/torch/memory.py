"""Memory of the process: what it took of its GPU, and keeping what was freed on a CPU.

On Linux the C library hands every large block back and faults it in again, page by page.
"""

import ctypes
import gc
import sys

import torch

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


def forget_models() -> None:
    """Free the memory of models that nothing refers to any more; FSDP's parts refer to one another, and outlive their names."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_gpu_bytes() -> int:
    """The most of its GPU that this process took since reset_peak_memory_stats: tensors, blocks kept free, CUDA's own."""
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.max_memory_reserved() + (total - free - torch.cuda.memory_reserved())
