"""Loading on simulated GPUs: too little memory, warm-up, threads, and the memory of what is swapped out."""

import asyncio
import gc
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from support.simulated_device import ONLY_A, SimulatedGpu, on_gpus, out_of_memory, second_version, simulated, until
from support.small_models import picture, serving
from support.small_models import store as store
from torch import nn

from models.errors import OutOfMemory
from models.runtime.steps import steps_up_to
from models.store.store import ModelStore
from service.errors import NotReady
from service.inference.registry import registry
from service.inference.registry.served_models import plan_serving
from service.inference.results import Prediction

pytestmark = pytest.mark.system


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
        refs = [weakref.ref(backbone), weakref.ref(runtime)]
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
