"""`imago serve` on a device that breaks once a file is there: python faulty_server.py FILE assert|hang|cuda serve ..."""

import sys
import time
from pathlib import Path
from typing import Any

import torch

from models.runtime import failures
from models.runtime.torch_engine import TorchEngine
from service.cli import main
from service.inference import engine

file, fault = Path(sys.argv[1]), sys.argv[2]
call = TorchEngine.__call__


def breaking(self: TorchEngine, *given: Any) -> Any:
    if file.exists() and fault == "hang":
        time.sleep(3600)
    if file.exists() and fault == "cuda":
        torch._assert_async(torch.zeros(1, device=self.device))  # a real one, on the device
        return call(self, *given)
    if file.exists():
        failures.device_works = lambda device: False
        raise RuntimeError("CUDA error: device-side assert triggered")
    return call(self, *given)


if fault == "hang":
    engine.HANGS_AFTER_S = 2.0
setattr(TorchEngine, "__call__", breaking)  # noqa: B010
main(sys.argv[3:])
