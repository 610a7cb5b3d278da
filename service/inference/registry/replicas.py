"""Does the work of loading on devices: compiling, warming up, copying; and classifies its errors.

    compile thread of the device   compile_backbone -> CompiledBackbone
    device thread                  every batch step once, one step between two served batches

A device that hangs or fails during loading counts as lost, as one that fails in a batch does.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from models.errors import ModelError, OutOfMemory
from models.images.decoding import stack
from models.preprocessing import Preprocessing
from models.runtime import CompiledBackbone, is_device_lost, is_out_of_memory, memory, steps_up_to
from service.errors import DeviceLost, NotReady, ServiceError
from service.inference.batcher import Batcher
from service.inference.forward import pins

log = logging.getLogger(__name__)

# A device hangs if one step of loading takes longer. A GPU compiles and measures in seconds, or minutes if it is busy. A CPU may be slow:
# the largest networks of timm are converted for OpenVINO and measured in minutes on two cores.
HANGS_AFTER_S = {"cuda": 600.0, "cpu": 3600.0}
BUSY = ("busy or unavailable", "exclusive")  # another process has the GPU to itself
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Replicas:
    """A compiled backbone on each device where it could be loaded, at least one; `failures` of the others."""

    runtimes: Mapping[torch.device, CompiledBackbone]
    failures: Mapping[str, str]  # by device


class DeviceWork:
    """Does the work of loading on the devices. Used on one event loop."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices
        # One thread per device, because compiling measures, and two measurements at once would disturb each other.
        self._compilers = {device: ThreadPoolExecutor(1, f"compile-{device}") for device in devices}
        self._turns = {device: asyncio.Lock() for device in devices}

    def close(self) -> None:
        for pool in self._compilers.values():
            pool.shutdown(wait=False, cancel_futures=True)

    async def replicas(
        self, compile_for: Callable[[torch.device], CompiledBackbone], shape: Preprocessing, batcher: Batcher
    ) -> Replicas:
        """Compile and warm up on every device that is not lost. If it fails on all, raise one of the errors, preferably one that may pass,
        of a device without memory or taken by another process."""
        devices = [device for device in self._devices if not batcher.is_lost(device)]
        if not devices:
            raise DeviceLost("no device is left to compute on; the server is about to restart")
        outcomes = await asyncio.gather(
            *(self._replica(partial(compile_for, device), device, shape, batcher) for device in devices),
            return_exceptions=True,
        )
        runtimes: dict[torch.device, CompiledBackbone] = {}
        failures: dict[str, Exception] = {}
        for device, outcome in zip(devices, outcomes, strict=True):
            if isinstance(outcome, Exception):
                failures[str(device)] = outcome
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                runtimes[device] = outcome
        if not runtimes:
            for name, error in failures.items():
                log.error("loading failed on %s: %s", name, error)
            errors = sorted(failures.values(), key=lambda error: not isinstance(error, OutOfMemory | NotReady))
            raise errors[0]  # preferably one after which another try may succeed
        for name, error in failures.items():
            log.error("loading failed on %s, and the other devices serve: %s", name, error)
        return Replicas(runtimes, {name: str(error) for name, error in failures.items()})

    async def _replica(
        self, compiled: Callable[[], CompiledBackbone], device: torch.device, shape: Preprocessing, batcher: Batcher
    ) -> CompiledBackbone:
        async with self._turns[device]:  # so that the time limit counts from the start of the work
            runtime = await self.run(compiled, device, self._compilers[device], batcher)
        if device.type == "cuda":
            await self._warm_up(runtime, device, shape, batcher)
        return runtime

    async def _warm_up(
        self, runtime: CompiledBackbone, device: torch.device, shape: Preprocessing, batcher: Batcher
    ) -> None:
        """Run every batch step once in the thread that serves, because cuDNN keeps its plans by thread. A step for which there is no memory
        limits the batches of this device."""
        fits = 0
        for step in steps_up_to(runtime.max_batch):
            try:
                await self._call(partial(_run, runtime, step, shape), device, batcher)
            except OutOfMemory:
                if not fits:
                    raise
                break
            fits = min(step, runtime.max_batch)
        if fits < runtime.max_batch:
            log.warning("batches on %s are limited to %d images: there is no memory for %d", device, fits, step)
            runtime.max_batch = fits
            runtime.info = runtime.info.model_copy(update={"max_batch": fits})
            await self._call(torch.cuda.empty_cache, device, batcher)

    async def _call(self, work: Callable[[], object], device: torch.device, batcher: Batcher) -> None:
        try:
            async with asyncio.timeout(HANGS_AFTER_S[device.type]):
                await batcher.call(device, partial(_explaining, work, device))
        except TimeoutError:
            raise _lost(batcher, device, hangs(device)) from None

    async def everywhere(
        self,
        work: Callable[[torch.device], _Result],
        devices: Sequence[torch.device],
        pool: Executor,
        batcher: Batcher,
    ) -> dict[torch.device, _Result]:
        """Return the results on the devices that are not lost. Raises DeviceLost if all are, and what `run` raises."""
        results: dict[torch.device, _Result] = {}
        for device in devices:
            with suppress(DeviceLost):
                results[device] = await self.run(partial(work, device), device, pool, batcher)
        if not results:
            raise DeviceLost("no device is left to compute on; the server is about to restart")
        return results

    async def run(self, work: Callable[[], _Result], device: torch.device, pool: Executor, batcher: Batcher) -> _Result:
        """Do `work` in a thread of `pool`. Raises OutOfMemory, NotReady if another process has taken the device, DeviceLost, and other
        errors of `work`."""
        if batcher.is_lost(device):
            raise DeviceLost(f"{device} is lost; the server has to be started again")
        future = asyncio.get_running_loop().run_in_executor(pool, _explaining, work, device)
        try:
            await asyncio.wait([future], timeout=HANGS_AFTER_S[device.type])
            if not future.done():
                raise hangs(device)
            return future.result()
        except DeviceLost as error:
            raise _lost(batcher, device, error) from None
        finally:
            future.cancel()


