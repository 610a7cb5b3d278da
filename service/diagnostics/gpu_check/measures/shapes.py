"""What the first batch of each size costs, in time and in memory of the host.

cuDNN plans each layer anew for each size of a batch, and keeps the plans per thread.
"""

import statistics
import threading
import time
from typing import Any

import torch

from models.classifier import Backbone
from models.runtime import CompiledBackbone, Options, compile_backbone
from service.diagnostics.gpu_check.records import Measurement, problems
from service.diagnostics.gpu_check.session import Session, host_memory_mb, random_backbone, random_pixels

SIZES = (*range(1, 41), 64, 96, 128, 200, 256)  # images
MOST_COLD = 16  # as many sizes as a runtime may compute in; every other batch is padded to one of them
COLD_MS, COLD_SHARE = 3.0, 0.5  # the first pass takes so much longer than the second, in time and of the second
MOST_MEMORY_MB = 500.0


def cold_shapes(session: Session) -> Measurement:
    """ResNet-50, compiled in one thread and then used by two others, one after the other, as a device thread would."""
    backbone = random_backbone(session.network("resnet50"))
    options = session.size(Options(max_batch=256), Options(engine="torch", max_batch=4))
    runtime = compile_backbone(backbone, session.device, options)
    sizes = session.size(SIZES, SIZES[:3])
    figures = {f"thread_{number}": _in_thread(session, runtime, backbone, sizes) for number in (1, 2)}
    return judged(figures, len(sizes))


def judged(figures: dict[str, Any], sizes: int) -> Measurement:
    first, second = figures["thread_1"], figures["thread_2"]
    return Measurement(
        summary=f"of {sizes} sizes {first['cold']} are slow the first time ({first['cold_ms']} ms in all), "
        f"{second['cold']} in another thread; {first['host_memory_mb']} MB of the host",
        figures=figures,
        problems=problems(
            (first["cold"] <= MOST_COLD, f"{first['cold']} sizes of a batch are slow the first time"),
            (
                first["host_memory_mb"] <= MOST_MEMORY_MB,
                f"the host's memory grows by {first['host_memory_mb']} MB over {sizes} sizes",
            ),
        ),
    )


def _in_thread(
    session: Session, runtime: CompiledBackbone, backbone: Backbone, sizes: tuple[int, ...]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: found.update(_walk(session, runtime, backbone, sizes)))
    thread.start()
    thread.join()
    if not found:
        raise RuntimeError("the thread failed; its error is above")
    return found


def _walk(session: Session, runtime: CompiledBackbone, backbone: Backbone, sizes: tuple[int, ...]) -> dict[str, Any]:
    """First and second pass of each size, in this thread."""
    before, times = host_memory_mb(), []
    for size in sizes:
        pixels = random_pixels(size, backbone)
        times.append((_pass_ms(session, runtime, pixels), _pass_ms(session, runtime, pixels)))
    cold = [first - second for first, second in times if first - second > max(COLD_MS, COLD_SHARE * second)]
    return {
        "cold": len(cold),
        "cold_ms": round(sum(cold)),
        "cold_median_ms": round(statistics.median(cold), 1) if cold else 0.0,
        "host_memory_mb": round(host_memory_mb() - before),
        "first_ms": {size: round(first, 2) for size, (first, _) in zip(sizes, times, strict=True)},
        "second_ms": {size: round(second, 2) for size, (_, second) in zip(sizes, times, strict=True)},
    }


def _pass_ms(session: Session, runtime: CompiledBackbone, pixels: torch.Tensor) -> float:
    began = time.perf_counter()
    runtime(pixels)
    session.synchronize()
    return (time.perf_counter() - began) * 1000
