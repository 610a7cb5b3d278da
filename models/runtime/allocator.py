"""Sets glibc's malloc to keep the memory that every forward pass allocates and frees.

By default each large activation is mapped anew and returned to the kernel: a batch of ResNet-50 faults in tens of
thousands of pages at every forward pass. Nothing happens with another C library, which has no `mallopt` or ignores these parameters.
"""

import ctypes
import os

# malloc.h
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4
M_ARENA_MAX = -8


def tune_allocator() -> None:
    """Keep freed memory in the process until `trim_allocator`. Call it early, before threads start: existing mappings stay as they are.

    A single arena is used, because other arenas map blocks over 64 MB anew, whatever the thresholds say.
    """
    libc = _glibc()
    if libc is None:
        return
    libc.mallopt(M_MMAP_MAX, 0)  # all from the heap; an M_MMAP_THRESHOLD above 32 MB is refused by older versions
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never shrink the heap's top
    libc.mallopt(M_TOP_PAD, 64 * 2**20)  # bytes: grow it in few steps
    libc.mallopt(M_ARENA_MAX, 1)


def trim_allocator() -> None:
    """Return free memory to the kernel, once; called after loading, which needs more memory than serving."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if os.name != "posix":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
