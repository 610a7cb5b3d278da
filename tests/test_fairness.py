"""Clients share the queue of a backbone: its room, its order and its batches."""

import asyncio
import statistics
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.simulated_device import SimulatedGpu, simulated
from torch import Tensor

from models import architectures
from models.classifier import Head
from models.store.store import ModelStore
from service.errors import QueueFull
from service.inference.backbone_queue import QUIET_S, BackboneQueue, BatchBudget, FairQueue, Flow, Item, Shares
from service.inference.engine import Engine
from service.inference.registry.loader import Served
from service.inference.results import PredictOptions
from service.observability.metrics import Metrics
from service.settings import Settings

IMAGE = torch.zeros(1, 2, 2, dtype=torch.uint8)


async def item(client: str, model: str = "", head_start_s: float = 0.0) -> Item:
    return Item(IMAGE, [], 0.0, head_start_s, flow=(client, model))


async def queue_of(*flows: Flow) -> FairQueue:
    queue = FairQueue()
    for flow in flows:
        queue.push(await item(*flow))
    return queue


def served(queue: FairQueue, images: int) -> list[str]:
    return ["".join(queue.pop().flow) for _ in range(images)]


@pytest.mark.abuse("A611")
async def test_clients_take_turns_and_within_a_client_its_models_do() -> None:
    queue = await queue_of(*[("a", "1")] * 6, *[("a", "2")] * 2, ("b", "1"), ("c", "1"))
    assert served(queue, 6) == ["a1", "b1", "c1", "a2", "a1", "a2"]
    queue.push(await item("d", "1"))
    assert served(queue, 5) == ["d1", "a1", "a1", "a1", "a1"]
    assert (len(queue), list(queue)) == (0, [])


async def test_a_client_that_comes_back_has_no_credit() -> None:
    """Otherwise a client that was away for an hour would have the backbone to itself."""
    queue = await queue_of(*[("a", "")] * 100)
    served(queue, 50)
    for _ in range(10):
        queue.push(await item("b"))
    assert Counter(served(queue, 20)) == {"a": 10, "b": 10}


async def test_many_models_of_a_client_have_one_share() -> None:
    queue = await queue_of(*[("a", str(i % 16)) for i in range(160)], *[("b", "")] * 40)
    assert Counter(name[0] for name in served(queue, 60)) == {"a": 30, "b": 30}


async def test_priority_holds_within_a_flow() -> None:
    queue = await queue_of(("a", ""), ("a", ""), ("b", ""))
    first = await item("a", head_start_s=1.0)
    queue.push(first)
    assert queue.pop() is first
    assert served(queue, 3) == ["b", "a", "a"]


@pytest.mark.abuse("A612")
def test_some_room_is_left_whoever_comes() -> None:
    shares = Shares(1024, 7 / 8)
    for client in range(60):  # each as much as it gets, 32 at a time
        for model in ("x", "y"):
            while shares.fits(str(client), model, 32):
                shares.take(str(client), model, 32)
    assert shares.total < 1024
    assert shares.fits("quiet", "x", 1)


@pytest.mark.abuse("A612")
def test_a_client_leaves_room_for_its_other_models() -> None:
    shares = Shares(1024, 7 / 8)
    while shares.fits("a", "x", 16):
        shares.take("a", "x", 16)
    assert shares.total == 784
    assert shares.fits("a", "y", 64)
    shares.give("a", "x", 784)
    assert (shares.total, dict(shares._clients), dict(shares._keys)) == (0, {}, {})


def test_the_first_may_be_larger_than_the_room() -> None:
    shares = Shares(10, 0.5)
    assert shares.fits("a", "x", 11)
    shares.take("a", "x", 11)
    assert not shares.fits("a", "y", 1)
    assert not shares.fits("b", "x", 1)


