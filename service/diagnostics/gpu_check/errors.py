"""Checks how Imago classifies errors of torch on a GPU, whether the GPU works afterwards, and what happens without a kernel.

A case that loses the GPU runs in its own process, because all later calls of that process fail.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.runtime import Options, compile_backbone, device_works, is_device_lost, is_out_of_memory
from models.runtime.torch_engine import TorchEngine
from service.diagnostics.gpu_check.records import GpuCheckSpec, Measurement, problems
from service.diagnostics.gpu_check.session import Session, random_backbone

CASE_S = 40.0
TOO_MUCH = 10**15  # bytes


class Case(NamedTuple):
    """An error, and how it must be classified. `gpu_only`: the CPU does not raise it."""

    run: Callable[[torch.device], object]
    out_of_memory: bool = False
    lost: bool = False
    gpu_only: bool = False


def _ones(device: torch.device, *shape: int) -> Tensor:
    return torch.ones(*shape, device=device)


def _says(text: str) -> Callable[[torch.device], None]:
    def fail(device: torch.device) -> None:
        raise RuntimeError(text)

    return fail


CASES = {
    "shapes that do not fit": Case(lambda device: _ones(device, 2, 3) @ _ones(device, 2, 3)),
    "image smaller than its kernel": Case(
        lambda device: torch.nn.functional.conv2d(_ones(device, 1, 1, 1, 1), _ones(device, 1, 1, 3, 3))
    ),
    "too much memory": Case(lambda device: torch.empty(TOO_MUCH, dtype=torch.uint8, device=device), out_of_memory=True),
    "a GPU that is not there": Case(lambda device: torch.ones(1, device="cuda:99"), gpu_only=True),
    "cuDNN text, GPU works": Case(_says("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")),
    "cuBLAS text, GPU works": Case(_says("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasGemmEx")),
    "assertion in a kernel": Case(
        lambda device: torch._assert_async(torch.zeros(1, device=device)), lost=True, gpu_only=True
    ),
    "index out of range in a kernel": Case(
        lambda device: _ones(device, 4)[torch.tensor([99], device=device)].sum().item(), lost=True, gpu_only=True
    ),
}


def errors(session: Session) -> Measurement:
    figures = {}
    for name, case in CASES.items():
        if session.on_gpu or not case.gpu_only:
            found = elsewhere(session, name) if case.lost else observe(session, case)
            figures[name] = found | {"wrong": found.get("wrong") or difference(case, found)}
    wrong = {name: found["wrong"] for name, found in figures.items() if found.get("wrong")}
    return Measurement(
        summary=f"{len(figures) - len(wrong)} of {len(figures)} errors are told apart",
        figures=figures,
        problems=tuple(f"{name}: {what}" for name, what in wrong.items()),
    )


def elsewhere(session: Session, name: str) -> dict[str, Any]:
    """Returns what the case's own process observes; under `wrong` why there is no answer."""
    order = GpuCheckSpec(target=name, folder=session.folder, rehearse=session.rehearse)
    command = [sys.executable, "-m", "service.diagnostics.gpu_check.errors", order.model_dump_json()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CASE_S, check=False)  # noqa: S603
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"wrong": f"no answer within {CASE_S:.0f} s"}
    except (ValueError, IndexError):
        return {"wrong": f"exit code {done.returncode}: {done.stderr[-300:]}"}
    return found


def difference(case: Case, found: dict[str, Any]) -> str:
    expected = {"raised": True, "out_of_memory": case.out_of_memory, "lost": case.lost, "works": not case.lost}
    return ", ".join(f"{key} is {found[key]}" for key, value in expected.items() if found[key] != value)


def observe(session: Session, case: Case) -> dict[str, Any]:
    """Returns the error of a case in this process, as Imago classifies it."""
    error: Exception | None = None
    try:
        case.run(session.device)
        session.synchronize()
    except Exception as raised:
        error = raised
    return {
        "raised": error is not None,
        "type": type(error).__name__,
        "message": str(error).split("\n")[0][:160],
        "out_of_memory": error is not None and is_out_of_memory(error, session.device),
        "lost": error is not None and is_device_lost(error, session.device),
        "works": device_works(session.device),
    }


# A kernel that is missing


def missing_kernel(session: Session) -> Measurement:
    """Makes the precision that this device prefers fail in every forward pass: another one must be chosen."""
    backbone, options = random_backbone(session.network("resnet18")), Options(engine="torch")
    first = compile_backbone(backbone, session.device, options).info.precision
    if first == "float32":
        return Measurement(skipped="this device computes in float32 only: there is nothing to fall back from")
    call = TorchEngine.__call__

    def refuse(self: TorchEngine, pixels: Tensor) -> Tensor:
        if self.precision == first:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasGemmEx")
        result: Tensor = call(self, pixels)
        return result

    TorchEngine.__call__ = refuse  # type: ignore[method-assign]  # in this process, which ends after the check
    info = compile_backbone(backbone, session.device, options).info
    reasons = {candidate.precision: candidate.error for candidate in info.candidates}
    return Measurement(
        summary=f"without {first} it runs in {info.precision}",
        figures={"preferred": first, "chosen": info.precision, "errors": reasons},
        problems=problems(
            (info.precision != first, f"{first} was chosen although it fails"),
            (bool(reasons.get(first)), f"no reason is shown for {first}"),
        ),
    )


def main(order: GpuCheckSpec) -> None:
    session = Session.begin(order)
    if session.on_gpu:
        torch.ones(1, device=session.device)  # a context, so that the case's error is its own
    print(json.dumps(observe(session, CASES[order.target])), flush=True)  # noqa: T201
    os._exit(0)  # a lost device must not hold up the end of the process


if __name__ == "__main__":
    main(GpuCheckSpec.model_validate_json(sys.argv[1]))
