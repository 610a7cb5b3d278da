"""glibc's malloc, told to keep the memory that every forward pass takes and gives back.

By default each large activation is mapped afresh and handed back to the kernel: a batch of ResNet-50 faults in tens of
thousands of pages at every forward. Another C library has no `mallopt`, or ignores these parameters: nothing happens there.
"""

import ctypes
import os

# malloc.h
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4
M_ARENA_MAX = -8


def tune_allocator() -> None:
    """Call early, before threads start: what is mapped stays mapped. Freed memory then stays with the process until `trim_allocator`.

    A single arena, because any other one maps whatever is over 64 MB afresh, whatever the thresholds say.
    """
    libc = _glibc()
    if libc is None:
        return
    libc.mallopt(M_MMAP_MAX, 0)  # all from the heap; an M_MMAP_THRESHOLD above 32 MB is refused by older versions
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never shrink the heap's top
    libc.mallopt(M_TOP_PAD, 64 * 2**20)  # bytes: grow it in few steps
    libc.mallopt(M_ARENA_MAX, 1)


def trim_allocator() -> None:
    """Hands what is free now back to the kernel, once: after loading, whose peak is above that of serving."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if os.name != "posix":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
