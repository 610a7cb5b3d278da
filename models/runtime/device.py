"""Finds the devices that can be used, what they support, and their memory."""

import logging
import re

import torch

from models.errors import DeviceUnavailable
from models.files import cgroup
from models.runtime.gpus import gpus
from models.runtime.options import Precision

log = logging.getLogger(__name__)

SHARE = 0.8  # of a GPU's free memory that a trainer beside a server may use

CPU_QUOTA = cgroup.ROOT / "cpu.max"  # of a container; models/files/cgroup.py has the other places


def devices(name: str) -> list[torch.device]:
    """Return the devices of a name. `auto`: every GPU that works, or else the CPU. `cuda`: every visible GPU. `cuda:1`, `cpu`: that one.

    Raises DeviceUnavailable for a GPU that cannot be used, and for an unknown name.
    """
    if name == "cpu":
        return [torch.device("cpu")]
    if not re.fullmatch(r"auto|cuda(:(0|[1-9][0-9]{0,2}))?", name):
        raise DeviceUnavailable(f"unknown device {name!r}; it is auto, cpu, cuda, or cuda:N")
    usable, problems = gpus(
        torch.device(name) if ":" in name else None
    )  # no context is created on GPUs that are not asked for
    if name == "auto":
        for device, problem in problems.items():
            log.warning(f"{device} is not used: {problem}" if usable else f"running on the CPU: {problem}")
        return usable or [torch.device("cpu")]
    if problems:
        raise DeviceUnavailable(f"device {name} cannot be used: {'; '.join(map(str, problems.values()))}")
    return usable


def pick_device(name: str) -> torch.device:
    """Return the first of `devices(name)`, for a command that uses one."""
    return devices(name)[0]


def gains_from_bfloat16(device: torch.device) -> bool:
    """Return whether the device computes bfloat16 natively. Elsewhere it is emulated, several times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def half_precisions(device: torch.device) -> tuple[Precision, ...]:
    """Return the 16-bit precisions that the device computes natively, the more exact one first; others are no faster than float32."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return ("float16", "bfloat16") if capability >= (8, 0) else ("float16",) if capability >= (7, 0) else ()
    return ("bfloat16",) if gains_from_bfloat16(device) else ()


def use_ieee_float32() -> None:
    """Switch TF32 off in this process, so that float32 on a GPU has 24 bits, as on a CPU. By default cuDNN rounds to 11.

    Uses the settings that torch.backends.cudnn.flags() saves and restores; it refuses those of single operators.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def memory(device: torch.device) -> tuple[int, int] | None:
    """Return a GPU's bytes in use, by all processes, and its total; None for the CPU, or if the GPU does not answer."""
    if device.type != "cuda":
        return None
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:
        return None
    return total - free, total


def leave_memory(device: torch.device) -> None:
    """Limit this process to SHARE of a GPU's free memory, so that a server on the same GPU has room to grow."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(SHARE * free / total, device)


def release_cached_memory(device: torch.device) -> None:
    """Return torch's cache of freed GPU memory to the driver; nothing on the CPU. Other threads' next batches allocate anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def cpu_count() -> int:
    """Return the cores that this process may use, by its affinity mask and a container's quota, which torch ignores."""
    return cgroup.cpu_count(CPU_QUOTA.parent)
