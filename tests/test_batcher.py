"""The batcher with fake backbones: batches, isolation, deadlines, leaving callers, memory, order."""

import asyncio
import time
from operator import attrgetter

import pytest
import torch
from support.fake_runtime import CPU, FakeRuntime, answers, batching, held, identity, image
from torch import Tensor

from models.errors import InferenceFailed, NonFiniteOutput, OutOfMemory
from models.runtime import failures
from service.errors import DeadlineExceeded, DeviceLost, QueueFull
from service.inference import forward
from service.inference.backbone_queue import BackboneQueue, Item
from service.inference.batcher import Batcher
from service.observability.metrics import Metrics


async def test_images_that_wait_travel_together() -> None:
    runtime = FakeRuntime(max_batch=8)
    async with batching(runtime) as (submit, _, metrics):
        tasks = [await held(runtime, submit), *(submit(v) for v in range(1, 21))]
        await asyncio.sleep(0.01)
        runtime.gate.set()
        assert answers(await asyncio.gather(*tasks)) == list(range(21))
    assert runtime.batches == [1, 8, 8, 4]
    assert metrics.registry.get_sample_value("imago_batch_size_count", {"backbone": "fake"}) == 4


@pytest.mark.abuse("G2", "G3")
async def test_only_the_poisoned_item_of_a_batch_fails() -> None:
    def fail(pixels: Tensor) -> None:
        if (pixels == 13).any():
            raise ValueError("poison")

    runtime = FakeRuntime(max_batch=32, fail=fail)
    async with batching(runtime) as (submit, _, _):
        tasks = [await held(runtime, submit), *(submit(v) for v in range(1, 32))]
        await asyncio.sleep(0.01)
        runtime.gate.set()
        got = answers(await asyncio.gather(*tasks, return_exceptions=True))
    assert got == [InferenceFailed if value == 13 else value for value in range(32)]


@pytest.mark.abuse("G4")
async def test_a_nan_is_its_own_items_error() -> None:
    def part(features: Tensor) -> Tensor:
        return torch.where(features == 7, torch.nan, features)

    async with batching(FakeRuntime()) as (submit, _, _):
        got = await asyncio.gather(*(submit(v, part=part) for v in (6, 7, 8)), return_exceptions=True)
    assert answers(got) == [6, NonFiniteOutput, 8]


@pytest.mark.abuse("G5")
async def test_out_of_memory_halves_the_batch_and_remembers() -> None:
    def fail(pixels: Tensor) -> None:
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("out of memory")

    runtime = FakeRuntime(max_batch=8, fail=fail)
    async with batching(runtime) as (submit, queue, _):
        tasks = [await held(runtime, submit), *(submit(v) for v in range(1, 9))]
        await asyncio.sleep(0.01)
        runtime.gate.set()
        assert answers(await asyncio.gather(*tasks)) == list(range(9))
        assert queue.batch_limit(CPU) == 2
    assert runtime.batches == [1, 8, 4, 2, 2, 4, 2, 2]


@pytest.mark.abuse("G5")
async def test_out_of_memory_with_one_image_says_so() -> None:
    def fail(pixels: Tensor) -> None:
        raise torch.OutOfMemoryError("out of memory")

    async with batching(FakeRuntime(fail=fail)) as (submit, _, _):
        with pytest.raises(OutOfMemory):
            await submit(1)


@pytest.mark.abuse("G5")
async def test_the_limit_is_raised_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = BackboneQueue("fake", {CPU: FakeRuntime(max_batch=8)}, 100, 100, Metrics())
    queue.lower_limit(CPU, 8)
    assert queue.batch_limit(CPU) == 4
    monkeypatch.setattr("service.inference.backbone_queue.RAISE_LIMIT_AFTER_S", 0.0)
    assert [queue.batch_limit(CPU) for _ in range(2)] == [8, 8]


@pytest.mark.abuse("H11")
async def test_callers_who_left_are_dropped_when_the_batch_is_cut() -> None:
    runtime = FakeRuntime()
    async with batching(runtime) as (submit, _, metrics):
        first, leaving, staying = await held(runtime, submit), submit(1), submit(2)
        await asyncio.sleep(0.01)
        leaving.cancel()
        await asyncio.sleep(0)
        runtime.gate.set()
        assert answers(await asyncio.gather(first, staying)) == [0, 2]
    assert runtime.batches == [1, 1]
    assert metrics.registry.get_sample_value("imago_rejected_total", {"reason": "client_left"}) == 1


async def test_an_image_past_its_deadline_is_not_computed() -> None:
    runtime = FakeRuntime()
    async with batching(runtime) as (submit, _, _):
        first, late = await held(runtime, submit), submit(1, timeout_s=0.01)
        await asyncio.sleep(0.05)
        runtime.gate.set()
        with pytest.raises(DeadlineExceeded):
            await late
        await first
    assert runtime.batches == [1]


