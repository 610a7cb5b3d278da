"""Finds the GPUs that this process can use, and what is wrong with the others.

CUDA starts? -> a GPU is visible? -> its architecture is among torch's kernels? -> it computes?

Each step that fails becomes a `GpuProblem` with a cause and a remedy. The last step creates a CUDA context on the GPU (0.2 to 0.5 GB of
its memory), because a GPU in exclusive mode or without free memory is found only that way. Every step runs in its own thread, which is
abandoned after `ANSWER_S` seconds.
"""

import ctypes
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import torch

_Result = TypeVar("_Result")
Code = Literal[
    "torch_without_cuda",
    "gpu_hidden",
    "no_such_gpu",
    "no_driver",
    "driver_too_old",
    "no_permission",
    "card_too_old",
    "no_memory",
    "gpu_busy",
    "no_answer",
    "gpu_broken",
]

ANSWER_S = 60.0  # for CUDA to start, and then for each GPU; eight GPUs without persistence mode take about 20 s
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
DEVICE_FILES = Path("/dev")
CUDA_LIBRARY = "libcuda.so.1"
# https://docs.nvidia.com/deploy/cuda-compatibility: the oldest driver for each major version of CUDA
OLDEST_DRIVER = {"11": "450.80", "12": "525.60", "13": "580"}


class GpuProblem(NamedTuple):
    """The reason why a GPU, or every GPU, cannot be used. `code` is stable; `cause` and `remedy` are for people."""

    code: Code
    cause: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.cause}; {self.remedy}"


class Gpus(NamedTuple):
    """The GPUs that work, and a problem for each that does not; if there is no GPU, one problem that says why."""

    usable: list[torch.device]
    problems: dict[str, GpuProblem]  # by device; "cuda" if it concerns all


def gpu_problem() -> GpuProblem | None:
    """Return the reason why no GPU can be used; None if one can.

    Creates a CUDA context on each GPU that it tries. Takes at most `ANSWER_S` seconds, and as long again for each GPU.
    """
    usable, problems = gpus()
    return None if usable else next(iter(problems.values()))


def gpus(only: torch.device | None = None) -> Gpus:
    """Try every visible GPU, or only the one that is named; see `gpu_problem`."""
    try:
        count = _within(ANSWER_S, _count)
    except TimeoutError:
        return Gpus([], {"cuda": _no_answer("the NVIDIA driver")})
    if isinstance(count, GpuProblem):
        return Gpus([], {"cuda": count})
    devices = [torch.device("cuda", index) for index in range(count)]
    if only is not None and only not in devices:
        remedy = f"there are {count}, numbered from 0"
        return Gpus([], {str(only): GpuProblem("no_such_gpu", f"there is no GPU {only}", remedy)})
    devices = devices if only is None else [only]
    problems = {str(device): problem for device in devices if (problem := _problem_of(device)) is not None}
    return Gpus([device for device in devices if str(device) not in problems], problems)


def _problem_of(device: torch.device) -> GpuProblem | None:
    try:
        return _within(ANSWER_S, lambda: _tried(device))
    except TimeoutError:
        return _no_answer(str(device))


def _no_answer(who: str) -> GpuProblem:
    return GpuProblem(
        "no_answer",
        f"{who} does not answer within {ANSWER_S:.0f} s",
        "see dmesg for Xid errors, and restart the machine",
    )


def _count() -> int | GpuProblem:
    """Return the number of GPUs that CUDA shows, or why it shows none."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            if torch.cuda.is_available():
                return torch.cuda.device_count()
            torch.cuda.init()  # type: ignore[no-untyped-call]
            sentence = "CUDA starts and shows no GPU"
        except Exception as error:  # AssertionError where torch is built without CUDA
            sentence = _first_line(error)
        return next(_causes("; ".join([sentence, *(_first_line(warning.message) for warning in said)])))


def _first_line(said: object) -> str:
    return str(said).partition("\n")[0]


def _causes(sentence: str) -> Iterator[GpuProblem]:
    """Yield the likely causes of no visible GPU, the most certain first. `sentence` is torch's message."""
    if torch.version.cuda is None:
        remedy = "install the CUDA build of torch (`make setup TORCH=cuda`), or use --device cpu"
        yield GpuProblem("torch_without_cuda", "this torch is built without CUDA", remedy)
    if "too old" in sentence:
        needed = OLDEST_DRIVER.get(str(torch.version.cuda).partition(".")[0])
        driver = f"an NVIDIA driver {needed} or later" if needed else f"a driver for CUDA {torch.version.cuda}"
        cause = f"the NVIDIA driver{_driver_version()} is too old for CUDA {torch.version.cuda}"
        yield GpuProblem("driver_too_old", cause, f"install {driver} on the host")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if (hidden is not None and not any(part.strip() for part in hidden.split(","))) or hidden == "-1":
        remedy = "unset it, or set it to the number of a GPU"
        yield GpuProblem("gpu_hidden", f"CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU", remedy)
    if not _has_library():
        yield _no_driver()
    yield from _file_problems()
    if hidden is not None:
        cause = f"CUDA_VISIBLE_DEVICES={hidden!r} names no GPU that is here"
        yield GpuProblem("gpu_hidden", cause, "unset it, or set it to the number of a GPU that `nvidia-smi` lists")
    yield GpuProblem("gpu_broken", f"CUDA shows no GPU ({sentence})", "see what `nvidia-smi` and `dmesg` say")


