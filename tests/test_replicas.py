"""Loading on simulated GPUs: devices that break, hang or lack memory, several of them, and the memory of what is swapped out."""

import asyncio
import gc
import logging
import re
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from unittest.mock import AsyncMock

import pytest
import torch
from support.simulated_device import LOST, SimulatedGpu, out_of_memory, simulated
from test_engine import add_backbone, add_head, picture, serving
from test_engine import store as store
from torch import nn

from models.errors import OutOfMemory
from models.runtime import GpuProblem
from models.runtime.steps import steps_up_to
from models.store.store import ModelStore
from service.errors import DeviceLost, NotReady
from service.inference.device_health import why_no_gpu
from service.inference.engine import Engine
from service.inference.registry import registry, replicas
from service.inference.registry.served_models import plan_serving
from service.inference.results import Prediction

pytestmark = pytest.mark.system

ONLY_A: dict[str, Any] = {"models": ("a",), "device": "cuda"}


@asynccontextmanager
async def on_gpus(store: ModelStore, *gpus: SimulatedGpu, ready: bool = True, **flags: Any) -> AsyncIterator[Engine]:
    with simulated(*gpus):
        async with serving(store, ready=ready, **(ONLY_A | flags)) as engine:
            yield engine


async def until(happened: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not happened():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def second_version(store: ModelStore) -> int:
    """Of `a`, on another backbone."""
    return add_head(store, "a", *add_backbone(store, 9), classes=2, activate=False)


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


# Memory


async def test_a_load_without_memory_is_tried_again(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "RETRY_FIRST_S", 0.05)
    gpu = SimulatedGpu(memory=2**33)
    gpu.fail_to_compile(out_of_memory(), times=3)
    async with on_gpus(store, gpu, ready=False) as engine:
        with pytest.raises(NotReady, match="not enough memory"):
            await engine.wait_ready(10)
        error = engine.registry.model("a").error or ""
        assert re.search(
            r"cuda:0 has not enough memory \(8,192 of 8,192 MB are free\).*2\.00 GiB.*; tried again in 0 s", error
        )
        assert engine.live
        await until(lambda: engine.ready)
        assert engine.registry.model("a").error is None
        assert isinstance((await engine.predict([picture(1)]))[0].results[0], Prediction)
        await until(lambda: not any(entry.retries for entry in engine.registry.entries.values()))


async def test_the_time_between_tries_doubles_to_a_limit(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    gpu = SimulatedGpu()
    gpu.fail_to_compile(out_of_memory(), times=9)
    async with on_gpus(store, gpu, ready=False) as engine:
        monkeypatch.setattr(asyncio, "sleep", noted)
        await until(lambda: engine.ready)
        monkeypatch.undo()
    assert [seconds for seconds in slept if seconds >= 5] == [5, 10, 20, 40, 80, 160, 300, 300, 300]


async def test_a_store_that_cannot_be_read_for_a_moment_does_not_end_the_tries(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "RETRY_FIRST_S", 0.01)
    plan, calls = plan_serving, []

    def failing_once(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise OSError("Stale file handle")
        return plan(*given)

    monkeypatch.setattr(registry, "plan_serving", failing_once)
    gpu = SimulatedGpu()
    gpu.fail_to_compile(out_of_memory())
    async with on_gpus(store, gpu, ready=False) as engine:
        await until(lambda: engine.ready)
    assert len(calls) == 3


async def test_what_is_not_to_be_served_any_more_is_not_tried_again(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "RETRY_FIRST_S", 0.05)
    gpu = SimulatedGpu()
    gpu.fail_to_compile(out_of_memory(), times=10**6)
    async with on_gpus(store, gpu, ready=False, models=()) as engine:
        await engine.registry.wait_loaded()
        for name in ("both", "c", "b", "a"):
            store.deactivate(name)
        await until(lambda: not any(entry.retries for entry in engine.registry.entries.values()))
        assert engine.registry.models() == []


async def test_a_gpu_that_another_process_has_is_tried_again(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "RETRY_FIRST_S", 0.01)
    gpu = SimulatedGpu()
    gpu.fail_to_compile("CUDA error: CUDA-capable device(s) is/are busy or unavailable")
    async with on_gpus(store, gpu, ready=False) as engine:
        with pytest.raises(NotReady, match="cuda:0 is taken by another process"):
            await engine.wait_ready(10)
        await until(lambda: engine.ready)


async def test_activating_without_memory_says_so_and_changes_nothing(store: ModelStore) -> None:
    gpu = SimulatedGpu()
    async with on_gpus(store, gpu) as engine:
        gpu.fail_to_compile(out_of_memory())
        with pytest.raises(OutOfMemory, match="not enough memory"):
            await engine.registry.activate("a", second_version(store))
        assert (engine.registry.model("a").version, engine.live) == (1, True)


# Warm


async def test_the_thread_that_serves_warms_every_batch_step(store: ModelStore) -> None:
    gpu = SimulatedGpu(max_batch=24)
    async with on_gpus(store, gpu):
        assert gpu.batches[:-1] == steps_up_to(24)
        assert gpu.batches[-1] == 1  # the probe
        assert gpu.threads == {"device-cuda:0"}


async def test_a_step_without_memory_bounds_the_batches(store: ModelStore) -> None:
    gpu = SimulatedGpu(max_batch=64)
    gpu.fail(at=steps_up_to(64).index(32) + 1, error=out_of_memory())
    async with on_gpus(store, gpu) as engine:
        [backbone] = engine.registry.served["a"].backbones
        assert backbone.queue.batch_limit(gpu.device) == 24
        assert backbone.infos["cuda:0"].max_batch == 24
        assert "empty_cache" in gpu.calls


async def test_a_request_waits_for_one_step_of_a_model_that_is_warmed(store: ModelStore) -> None:
    gpu = SimulatedGpu(base_s=0.005, max_batch=64)
    async with on_gpus(store, gpu) as engine:
        done = len(gpu.batches)
        loading = asyncio.create_task(engine.registry.activate("a", second_version(store)))
        await until(lambda: len(gpu.batches) > done + 1)  # the steps that follow have more than one image

        def came(start: int) -> bool:
            return bool(engine.batcher._queues) or 1 in gpu.batches[start:]

        for i in range(3):
            before = len(gpu.batches)
            gpu.held.set()
            request = asyncio.create_task(engine.predict([picture(i)]))
            await until(partial(came, before))
            gpu.held.clear()
            await request
            assert 1 in gpu.batches[before : before + 3]  # after the step under way and at most one more
        await loading


# Threads, and what is swapped out


async def test_heads_and_neighbours_are_moved_by_a_reader(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    movers: set[str] = set()
    gpu = SimulatedGpu()
    with simulated(gpu):
        for kind in (torch.Tensor, nn.Module):
            monkeypatch.setattr(kind, "to", _noting(kind.to, movers))
        async with serving(store, **ONLY_A):
            pass
        monkeypatch.undo()
    assert movers
    assert all(name.startswith("load") for name in movers)


def _noting(to: Any, movers: set[str]) -> Any:
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, torch.device) and a.type == "cuda" for a in args):
            movers.add(threading.current_thread().name)
        return to(self, *args, **kwargs)

    return noted


@pytest.fixture
def frozen_after() -> Iterator[Callable[[], None]]:
    yield gc.freeze
    gc.unfreeze()


@pytest.mark.parametrize("engine_name", ["torch", "openvino"])
async def test_a_backbone_is_freed_after_a_swap_though_it_was_frozen(
    store: ModelStore, frozen_after: Callable[[], None], engine_name: str
) -> None:
    """As after `gc.freeze`, which the server calls once it is ready."""
    if engine_name == "openvino":
        pytest.importorskip("openvino")
    async with serving(store, models=("a",), engine=engine_name) as engine:
        await engine.predict([picture(1)])
        [backbone] = engine.registry.served["a"].backbones
        runtime: Any = backbone.queue.runtimes[torch.device("cpu")]
        refs = [weakref.ref(backbone), weakref.ref(runtime.engine)]
        del backbone, runtime
        gc.collect()
        frozen_after()
        await engine.registry.activate("a", second_version(store))
        await until(lambda: not [alive for alive in refs if alive() is not None])


async def test_the_memory_of_a_swapped_backbone_goes_back_to_the_gpu(store: ModelStore) -> None:
    gpu = SimulatedGpu()
    async with on_gpus(store, gpu) as engine:
        before = gpu.calls.count("empty_cache")
        await engine.registry.activate("a", second_version(store))
        await until(lambda: gpu.calls.count("empty_cache") > before)


async def test_a_backbone_that_goes_with_the_server_leaves_nothing_to_do(store: ModelStore) -> None:
    async with serving(store, models=("a",)) as engine:
        loader = engine.registry._loader
        batcher = engine.batcher
    loader._tidy(batcher)
    assert loader._tidying is None
