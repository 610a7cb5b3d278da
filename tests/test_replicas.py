"""Loading on simulated GPUs: devices that break or hang, and several of them."""

import asyncio
import logging
import threading
from unittest.mock import AsyncMock

import pytest
import torch
from support.simulated_device import (
    LOST,
    SimulatedGpu,
    on_gpus,
    out_of_memory,
    second_version,
    until,
)
from support.small_models import add_head, picture
from support.small_models import store as store

from models.runtime import GpuProblem
from models.runtime.steps import steps_up_to
from models.store.store import ModelStore
from service.errors import DeviceLost, NotReady
from service.inference.device_health import why_no_gpu
from service.inference.registry import registry, replicas
from service.inference.results import Prediction

pytestmark = pytest.mark.system


# A device that breaks or hangs


async def test_a_device_lost_while_compiling_ends_the_server(store: ModelStore) -> None:
    gpu = SimulatedGpu()
    gpu.fail_to_compile(LOST)
    async with on_gpus(store, gpu, ready=False) as engine:
        with pytest.raises(NotReady, match="stopped working"):
            await engine.wait_ready(10)
        assert (engine.live, engine.ready) == (False, False)
        assert engine.device_states() == {"cuda:0": "lost"}


async def test_what_waits_fails_when_loading_loses_the_device(store: ModelStore) -> None:
    gpu = SimulatedGpu(max_batch=1)
    async with on_gpus(store, gpu) as engine:
        gpu.held.set()
        requests = [asyncio.create_task(engine.predict([picture(i)])) for i in range(3)]
        await until(lambda: len(engine.registry.served["a"].backbones[0].queue.items) == 2)
        gpu.fail_to_compile(LOST)
        with pytest.raises(DeviceLost):
            await engine.registry.activate("a", second_version(store))
        outcomes = await asyncio.wait_for(asyncio.gather(*requests[1:], return_exceptions=True), 5)
        gpu.held.clear()
        with pytest.raises(DeviceLost):
            await engine.predict([picture(1)])
        assert not engine.live
    assert [type(outcome) for outcome in outcomes] == [DeviceLost] * 2


