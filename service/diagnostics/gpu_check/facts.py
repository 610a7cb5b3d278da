"""Versions, machine and GPU, and whether the GPU can be used at all."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import torchvision

from models.runtime import cpu_count, gpu_problem
from service.diagnostics.gpu_check.records import Measurement, problems
from service.diagnostics.gpu_check.session import Session

FREE_GB = 4.0  # what the checks need
SMI_S = 20.0
SMI_COLUMNS = "name,driver_version,memory.total,memory.used,compute_mode,persistence_mode,clocks.max.sm,power.limit"


def facts(session: Session) -> Measurement:
    figures: dict[str, Any] = {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_model(),
        "cores": cpu_count(),
    }
    if not session.on_gpu:
        return Measurement(summary=f"torch {torch.__version__}, {figures['cores']} cores, no GPU used", figures=figures)
    if (problem := gpu_problem()) is not None:
        return Measurement(no_gpu=str(problem), figures=figures)
    figures |= gpu_facts(session.device)
    free_gb, mode = figures["memory_free_gb"], figures["nvidia_smi"].get("compute_mode", "Default")
    return Measurement(
        summary=f"{figures['gpu']}, sm_{''.join(map(str, figures['capability']))}, driver {figures['driver']}, "
        f"{free_gb} of {figures['memory_gb']} GB free, torch {torch.__version__}",
        figures=figures,
        problems=problems(
            (
                free_gb >= FREE_GB,
                f"{free_gb} GB are free: end the other processes on the GPU (`nvidia-smi` lists them)",
            ),
            (
                not mode.startswith("Exclusive"),
                "the compute mode is exclusive, and a server and its job share the GPU: run `nvidia-smi -c DEFAULT`",
            ),
        ),
    )


def gpu_facts(device: torch.device) -> dict[str, Any]:
    free, total = torch.cuda.mem_get_info(device)
    smi = nvidia_smi(device, SMI_COLUMNS)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "capability": torch.cuda.get_device_capability(device),
        "architectures": torch.cuda.get_arch_list(),
        "gpus": torch.cuda.device_count(),
        "memory_gb": round(total / 2**30, 1),
        "memory_free_gb": round(free / 2**30, 1),
        "driver": smi.get("driver_version", "unknown"),
        "nvidia_smi": smi,
    }


def nvidia_smi(device: torch.device, columns: str) -> dict[str, str]:
    """Returns what the driver's own tool says about this GPU; empty if there is no such tool or it fails."""
    command = ["nvidia-smi", f"--query-gpu={columns}", "--format=csv,noheader", "-i", pci_address(device)]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=SMI_S, check=True).stdout  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(columns.split(","), said.strip().split(", "), strict=False))


def pci_address(device: torch.device) -> str:
    """Returns the address for nvidia-smi, whose numbers differ from those of CUDA."""
    properties: Any = torch.cuda.get_device_properties(device)
    return f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