def hangs(device: torch.device) -> DeviceLost:
    return DeviceLost(f"{device} hangs: loading has taken longer than {HANGS_AFTER_S[device.type]:g} s")


def _lost(batcher: Batcher, device: torch.device, error: DeviceLost) -> DeviceLost:
    batcher.lose(device, error)
    return error


def _explaining(work: Callable[[], _Result], device: torch.device) -> _Result:
    try:
        return work()
    except Exception as error:
        raise explained(error, device) from error


def explained(error: Exception, device: torch.device) -> Exception:
    """Return an error on a device as one of ours. Called in the thread of the work, because it may use the device, which may hang."""
    if isinstance(error, ModelError | ServiceError):
        return error
    if is_out_of_memory(error, device):
        return OutOfMemory(f"{device} has not enough memory{_free(device)}; free some: {_first_line(error)}")
    if isinstance(error, RuntimeError) and any(text in str(error) for text in BUSY):
        return NotReady(f"{device} is taken by another process; end that process, or run `nvidia-smi -c DEFAULT`")
    if is_device_lost(error, device):
        return DeviceLost(f"{device} stopped working; try again later")
    return error


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__


def _free(device: torch.device) -> str:
    if (found := memory(device)) is None:
        return ""
    used, total = found
    return f" ({(total - used) >> 20:,} of {total >> 20:,} MB are free)"


def _run(runtime: CompiledBackbone, size: int, shape: Preprocessing) -> None:
    """Compute a batch of black images from pinned memory, so that the first batches find enough of it cached."""
    image = torch.zeros(shape.height, shape.width, shape.channels, dtype=torch.uint8).permute(2, 0, 1)
    runtime(stack([image] * size, pinned=pins(runtime.device))).sum().item()
