"""Which devices there are, what they gain from, and what their errors mean."""

import logging

import torch

from models import cgroup
from models.errors import DeviceUnavailable

log = logging.getLogger(__name__)

SHARE = 0.8  # of a GPU's free memory, for training beside a server

CPU_QUOTA = cgroup.ROOT / "cpu.max"  # of a container; models/cgroup.py has the other places

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "std::bad_alloc", "cublas_status_alloc_failed")
DEVICE_LOST = (
    "cuda error",
    "cudnn error",
    "device-side assert",
    "illegal memory access",
    "unspecified launch failure",
    "uncorrectable ecc error",
)


def devices(name: str) -> list[torch.device]:
    """`auto`: every visible GPU, or else the CPU. `cuda`: every visible GPU. `cuda:1`, `cpu`: that one.

    Raises DeviceUnavailable for a device that is not there, and for a name that is none.
    """
    if name == "cpu":
        return [torch.device("cpu")]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto" and count == 0:
        log.warning("no CUDA device is visible: running on the CPU")
        return [torch.device("cpu")]
    if name in ("auto", "cuda"):
        if count == 0:
            raise DeviceUnavailable(f"no CUDA device is visible ({_why_no_cuda()}); use --device cpu or auto")
        return [torch.device("cuda", index) for index in range(count)]
    return [_numbered(name, count)]


def pick_device(name: str) -> torch.device:
    """The first of `devices(name)`: for a command that uses one."""
    return devices(name)[0]


def _numbered(name: str, count: int) -> torch.device:
    kind, _, index = name.partition(":")
    if kind != "cuda" or not index.isdecimal():
        raise DeviceUnavailable(f"unknown device {name!r}; it is auto, cpu, cuda, or cuda:N")
    if int(index) >= count:
        there = f"there are {count}, numbered from 0" if count else f"no CUDA device is visible ({_why_no_cuda()})"
        raise DeviceUnavailable(f"no device {name}: {there}")
    return torch.device("cuda", int(index))


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return "no driver, no GPU, or CUDA_VISIBLE_DEVICES hides it"


def gains_from_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is computed natively there. Elsewhere it is emulated, several times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes in use there, by all processes, and bytes in all; None for the CPU, and where the device does not say."""
    if device.type != "cuda":
        return None
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:
        return None
    return total - free, total


def leave_memory(device: torch.device) -> None:
    """Bounds what this process may take on a GPU to SHARE of what is free there now: who serves on it has room to grow."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(SHARE * free / total, device)


def cpu_count() -> int:
    """Cores that this process may use: its affinity mask, and a container's quota, which torch does not look at."""
    return cgroup.cpu_count(CPU_QUOTA.parent)


def is_out_of_memory(error: BaseException) -> bool:
    """The device, or the machine, had not enough memory for this batch; a smaller one may fit."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OUT_OF_MEMORY)


def is_device_lost(error: BaseException) -> bool:
    """The device is of no more use to this process: every later call would fail as well."""
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or any(text in str(error).lower() for text in DEVICE_LOST)
