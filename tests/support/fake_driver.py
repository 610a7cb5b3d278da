"""An NVIDIA driver that shows the GPUs a test asks for, or says why it shows none."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from models.runtime import gpus

WHEEL = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")  # of torch 2.15 for CUDA 13.2
NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU."


@dataclass(frozen=True)
class Card:
    """A visible GPU. `error`: raised by every computation on it."""

    capability: tuple[int, int] = (9, 0)
    error: Exception | None = None


def with_gpus(monkeypatch: pytest.MonkeyPatch, *cards: Card, carried: tuple[str, ...] = WHEEL) -> None:
    """Torch sees these; where there are none, there is no driver."""
    real = torch.ones

    def ones(*size: Any, device: Any = None, **more: Any) -> torch.Tensor:
        if device is not None and torch.device(device).type == "cuda" and (error := card(device).error) is not None:
            raise error
        return real(*size, **more)

    def card(device: Any) -> Card:
        return cards[torch.device(device).index]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [*carried])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: card(device).capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T1000")
    monkeypatch.setattr(torch, "ones", ones)
    if not cards:
        without_gpu(monkeypatch, NO_DRIVER, Path("/nonexistent"), library=False)


def without_gpu(monkeypatch: pytest.MonkeyPatch, sentence: str, machine: Path, library: bool = True) -> None:
    """Torch sees no GPU and says `sentence`. `machine` holds dev/ and the driver's version; `library`: libcuda is there."""

    def init() -> None:
        raise RuntimeError(sentence)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(gpus, "DEVICE_FILES", machine / "dev")
    monkeypatch.setattr(gpus, "DRIVER_VERSION", machine / "version")
    monkeypatch.setattr(gpus, "CUDA_LIBRARY", "libc.so.6" if library else "libnone.so.1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
