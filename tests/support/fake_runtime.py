"""A backbone that computes at once, and a batcher around it."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import torch
from torch import Tensor

from service.inference.backbone_queue import BackboneQueue, Item
from service.inference.batcher import Batcher
from service.inference.results import Output
from service.observability.metrics import Metrics

CPU, META = torch.device("cpu"), torch.device("meta")


class FakeRuntime:
    """Its features are the image's first pixel, twice. `gate` holds the device until it is opened; `fail` may raise."""

    def __init__(self, max_batch: int = 8, fail: Callable[[Tensor], None] = lambda pixels: None) -> None:
        self.max_batch, self.fail = max_batch, fail
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def __call__(self, pixels: Tensor) -> Tensor:
        self.batches.append(len(pixels))
        self.entered.set()
        self.gate.wait(5)
        self.fail(pixels)
        return pixels[:, 0, 0, 0].float().unsqueeze(1).repeat(1, 2)

    def with_maps(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self(pixels), pixels.float()


def image(value: int) -> Tensor:
    return torch.full((1, 2, 2), value, dtype=torch.uint8)


def identity(features: Tensor) -> Tensor:
    return features


@asynccontextmanager
async def batching(
    runtime: FakeRuntime, max_images: int = 100, max_bytes: int = 10**6
) -> AsyncIterator[tuple[Callable[..., asyncio.Task[Output]], BackboneQueue, Metrics]]:
    metrics = Metrics()
    batcher = Batcher([CPU], metrics)
    queue = BackboneQueue("fake", {CPU: runtime}, max_images, max_bytes, metrics)
    batcher.start()

    def submit(
        value: int,
        timeout_s: float = 5.0,
        part: Callable[[Tensor], Tensor] = identity,
        head_start_s: float = 0.0,
    ) -> asyncio.Task[Output]:
        deadline = time.monotonic() + timeout_s
        return asyncio.create_task(batcher.submit(queue, Item(image(value), [part], deadline, head_start_s)))

    submit.batcher = batcher  # type: ignore[attr-defined]
    try:
        yield submit, queue, metrics
    finally:
        runtime.gate.set()
        batcher.close()


def value_of(output: Output) -> float:
    [value] = output.values.values()
    return value[0].item()


def answers(outputs: Iterable[Output | BaseException]) -> list[object]:
    return [value_of(output) if isinstance(output, Output) else type(output) for output in outputs]


async def held(runtime: FakeRuntime, submit: Callable[..., asyncio.Task[Output]]) -> asyncio.Task[Output]:
    """Occupy the device with an image of value 0, so that later images wait in the queue."""
    runtime.gate.clear()
    first = submit(0)
    assert await asyncio.to_thread(runtime.entered.wait, 5)
    return first
