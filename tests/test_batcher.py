"""The batcher with fake backbones: batches, isolation, deadlines, leaving callers, memory, lost devices."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from operator import attrgetter

import pytest
import torch
from torch import Tensor

from models.errors import InferenceFailed, NonFiniteOutput, OutOfMemory
from models.runtime import failures
from service.errors import DeadlineExceeded, DeviceLost, QueueFull
from service.inference import forward
from service.inference.backbone_queue import BackboneQueue, Item
from service.inference.batcher import Batcher
from service.inference.results import Output
from service.observability.metrics import Metrics

CPU, META = torch.device("cpu"), torch.device("meta")


class FakeRuntime:
    """Features = the image's first pixel, twice. `gate` holds the device until it is opened; `fail` may raise."""

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
    """Occupies the device with an image of value 0, so that what follows waits in the queue."""
    runtime.gate.clear()
    first = submit(0)
    assert await asyncio.to_thread(runtime.entered.wait, 5)
    return first


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


async def test_a_device_is_busy_while_its_thread_computes() -> None:
    runtime, metrics = FakeRuntime(), Metrics()
    batcher = Batcher([CPU], metrics)
    queue = BackboneQueue("fake", {CPU: runtime}, 100, 10**6, metrics)
    assert not batcher.is_busy(CPU)
    runtime.gate.clear()
    task = asyncio.create_task(batcher.submit(queue, Item(image(1), [identity], time.monotonic() + 5)))
    batcher.start()
    assert await asyncio.to_thread(runtime.entered.wait, 5)
    assert batcher.is_busy(CPU)
    assert not batcher.is_busy(torch.device("cuda", 0))
    runtime.gate.set()
    await task
    batcher.close()


async def test_every_device_has_a_replica_and_one_may_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "device_works", lambda device: device == CPU)

    def fail(pixels: Tensor) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    good, bad = FakeRuntime(max_batch=1), FakeRuntime(max_batch=1, fail=fail)
    metrics, other = Metrics(), torch.device("meta")
    batcher = Batcher([CPU, other], metrics)
    queue = BackboneQueue("fake", {CPU: good, other: bad}, 100, 10**6, metrics)
    good.gate.clear()
    tasks = [
        asyncio.create_task(batcher.submit(queue, Item(image(v), [identity], time.monotonic() + 5))) for v in range(6)
    ]
    await asyncio.sleep(0)
    batcher.start()
    assert await asyncio.to_thread(bad.entered.wait, 5)
    good.gate.set()
    got = answers(await asyncio.gather(*tasks, return_exceptions=True))
    assert got.count(DeviceLost) == 1
    assert len(good.batches) == 5
    assert [worker.lost for worker in batcher.workers] == [False, True]
    batcher.close()


@asynccontextmanager
async def two_idle_devices(*runtimes: FakeRuntime) -> AsyncIterator[tuple[Batcher, BackboneQueue]]:
    metrics = Metrics()
    batcher = Batcher([CPU, META], metrics)
    queue = BackboneQueue("fake", dict(zip([CPU, META], runtimes, strict=False)), 100, 10**6, metrics)
    batcher.start()
    while not all(worker.idle for worker in batcher.workers):  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    try:
        yield batcher, queue
    finally:
        batcher.close()


async def at_once(batcher: Batcher, queue: BackboneQueue, count: int) -> list[asyncio.Task[Output]]:
    """Images that all wait before a device cuts its batch."""
    with batcher._lock:
        deadline = time.monotonic() + 5
        tasks = [asyncio.create_task(batcher.submit(queue, Item(image(v), [identity], deadline))) for v in range(count)]
        await asyncio.sleep(0)
    return tasks


async def test_idle_devices_share_what_waits() -> None:
    """Each computes its part at the same time, instead of one all of it and the others nothing."""
    first, second = FakeRuntime(max_batch=64), FakeRuntime(max_batch=64)
    async with two_idle_devices(first, second) as (batcher, queue):
        first.gate.clear()
        second.gate.clear()
        tasks = await at_once(batcher, queue, 11)
        for runtime in (first, second):
            assert await asyncio.to_thread(runtime.entered.wait, 5)
            runtime.gate.set()
        assert answers(await asyncio.gather(*tasks)) == list(range(11))
    assert sorted(first.batches + second.batches) == [5, 6]


async def test_a_busy_device_leaves_its_share_to_the_others() -> None:
    first, second = FakeRuntime(max_batch=64), FakeRuntime(max_batch=64)
    async with two_idle_devices(first, second) as (batcher, queue):
        first.gate.clear()
        one = await at_once(batcher, queue, 1)  # the first device in the list is woken first
        assert await asyncio.to_thread(first.entered.wait, 5)
        await asyncio.gather(*await at_once(batcher, queue, 10))
        first.gate.set()
        await asyncio.gather(*one)
    assert (first.batches, second.batches) == ([1], [10])