def _has_library() -> bool:
    try:
        ctypes.CDLL(CUDA_LIBRARY)
    except OSError:
        return False
    return True


def _no_driver() -> GpuProblem:
    if DRIVER_VERSION.exists() or (DEVICE_FILES / "nvidiactl").exists():
        cause = f"the NVIDIA driver{_driver_version()} is not shown to this process ({CUDA_LIBRARY} is missing)"
        remedy = (
            "start the container with `--gpus all` and the NVIDIA Container Toolkit, or install the driver's libraries"
        )
        return GpuProblem("no_driver", cause, remedy)
    remedy = "install one, in Docker also the NVIDIA Container Toolkit, and start the container with `--gpus all`"
    return GpuProblem("no_driver", "there is no NVIDIA driver", remedy)


def _driver_version() -> str:
    """Return the driver's version after a space, as " 570.86.15", or "" if it is unknown."""
    try:
        version = re.search(r"\b\d{3,}\.\d[\d.]*", DRIVER_VERSION.read_text())
    except OSError:
        return ""
    return f" {version[0]}" if version else ""


def _file_problems() -> Iterator[GpuProblem]:
    """Yield problems with the device files that CUDA needs: no permission, or missing."""
    files = [DEVICE_FILES / name for name in ("nvidiactl", "nvidia-uvm")]
    files += sorted(path for path in DEVICE_FILES.glob("nvidia*") if path.name[len("nvidia") :].isdecimal())
    closed = [str(path) for path in files if path.exists() and not os.access(path, os.R_OK | os.W_OK)]
    if closed:
        remedy = "add the user to the group that owns them (`ls -l /dev/nvidia*`), in Docker by --group-add"
        yield GpuProblem("no_permission", f"no permission to open {', '.join(closed)}", remedy)
    missing = [str(path) for path in files[:2] if not path.exists()]
    if missing and DRIVER_VERSION.exists():
        remedy = "run `nvidia-modprobe -u -c=0` on the host, and start the container with `--gpus all`"
        yield GpuProblem("no_driver", f"the NVIDIA driver is loaded and {', '.join(missing)} is missing", remedy)


def _too_old(device: torch.device) -> GpuProblem | None:
    """Return the problem of a card for whose architecture this torch has no kernels."""
    carried = [arch for arch in torch.cuda.get_arch_list() if arch.startswith(("sm_", "compute_"))]
    major, minor = torch.cuda.get_device_capability(device)
    if not carried or any(_runs(arch, major, minor) for arch in carried):
        return None
    age = "too old" if (major, minor) < min(_capability(arch) for arch in carried) else "unknown to this torch"
    cause = f"{device} ({torch.cuda.get_device_name(device)}, sm_{major}{minor}) is {age}: torch {torch.__version__}"
    remedy = "use another GPU, a torch built for this one, or --device cpu"
    return GpuProblem("card_too_old", f"{cause} has kernels for {', '.join(carried)}", remedy)


def _runs(arch: str, major: int, minor: int) -> bool:
    """Return whether a GPU of this capability runs code for `arch`: sm_80 on every 8.x, sm_90a on 9.0 only, compute_80 on 8.0 and later."""
    code = _capability(arch)
    if arch.startswith("compute_"):
        return code <= (major, minor)
    return code == (major, minor) if arch.endswith("a") else code[0] == major and code[1] <= minor


def _capability(arch: str) -> tuple[int, int]:
    number = int(re.sub(r"\D", "", arch))
    return number // 10, number % 10


def _tried(device: torch.device) -> GpuProblem | None:
    """Run a tiny computation, which needs a context, memory and a kernel."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about a card that is too old
            if (problem := _too_old(device)) is not None:
                return problem
            torch.ones(1, device=device).sum().item()
    except Exception as error:
        return _broken(device, _first_line(error))
    return None


def _broken(device: torch.device, sentence: str) -> GpuProblem:
    text = sentence.lower()
    if "out of memory" in text:
        remedy = "end the process that holds it (`nvidia-smi` lists them), or use another GPU"
        return GpuProblem("no_memory", f"no memory is free on {device}", remedy)
    if "busy or unavailable" in text or "exclusive" in text:
        cause = f"{device} is taken by another process, or its compute mode is exclusive"
        return GpuProblem("gpu_busy", cause, "end that process, or run `nvidia-smi -c DEFAULT`")
    if "no kernel image" in text or "device kernel image is invalid" in text or "ptx" in text:
        remedy = "use another GPU, a torch built for this one, or --device cpu"
        return GpuProblem("card_too_old", f"this torch has no kernels for {device} ({sentence})", remedy)
    return GpuProblem(
        "gpu_broken", f"{device} does not compute ({sentence})", "see dmesg for Xid errors, and restart it"
    )


def _within(seconds: float, function: Callable[[], _Result]) -> _Result:
    """Return the function's result. Raises TimeoutError; its thread goes on, because a call into the driver cannot be stopped."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="gpu-check", daemon=True).start()
    return future.result(timeout=seconds)
