"""Fake checks for the runner of `imago doctor --gpu`, and a child process that runs them without torch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from service.diagnostics.gpu_check import child
from service.diagnostics.gpu_check.records import GpuCheckSpec, Measurement


def passes(order: GpuCheckSpec) -> Measurement:
    return Measurement(summary="42 images/s", figures={"gpu": "Fake GPU", "rate": 42.0})


def fails(order: GpuCheckSpec) -> Measurement:
    return Measurement(summary="7 images/s", figures={"rate": 7.0}, problems=("7 images/s are too few",))


def skips(order: GpuCheckSpec) -> Measurement:
    return Measurement(skipped="needs two GPUs")


def finds_no_gpu(order: GpuCheckSpec) -> Measurement:
    return Measurement(no_gpu="there is no NVIDIA driver; install one")


def is_not_finite(order: GpuCheckSpec) -> Measurement:
    return Measurement(figures={"rate": float("inf"), "loss": float("nan")})


def raises(order: GpuCheckSpec) -> Measurement:
    raise RuntimeError("CUDA error: unspecified launch failure")


def hangs(order: GpuCheckSpec) -> Measurement:
    print("compiling", flush=True)
    time.sleep(600)
    return Measurement()


def ignores_sigterm(order: GpuCheckSpec) -> Measurement:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return hangs(order)


def dies(order: GpuCheckSpec) -> Measurement:
    os.kill(os.getpid(), signal.SIGSEGV)
    return Measurement()


def leaves_early(order: GpuCheckSpec) -> Measurement:
    os._exit(0)


def prints_rubbish(order: GpuCheckSpec) -> Measurement:
    os.write(1, b"\xff\xfe{]\n" * 1000)
    return passes(order)


def returns_rubbish(order: GpuCheckSpec) -> Any:
    return {"speed": "high"}


def writes_rubbish(order: GpuCheckSpec) -> Any:
    (order.folder / child.OUTCOME).write_text('{"summary": ')
    os._exit(0)


def starts_a_server(order: GpuCheckSpec) -> Measurement:
    """Leaves a process behind, whose number is a figure."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    return Measurement(figures={"pid": process.pid})


def shows_its_surroundings(order: GpuCheckSpec) -> Measurement:
    names = ("CUDA_VISIBLE_DEVICES", "IMAGO_DATA", "IMAGO_ADMIN_KEY")
    return Measurement(
        figures={
            "environment": {name: os.environ.get(name) for name in names},
            "folder": str(Path.cwd()),
            "order": order.model_dump(mode="json"),
        }
    )


if __name__ == "__main__":
    child.end(child.main(GpuCheckSpec.model_validate_json(sys.argv[1]), lambda order: order))
