"""How fast a batch of images reaches the GPU: from ordinary, pinned and registered memory."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from service.diagnostics.gpu_check.records import Measurement, problems
from service.diagnostics.gpu_check.session import Session

BATCH_BYTES = 256 * 224 * 224 * 3
ONE_BYTES = 224 * 224 * 3


def transfers(session: Session) -> Measurement:
    if not session.on_gpu:
        return Measurement(skipped="needs a GPU")
    target = torch.empty(BATCH_BYTES, dtype=torch.uint8, device=session.device)
    pageable = torch.full((BATCH_BYTES,), 7, dtype=torch.uint8)  # every page written, or none is read
    pinned = torch.empty(BATCH_BYTES, dtype=torch.uint8, pin_memory=True)
    features = torch.empty(256, 2048, device=session.device)
    kept = torch.empty(256, 2048, pin_memory=True)

    def rate(source: Tensor) -> float:
        milliseconds = session.milliseconds(lambda: target.copy_(source, non_blocking=True), 20)
        return round(BATCH_BYTES / milliseconds / 1e6, 2)

    figures: dict[str, float | bool] = {"pageable_gb_s": rate(pageable), "pinned_gb_s": rate(pinned)}
    with registered(BATCH_BYTES) as shared:
        figures |= {"registered_is_pinned": shared.is_pinned(), "registered_gb_s": rate(shared)}
    one = pinned[:ONE_BYTES]
    figures["one_image_us"] = round(1000 * session.milliseconds(lambda: target[:ONE_BYTES].copy_(one, True), 50), 1)
    figures["features_back_ms"] = round(session.milliseconds(lambda: kept.copy_(features, non_blocking=True), 20), 3)
    return judged(figures)


def judged(figures: dict[str, float | bool]) -> Measurement:
    pageable, pinned, shared = (figures[f"{kind}_gb_s"] for kind in ("pageable", "pinned", "registered"))
    return Measurement(
        summary=f"to the GPU: pageable {pageable}, pinned {pinned}, registered {shared} GB/s",
        figures=figures,
        problems=problems(
            (pinned >= 0.8 * pageable, f"pinned memory ({pinned} GB/s) is slower than pageable ({pageable} GB/s)"),
            (shared >= 0.7 * pinned, f"registered memory ({shared} GB/s) is slower than pinned ({pinned} GB/s)"),
        ),
    )


@contextmanager
def registered(size: int) -> Iterator[Tensor]:
    """Shared memory that CUDA has locked, as uint8 (size,). Raises RuntimeError where CUDA refuses."""
    shared = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)  # the tensor keeps the memory
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if (code := int(runtime.cudaHostRegister(shared.data_ptr(), size, 0))) != 0:
        raise RuntimeError(f"cudaHostRegister answers {code}")
    try:
        yield shared
    finally:
        torch.cuda.synchronize()
        runtime.cudaHostUnregister(shared.data_ptr())