async def test_a_flood_is_refused_and_others_are_not() -> None:
    queue = BackboneQueue("fake", {}, 100, 10**6, Metrics())
    with queue.admit(70, 70, ("flood", "a")):
        with pytest.raises(QueueFull), queue.admit(32, 32, ("flood", "a")):
            pass
        with queue.admit(8, 8, ("flood", "b")), queue.admit(8, 8, ("quiet", "a")):
            pass


def test_batches_are_short_while_a_quiet_client_is_expected() -> None:
    pace, flood, quiet = BatchBudget(), ("flood", "a"), ("quiet", "b")
    pace.computed(1, 0.010)
    assert pace.admits(flood, 32, 7, now=0.0)  # nobody else: a full batch
    assert pace.admits(quiet, 1, 0, now=1.0)
    assert not pace.admits(flood, 32, 1, now=1.0)  # not in the batch of the other
    assert pace.admits(flood, 32, 0, now=1.0)
    assert pace.admits(quiet, 1, 7, now=1.0)  # those that send little travel together
    assert pace.admits(flood, 32, 7, now=1.0 + QUIET_S)


def test_short_batches_of_a_fast_device_are_large() -> None:
    pace = BatchBudget()
    pace.computed(1, 0.001)
    for _ in range(50):
        pace.computed(max(pace.short, 2), 0.001 + 0.0001 * max(pace.short, 2))
    assert 30 < pace.short < 45


def test_a_client_alone_has_full_batches_whatever_it_sends() -> None:
    pace, flow = BatchBudget(), ("one", "a")
    pace.computed(1, 0.010)
    assert pace.admits(flow, 1, 0, now=0.0)
    assert pace.admits(flow, 32, 7, now=0.1)


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    """Models `a` and `b` on one backbone."""
    store, network = ModelStore(tmp_path / "weights"), architectures.create("lenet5", num_classes=3, channels=3)
    ref = store.put_backbone(network.name, network.backbone, network.preprocessing)
    for name in ("a", "b"):
        store.activate(name, store.publish(name, [ref], Head.of(network.layer), ["x", "y", "z"]).version)
    return store


async def latencies(engine: Engine, served: Served, client: str, images: list[Tensor], times: int) -> list[float]:
    """Seconds of each answer; a refusal takes for ever."""
    taken = []
    for _ in range(times):
        started = time.monotonic()
        try:
            await engine.infer(images, served, PredictOptions(client=client))
            taken.append(time.monotonic() - started)
        except QueueFull:
            taken.append(float("inf"))
        await asyncio.sleep(0.013)
    return taken


@pytest.mark.system
@pytest.mark.abuse("A613")
@pytest.mark.parametrize("client", ["another address", "the same address"])
async def test_a_flood_for_one_model_does_not_slow_another_caller(store: ModelStore, client: str) -> None:
    gpu = SimulatedGpu(base_s=0.002, per_image_s=0.010, max_batch=32)
    settings = Settings(weights=store.root, data=store.root / "data", max_batch=32)
    with simulated(gpu):
        engine = Engine(settings, store, Metrics())
        engine.start()
        await engine.wait_ready(60)
        flooded, other = engine.registry.bind("a"), engine.registry.bind("b")
        image = torch.zeros(3, 32, 32, dtype=torch.uint8)
        name = "flood" if client == "the same address" else "quiet"

        async def flood() -> None:
            while True:
                try:
                    await engine.infer([image] * 32, flooded, PredictOptions(client="flood"))
                except QueueFull:
                    await asyncio.sleep(0.02)

        quiet = statistics.median(await latencies(engine, other, name, [image], 10))
        floods = [asyncio.create_task(flood()) for _ in range(60)]
        await asyncio.sleep(0.1)
        beside = await latencies(engine, other, name, [image], 100)
        for task in floods:
            task.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
        engine.close()
    allowed = 2 * quiet + 0.02  # for a busy machine
    assert sum(taken <= allowed for taken in beside) >= 0.95 * len(beside)