async def test_a_device_that_hangs_while_compiling_is_lost_after_the_limit(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setitem(replicas.HANGS_AFTER_S, "cuda", 0.1)
    monkeypatch.setattr(SimulatedGpu, "compile", lambda *given: go_on.wait(30))
    async with on_gpus(store, SimulatedGpu(), ready=False) as engine:
        with pytest.raises(NotReady, match="hangs: loading has taken longer"):
            await engine.wait_ready(10)
        assert not engine.live
        go_on.set()


async def test_a_head_that_breaks_the_device_loses_it_too(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimulatedGpu()
    async with on_gpus(store, gpu) as engine:
        gpu.lost = torch.AcceleratorError(LOST)
        config = store.config("a")
        version = add_head(store, "a", config.backbones[0], 84, classes=2, activate=False)
        with pytest.raises(DeviceLost):
            await engine.registry.activate("a", version)
        assert not engine.live


# Several devices


@pytest.mark.parametrize("error", [LOST, out_of_memory(), RuntimeError("a kernel that does not know the network")])
async def test_a_model_serves_where_it_could_be_loaded(
    store: ModelStore, error: Exception | str, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = SimulatedGpu(0), SimulatedGpu(1)
    first.fail_to_compile(error)
    async with on_gpus(store, first, second) as engine:
        [answer] = await engine.predict([picture(1)])
        [backbone] = engine.registry.model("a").backbones
        assert (engine.live, engine.ready) == (True, True)
        assert engine.device_states() == {"cuda:0": "lost" if error == LOST else "works", "cuda:1": "works"}
    assert isinstance(answer.results[0], Prediction)
    assert (set(backbone.runtime), set(backbone.failures)) == ({"cuda:1"}, {"cuda:0"})
    assert "loading failed on cuda:0, and the other devices serve" in caplog.text
    assert not [batch for batch in first.batches if batch]


async def test_a_lost_device_leaves_the_serving_to_the_others(
    store: ModelStore, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = SimulatedGpu(0, max_batch=1), SimulatedGpu(1, max_batch=1)
    async with on_gpus(store, first, second) as engine:
        first.fail(at=1, error=LOST)
        outcomes = await asyncio.gather(*(engine.predict([picture(i)]) for i in range(8)), return_exceptions=True)
        assert (engine.live, engine.ready) == (True, True)
        assert engine.device_states() == {"cuda:0": "lost", "cuda:1": "works"}
        second.fail(at=1, error=LOST)
        with pytest.raises(DeviceLost):
            await engine.predict([picture(1)])
        assert not engine.live
    assert [type(outcome) for outcome in outcomes].count(DeviceLost) == 1
    assert next(r.getMessage() for r in caplog.records if r.levelno == logging.CRITICAL).startswith("cuda:0 is lost")


async def test_a_device_that_hangs_beside_others_is_lost(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.inference.device_health.WATCH_S", 0.01)
    first, second = SimulatedGpu(0, max_batch=1), SimulatedGpu(1, max_batch=1)
    async with on_gpus(store, first, second) as engine:
        first.held.set()
        request = asyncio.create_task(engine.predict([picture(1)]))
        await until(lambda: engine.batcher.workers[0].busy_since is not None)
        monkeypatch.setattr(engine, "_hangs_after_s", lambda: 0.0)
        engine._health._hangs_after_s = lambda: 0.05
        await until(lambda: engine.device_states()["cuda:0"] == "lost")
        assert isinstance((await engine.predict([picture(2)]))[0].results[0], Prediction)
        assert engine.live
        with pytest.raises(DeviceLost, match="cuda:0 hangs in a batch"):
            await asyncio.wait_for(request, 5)
        first.held.clear()


async def test_a_device_that_hangs_while_a_version_is_tried_does_not_hold_up_the_others(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.inference.device_health.WATCH_S", 0.01)
    monkeypatch.setattr(replicas.DeviceWork, "_warm_up", AsyncMock())  # so that the probe alone hangs
    first, second = SimulatedGpu(0), SimulatedGpu(1)
    async with on_gpus(store, first, second) as engine:
        engine._health._hangs_after_s = lambda: 0.05
        first.held.set()
        second.held.set()
        loading = asyncio.create_task(engine.registry.activate("a", second_version(store)))
        await until(lambda: [gpu for gpu in (first, second) if gpu.hanging()])
        [hanging] = [gpu for gpu in (first, second) if gpu.hanging()]
        with pytest.raises(DeviceLost, match="hangs in a batch"):
            await asyncio.wait_for(loading, 5)
        (second if hanging is first else first).held.clear()
        await asyncio.wait_for(engine.registry.activate("a", 2), 5)
        assert engine.registry.model("a").version == 2
        hanging.held.clear()


@pytest.mark.parametrize("error", [LOST, RuntimeError("a kernel that does not know the network")])
async def test_memory_missing_on_one_device_is_a_reason_to_try_again(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch, error: Exception | str, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "RETRY_FIRST_S", 0.01)
    first, second = SimulatedGpu(0), SimulatedGpu(1)
    first.fail_to_compile(error, times=2)
    second.fail_to_compile(out_of_memory())
    async with on_gpus(store, first, second, ready=False) as engine:
        with pytest.raises(NotReady, match="cuda:1 has not enough memory"):
            await engine.wait_ready(10)
        await until(lambda: engine.ready)
    assert "loading failed on cuda:0: " in caplog.text


async def test_a_load_that_loses_one_device_is_tried_again_on_the_others(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the server stays live, because a device works, and never becomes ready."""
    monkeypatch.setattr(registry, "RETRY_FIRST_S", 0.01)
    first, second = SimulatedGpu(0), SimulatedGpu(1)
    for gpu in (first, second):
        gpu.fail(at=len(steps_up_to(64)) + 1, error=LOST)  # the probe, on the one that takes it
    async with on_gpus(store, first, second, ready=False) as engine:
        with pytest.raises(NotReady, match="stopped working"):
            await engine.wait_ready(10)
        for gpu in (first, second):
            gpu._errors.clear()
        assert engine.live
        await until(lambda: engine.ready)
        assert list(engine.device_states().values()).count("lost") == 1


async def test_a_model_that_no_device_is_left_for_ends_the_server(store: ModelStore) -> None:
    first, second = SimulatedGpu(0), SimulatedGpu(1)
    first.fail_to_compile(out_of_memory())
    async with on_gpus(store, first, second) as engine:
        second.fail(at=1, error=LOST)
        with pytest.raises(DeviceLost):
            await engine.predict([picture(1)])
        assert engine.device_states() == {"cuda:0": "works", "cuda:1": "lost"}
        assert not engine.live


@pytest.mark.parametrize(
    ("setting", "devices", "note"),
    [
        pytest.param("auto", ["cpu"], "running on the CPU: the driver is too old; install another", id="auto"),
        pytest.param("auto", ["cuda:0"], None, id="GPU"),
        pytest.param("cpu", ["cpu"], None, id="cpu"),
    ],
)
def test_why_no_gpu_is_used(
    monkeypatch: pytest.MonkeyPatch, setting: str, devices: list[str], note: str | None
) -> None:
    problem = GpuProblem("driver_too_old", "the driver is too old", "install another")
    monkeypatch.setattr("service.inference.device_health.gpu_problem", lambda: problem)
    assert why_no_gpu(setting, [torch.device(name) for name in devices]) == note