@pytest.mark.abuse("H23")
async def test_a_full_queue_refuses_with_the_time_it_needs_to_drain() -> None:
    queue = BackboneQueue("fake", {CPU: FakeRuntime()}, 10, 10**6, Metrics())
    queue.images_per_s = 5.0
    with queue.admit(10, 100), pytest.raises(QueueFull, match="10 images") as refused, queue.admit(1, 100):
        pass
    assert refused.value.retry_after_s == 2.0
    with queue.admit(10, 100):
        pass


async def test_a_queue_is_bounded_by_bytes_too() -> None:
    queue = BackboneQueue("fake", {CPU: FakeRuntime()}, 10, 1000, Metrics())
    with queue.admit(1, 900), pytest.raises(QueueFull), queue.admit(1, 200):
        pass


async def test_a_wrong_number_of_rows_is_an_error_not_a_mix_up() -> None:
    runtime = FakeRuntime()
    runtime.__class__ = type(
        "Short", (FakeRuntime,), {"__call__": lambda self, pixels: torch.zeros(len(pixels) + 1, 2)}
    )
    async with batching(runtime) as (submit, _, _):
        with pytest.raises(InferenceFailed):
            await submit(1)


@pytest.mark.abuse("G6")
async def test_a_lost_device_fails_what_waits_and_what_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "device_works", lambda device: False)

    def fail(pixels: Tensor) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    runtime = FakeRuntime(max_batch=1, fail=fail)
    async with batching(runtime) as (submit, _, _):
        tasks = [await held(runtime, submit), submit(1)]
        await asyncio.sleep(0.01)
        runtime.gate.set()
        assert answers(await asyncio.gather(*tasks, return_exceptions=True)) == [DeviceLost, DeviceLost]
        await asyncio.sleep(0.05)
        with pytest.raises(DeviceLost):
            await submit(2)


async def test_an_error_of_a_device_that_works_is_the_images_own() -> None:
    def fail(pixels: Tensor) -> None:
        if 7 in pixels:
            raise torch.AcceleratorError("CUDA error: invalid argument")

    runtime = FakeRuntime(fail=fail)
    async with batching(runtime) as (submit, _, _):
        with pytest.raises(InferenceFailed):
            await submit(7)
        await submit(1)


async def test_the_backbone_that_waited_longest_goes_first() -> None:
    metrics = Metrics()
    batcher = Batcher([CPU], metrics)
    order: list[int] = []
    runtimes = [FakeRuntime(fail=lambda pixels: order.append(int(pixels[0, 0, 0, 0]))) for _ in range(2)]
    queues = [BackboneQueue(str(i), {CPU: runtime}, 100, 10**6, metrics) for i, runtime in enumerate(runtimes)]
    tasks = []
    for which in (1, 0, 1):
        tasks.append(
            asyncio.create_task(batcher.submit(queues[which], Item(image(which), [identity], time.monotonic() + 5)))
        )
        await asyncio.sleep(0.002)
    batcher.start()
    await asyncio.gather(*tasks)
    batcher.close()
    assert order == [1, 0]


def test_rows_that_share_a_part_go_through_it_together() -> None:
    calls: list[int] = []

    def double(features: Tensor) -> Tensor:
        calls.append(len(features))
        return features * 2

    images = [image(value) for value in range(3)]
    values = forward.run(FakeRuntime(), CPU, images, [[double], [identity], [identity, double]]).rows
    assert [[value[0].item() for value in row.values()] for row in values] == [[0.0], [1.0], [4.0, 2.0]]
    assert calls == [2]


def waiting(queue: BackboneQueue) -> list[int]:
    return [int(item.pixels[0, 0, 0]) for item in sorted(queue.items, key=attrgetter("turn"))]


async def test_a_head_start_counts_as_time_waited() -> None:
    runtime = FakeRuntime(max_batch=1)
    async with batching(runtime) as (submit, queue, _):
        tasks = [
            await held(runtime, submit),
            *(submit(v, head_start_s=h) for v, h in ((1, -1), (2, 0), (3, 0), (4, 1))),
        ]
        await asyncio.sleep(0.01)
        assert waiting(queue) == [4, 2, 3, 1]
        runtime.gate.set()
        assert answers(await asyncio.gather(*tasks)) == [0, 1, 2, 3, 4]


async def test_whoever_has_waited_for_long_is_not_overtaken() -> None:
    runtime = FakeRuntime(max_batch=1)
    async with batching(runtime) as (submit, queue, _):
        tasks = [await held(runtime, submit), submit(1, head_start_s=-0.01)]
        await asyncio.sleep(0.04)
        tasks.append(submit(2, head_start_s=0.01))
        await asyncio.sleep(0.01)
        assert waiting(queue) == [1, 2]
        runtime.gate.set()
        await asyncio.gather(*tasks)
