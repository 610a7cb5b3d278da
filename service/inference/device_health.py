"""Watches which devices work, and says why no GPU is used."""

import asyncio
from collections.abc import Callable, Iterable, Sequence

import torch

from models.runtime import gpu_problem
from service.errors import DeviceLost
from service.inference.batcher import Batcher, DeviceState
from service.inference.registry.loader import LoadedBackbone

WATCH_S = 1.0  # between two checks of several devices


class DeviceHealth:
    """The health of a batcher's devices. A device hangs if one batch takes longer than `hangs_after_s()`."""

    def __init__(self, batcher: Batcher, hangs_after_s: Callable[[], float]) -> None:
        self._batcher, self._hangs_after_s = batcher, hangs_after_s
        self._watcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        if len(self._batcher.workers) > 1:
            self._watcher = asyncio.create_task(self._watch())

    def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()

    def states(self) -> dict[torch.device, DeviceState]:
        return self._batcher.states(self._hangs_after_s())

    def answers(self, backbones: Iterable[LoadedBackbone]) -> bool:
        """Return whether a device works, and each of these backbones is on one that works."""
        working = {device for device, state in self.states().items() if state == "works"}
        return bool(working) and not any(working.isdisjoint(backbone.queue.runtimes) for backbone in backbones)

    async def _watch(self) -> None:
        """Give up a device that hangs while others work, so that waiting images go to the others."""
        while True:
            await asyncio.sleep(WATCH_S)
            states = self.states()
            if "works" in states.values():
                for device in [device for device, state in states.items() if state == "hangs"]:
                    self._batcher.lose(device, DeviceLost(f"{device} hangs in a batch"))


def why_no_gpu(setting: str, devices: Sequence[torch.device]) -> str | None:
    """Return why the device setting `auto` uses the CPU; None if it does not."""
    if setting != "auto" or any(device.type != "cpu" for device in devices):
        return None
    problem = gpu_problem()
    return None if problem is None else f"running on the CPU: {problem}"
