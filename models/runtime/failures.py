"""Classifies an error on a device: too little memory, a lost device, or an error of this batch alone.

clearly memory -> a smaller batch may fit        ambiguous -> memory, if the device has little free
anything else  -> the device is asked to compute: if it can, the error concerned this batch alone, otherwise it is lost
"""

import torch

from models.runtime.device import memory

MEMORY_TEXTS = (
    "out of memory",
    "not enough memory",
    "insufficient memory",
    "allocate memory",
    "failed to allocate",
    "memory allocation",
    "memoryallocation",
    "bad alloc",
    "alloc failed",
    "allocation failed",
)
# CUDA's libraries say this when memory is gone, and for other reasons too.
AMBIGUOUS_TEXTS = (
    "status not initialized",
    "status internal error",
    "status execution failed",
    "find an engine",
    "no valid engine",
    "no execution plans",
    "unhandled cuda error",
)
ORDINARY = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, NameError, ImportError)
# CUDA's libraries create handles of up to 200 MB, and a convolution's workspace is often more.
LITTLE_BYTES, LITTLE_SHARE = 256 * 2**20, 0.05


def is_out_of_memory(error: BaseException, device: torch.device | None = None) -> bool:
    """Return whether the device or the machine had too little memory for this batch, so that a smaller one may fit.

    device: the GPU that is asked for its free memory if the error is ambiguous; without it such an error does not count as memory.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower().replace("_", " ")
    if any(said in text for said in MEMORY_TEXTS):
        return True
    return device is not None and any(said in text for said in AMBIGUOUS_TEXTS) and has_little_memory(device)


def is_host_memory(error: BaseException) -> bool:
    """Return whether an out-of-memory error concerns the machine's memory and not its GPU's."""
    return isinstance(error, MemoryError) or "cpuallocator" in str(error).lower()


def has_little_memory(device: torch.device) -> bool:
    """Return whether less than 256 MB or 5 % of a GPU's memory is free; False for the CPU and for a GPU that does not answer."""
    known = memory(device)
    if known is None:
        return False
    used, total = known
    return total - used < max(LITTLE_BYTES, LITTLE_SHARE * total)


def is_device_lost(error: BaseException, device: torch.device) -> bool:
    """Return whether every later call on the device would fail as well.

    The device has to compute something for this, because CUDA reports an error of one batch in the same words as a lasting one. It may
    hang meanwhile; in a device thread `/health/live` notices that, as it does for a batch that hangs.
    """
    if isinstance(error, ORDINARY) or is_out_of_memory(error):
        return False
    return not device_works(device)


def device_works(device: torch.device) -> bool:
    """Return whether a tiny computation succeeds, or fails only because the memory is full.

    It is tried twice, because CUDA reports an earlier asynchronous error at the next call; only a sticky one is reported at every call.
    """
    return _computes(device) or _computes(device)


def _computes(device: torch.device) -> bool:
    try:
        torch.ones(1, device=device).sum().item()
    except Exception as error:
        return is_out_of_memory(error)
    return True