async def test_a_backbone_runs_where_it_was_loaded() -> None:
    only = FakeRuntime(max_batch=2)
    async with two_idle_devices(only) as (batcher, queue):
        assert answers(await asyncio.gather(*await at_once(batcher, queue, 9))) == list(range(9))
        batcher.lose(META, DeviceLost("meta is lost"))
        assert answers(await asyncio.gather(*await at_once(batcher, queue, 1))) == [0]
        batcher.lose(CPU, DeviceLost("cpu is lost"))
        with pytest.raises(DeviceLost):
            await batcher.submit(queue, Item(image(1), [identity], time.monotonic() + 5))


async def test_calls_and_batches_take_turns_in_the_devices_thread() -> None:
    order: list[object] = []
    runtime = FakeRuntime(max_batch=1, fail=lambda pixels: order.append(int(pixels[0, 0, 0, 0])))
    async with batching(runtime) as (submit, _, _):
        batcher = submit.batcher  # type: ignore[attr-defined]
        tasks = [await held(runtime, submit), *(submit(v) for v in (1, 2, 3))]
        calls = [asyncio.create_task(batcher.call(CPU, partial(order.append, name))) for name in "abcd"]
        await asyncio.sleep(0.01)
        runtime.gate.set()
        await asyncio.gather(*tasks, *calls)
        with pytest.raises(ZeroDivisionError):
            await batcher.call(CPU, lambda: 1 / 0)
        name = await batcher.call(CPU, lambda: threading.current_thread().name)
    assert order == [0, "a", 1, "b", 2, "c", 3, "d"]
    assert name == "device-cpu"


async def test_a_call_that_loses_its_device_fails_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(failures, "device_works", lambda device: False)
    runtime = FakeRuntime(max_batch=1)
    async with batching(runtime) as (submit, _, _):
        batcher = submit.batcher  # type: ignore[attr-defined]
        tasks = [await held(runtime, submit), asyncio.create_task(batcher.call(CPU, fail)), submit(1)]
        await asyncio.sleep(0.01)
        runtime.gate.set()
        got = await asyncio.gather(*tasks, return_exceptions=True)
        with pytest.raises(DeviceLost):
            await batcher.call(CPU, fail)
    assert answers(got) == [0, DeviceLost, DeviceLost]


async def test_a_batch_under_way_fails_when_its_device_is_lost_meanwhile() -> None:
    """As one that hangs, and whose thread never comes back."""
    runtime = FakeRuntime()
    async with batching(runtime) as (submit, _, _):
        batcher = submit.batcher  # type: ignore[attr-defined]
        first = await held(runtime, submit)
        batcher.lose(CPU, DeviceLost("cpu hangs in a batch"))
        with pytest.raises(DeviceLost, match="hangs in a batch"):
            await asyncio.wait_for(first, 2)


async def test_a_call_under_way_fails_when_its_device_is_lost_meanwhile() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait(5)

    async with batching(FakeRuntime()) as (submit, _, _):
        batcher = submit.batcher  # type: ignore[attr-defined]
        call = asyncio.create_task(batcher.call(CPU, work))
        assert await asyncio.to_thread(begun.wait, 5)
        batcher.lose(CPU, DeviceLost("cpu hangs in a call"))
        try:
            with pytest.raises(DeviceLost, match="hangs in a call"):
                await asyncio.wait_for(call, 2)
        finally:
            go_on.set()


async def test_an_idle_device_takes_what_another_leaves_for_a_call() -> None:
    """Both are idle; the first is woken for an image, and finds a call that goes before it."""
    go_on = threading.Event()
    first, second = FakeRuntime(), FakeRuntime()
    async with two_idle_devices(first, second) as (batcher, queue):
        with batcher._lock:
            [image_] = await at_once(batcher, queue, 1)
            call = asyncio.create_task(batcher.call(CPU, partial(go_on.wait, 5)))
            await asyncio.sleep(0)
        try:
            assert answers([await asyncio.wait_for(image_, 2)]) == [0]
        finally:
            go_on.set()
        await call
    assert (first.batches, second.batches) == ([], [1])


async def test_a_device_that_hangs_before_its_first_batch_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cudaSetDevice` makes a context, and that may hang as a batch may."""
    begun, go_on = threading.Event(), threading.Event()

    def set_device(device: torch.device) -> None:
        begun.set()
        go_on.wait(5)

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    batcher = Batcher([torch.device("cuda", 0)], Metrics())
    batcher.start()
    assert await asyncio.to_thread(begun.wait, 5)
    assert [*batcher.states(0.0).values()] == ["hangs"]
    go_on.set()
    while not batcher.workers[0].idle:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    assert [*batcher.states(0.0).values()] == ["works"]
    batcher.close()


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
