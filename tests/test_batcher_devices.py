"""The batcher's devices: several of them, busy, hanging and lost ones, and calls between batches."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import torch
from support.fake_runtime import CPU, META, FakeRuntime, answers, batching, held, identity, image
from torch import Tensor

from models.runtime import failures
from service.errors import DeviceLost
from service.inference.backbone_queue import BackboneQueue, Item
from service.inference.batcher import Batcher
from service.inference.results import Output
from service.observability.metrics import Metrics


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
