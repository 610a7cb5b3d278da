"""What one caller, one batch or one device thread does to the others: nothing, or a prompt 503."""

import asyncio
import gc
import threading
from typing import Any

import pytest
import torch
from support.small_models import add_backbone, add_head, picture, probabilities, reference, serving
from support.small_models import store as store

from models.errors import InferenceFailed, InvalidImage, ModelError, ModelNotFound
from models.images import decoding
from models.store.store import ModelStore
from service.errors import DeviceLost
from service.inference.batcher import DeviceThread
from service.inference.engine import Engine
from service.inference.results import Prediction, PredictOptions

pytestmark = pytest.mark.system

CALLERS, BAD = 32, 13
SOLO = 1e-4  # of a probability: a batch of another size sums in another order, in float32


def runtime_of(engine: Engine, model: str = "b") -> Any:
    (runtime,) = engine.registry.served[model].backbones[0].queue.runtimes.values()
    return runtime


def poisoned(monkeypatch: pytest.MonkeyPatch, engine: Engine, data: bytes, error: Exception) -> None:
    """The network raises this for every batch that holds the image."""
    runtime = runtime_of(engine)
    poison, call = decoding.decode(data, engine.registry.served["b"].backbones[0].ref.preprocessing), runtime.__call__

    def fail(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        if any(torch.equal(row, poison) for row in pixels):
            raise error
        answer: torch.Tensor = call(pixels)
        return answer

    monkeypatch.setattr(type(runtime), "__call__", fail)


@pytest.mark.abuse("G2")
@pytest.mark.parametrize(
    ("cut", "refusal"), [pytest.param(True, InvalidImage, id="file"), pytest.param(False, InferenceFailed, id="tensor")]
)
async def test_one_bad_caller_of_32(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch, cut: bool, refusal: type[ModelError]
) -> None:
    files = [picture(seed) for seed in range(CALLERS)]
    async with serving(store, max_batch=CALLERS) as engine:
        alone = [probabilities((await engine.predict([data], ["b"], PredictOptions(7)))[0]) for data in files]
        poisoned(monkeypatch, engine, files[BAD], ValueError("a kernel chokes on it"))
        files[BAD] = files[BAD][:100] if cut else files[BAD]
        answers = await asyncio.gather(*(engine.predict([data], ["b"], PredictOptions(7)) for data in files))
    assert isinstance(answers.pop(BAD)[0].results[0], refusal)
    del alone[BAD]
    assert all(torch.allclose(probabilities(a), b, atol=SOLO) for [a], b in zip(answers, alone, strict=True))


async def waiting_behind(engine: Engine, monkeypatch: pytest.MonkeyPatch, callers: int) -> tuple[threading.Event, Any]:
    """Callers of whom the first is in a batch that goes on when the event is set, and the others wait for the device."""
    runtime, begun, go_on = runtime_of(engine), threading.Event(), threading.Event()
    call = runtime.__call__

    def held(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        begun.set()
        assert go_on.wait(60)
        answer: torch.Tensor = call(pixels)
        return answer

    monkeypatch.setattr(type(runtime), "__call__", held)
    tasks = [asyncio.create_task(engine.predict([picture(seed)], ["b"], PredictOptions(7))) for seed in range(callers)]
    assert await asyncio.to_thread(begun.wait, 60)
    async with asyncio.timeout(60):
        while len(engine.registry.served["b"].backbones[0].queue.items) < callers - 1:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return go_on, tasks


@pytest.mark.abuse("G10")
async def test_a_model_that_is_unloaded_answers_what_waited_and_nothing_new(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(store, max_batch=1, timeout_ms=60_000) as engine:
        go_on, tasks = await waiting_behind(engine, monkeypatch, 12)
        await engine.registry.retire("b")
        with pytest.raises(ModelNotFound):
            await engine.predict([picture(1)], ["b"])
        go_on.set()
        answers = await asyncio.gather(*tasks)
    for seed, [answer] in enumerate(answers):
        assert torch.allclose(probabilities(answer), reference(store, "b", picture(seed)), atol=SOLO)


@pytest.mark.abuse("G10")
async def test_loaded_and_unloaded_two_hundred_times_under_load(store: ModelStore) -> None:
    """A caller gets an answer or is told that the model is not there; another model's callers notice nothing."""
    add_head(store, "d", store.config("c").backbones[0], 84, classes=3, activate=False)
    heard, over = set[str](), asyncio.Event()

    async def caller(engine: Engine, model: str) -> None:
        while not over.is_set():
            try:
                [answer] = await engine.predict([picture(1)], [model])
                heard.add(f"{model} {type(answer.results[0]).__name__}")
            except ModelNotFound:
                heard.add(f"{model} not there")
                await asyncio.sleep(0.001)

    async with serving(store) as engine:
        callers = [asyncio.create_task(caller(engine, model)) for model in ("a", "d", "d")]
        for _ in range(200):
            await engine.registry.activate("d", 1)
            await asyncio.sleep(0)
            await engine.registry.retire("d")
        over.set()
        await asyncio.gather(*callers)
    assert heard == {f"a {Prediction.__name__}", f"d {Prediction.__name__}", "d not there"}


@pytest.mark.abuse("G7")
async def test_a_hung_batch_is_seen_and_the_server_no_longer_live(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(store, max_batch=1, timeout_ms=60_000) as engine:
        go_on, tasks = await waiting_behind(engine, monkeypatch, 1)
        (worker,) = engine.batcher.workers
        assert worker.busy_since is not None
        assert engine.live  # a slow batch is none that hangs
        worker.busy_since -= 2 * 60 + 1  # twice the deadline
        assert not engine.live
        go_on.set()
        await asyncio.gather(*tasks)
        async with asyncio.timeout(60):
            while not engine.live:  # noqa: ASYNC110  (its answers are out before it has ended)
                await asyncio.sleep(0.01)


@pytest.mark.abuse("G7")
async def test_a_device_thread_that_dies_of_what_nobody_foresaw(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as an empty_cache() that finds the device lost. Its caller, who waits and who comes: 503 at once, and not live."""

    def bug(self: DeviceThread, *given: Any) -> Any:
        raise RuntimeError("a bug")

    async with serving(store, max_batch=1, timeout_ms=60_000) as engine:
        monkeypatch.setattr(DeviceThread, "_compute", bug)
        outcomes = await asyncio.gather(
            *(engine.predict([picture(i)], ["b"]) for i in range(4)), return_exceptions=True
        )
        engine.batcher.workers[0].join(60)
        with pytest.raises(DeviceLost):
            await engine.predict([picture(1)], ["b"])
        assert not engine.live
    assert [type(outcome) for outcome in outcomes] == [DeviceLost] * 4


@pytest.mark.gpu
@pytest.mark.abuse("G8")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
async def test_the_memory_of_swapped_models_is_free_again(store: ModelStore) -> None:
    async with serving(store, models=("c",), device="cuda:0") as engine:
        await engine.predict([picture(1)], ["c"])
        before = torch.cuda.memory_allocated()
        for seed in range(10, 20):
            add_head(store, "c", *add_backbone(store, seed), classes=2)
            await engine.registry.sync()
            await engine.predict([picture(1)], ["c"])
        gc.collect()
        assert torch.cuda.memory_allocated() < 1.05 * before
