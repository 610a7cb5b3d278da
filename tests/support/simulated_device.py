"""GPUs that compute nothing: they sleep, so that they let go of the interpreter, and raise whatever a test asks for.

    first, second = SimulatedGpu(0, per_image_s=0.001), SimulatedGpu(1)
    with simulated(first, second):              # the server finds these two, and compiles every backbone for them
        first.fail(at=3, error=LOST)            # its third batch raises, and, the error being sticky, so does all that follows
        first.fail(at=5, error=out_of_memory()) # its fifth alone
        engine = Engine(settings, store, Metrics())

Features are real tensors that say they lie on `cuda:N`. What torch.cuda is asked meanwhile is answered for these GPUs.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from models.classifier import Backbone
from models.runtime.options import Agreement, Options, RuntimeInfo
from models.store.store import ModelStore
from service.inference import engine as engine_module
from service.inference.engine import Engine
from service.inference.registry import loader as loaded_module
from support.small_models import add_backbone, add_head, serving

LOST = "CUDA error: unspecified launch failure"
STICKY = (LOST, "CUDA error: an illegal memory access was encountered", "CUDA error: device-side assert triggered")


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class SimulatedGpu:
    """`cuda:index`. A batch of n takes `base_s + n * per_image_s` seconds.

    `batches`: the sizes computed so far. `lost`: after a sticky error every call fails, as on a GPU. `held`: while set, a batch waits.
    """

    def __init__(
        self,
        index: int = 0,
        base_s: float = 0.0,
        per_image_s: float = 0.0,
        max_batch: int = 64,
        memory: int = 80 * 2**30,
        capability: tuple[int, int] = (9, 0),
    ) -> None:
        self.device = torch.device("cuda", index)
        self.base_s, self.per_image_s, self.max_batch = base_s, per_image_s, max_batch
        self.total = self.free = memory
        self.capability = capability
        self.batches: list[int] = []
        self.threads: set[str] = set()  # names of those that computed here
        self.calls: list[str] = []  # functions of torch.cuda that were asked about this or any GPU
        self.lost: Exception | None = None
        self.held = threading.Event()
        self._hangs = False
        self._errors: dict[int, Exception] = {}
        self._compile_errors: list[Exception] = []

    def fail(self, at: int, error: Exception | str) -> None:
        """The `at`-th batch from now (1: the next) raises; a text is an AcceleratorError's. One of STICKY loses the device."""
        self._errors[len(self.batches) + at] = as_error(error)

    def fail_to_compile(self, error: Exception | str, times: int = 1) -> None:
        """The next `times` compilations for this device raise."""
        self._compile_errors += [as_error(error)] * times

    def compile(self, backbone: Backbone, *args: Any, **kwargs: Any) -> "SimulatedRuntime":
        self.check()
        if self._compile_errors:
            self._raise(self._compile_errors.pop(0))
        return SimulatedRuntime(self, backbone.feature_dim)

    def compute(self, images: int) -> None:
        """Takes the time of a batch; raises what was asked for."""
        self.check()
        self.threads.add(threading.current_thread().name)
        self.batches.append(images)
        while self.held.is_set():
            self._hangs = True
            time.sleep(0.002)
        self._hangs = False
        time.sleep(self.base_s + images * self.per_image_s)
        if (error := self._errors.pop(len(self.batches), None)) is not None:
            self._raise(error)

    def hanging(self) -> bool:
        """A batch waits now."""
        return self._hangs

    def check(self) -> None:
        """Any call to a lost device fails."""
        if self.lost is not None:
            raise self.lost

    def _raise(self, error: Exception) -> None:
        if any(text in str(error) for text in STICKY):
            self.lost = error
        raise error


def as_error(error: Exception | str) -> Exception:
    return torch.AcceleratorError(error) if isinstance(error, str) else error


class SimulatedRuntime:
    """Stands for a compiled backbone: uint8 (N, C, H, W) -> float32 (N, D), the mean of each image in every column."""

    def __init__(self, gpu: SimulatedGpu, dim: int) -> None:
        self.gpu, self.dim, self.device, self.max_batch = gpu, dim, gpu.device, gpu.max_batch
        self.info = RuntimeInfo(
            engine="torch",
            precision="float32",
            memory_format="channels_last",
            folded=True,
            device=str(gpu.device),
            threads=None,
            max_batch=gpu.max_batch,
            source="forced",
            candidates=(),
            agreement=Agreement(images=1, max_difference=0.0, top1=None),
            compile_seconds=0.0,
        )

    def __call__(self, pixels: Tensor) -> Tensor:
        self.gpu.compute(len(pixels))
        return located(pixels.float().mean(dim=(1, 2, 3))[:, None].expand(-1, self.dim) / 255, self.device)

    def with_maps(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self(pixels)
        return features, located(features.cpu()[:, :, None, None].expand(-1, -1, 2, 2), self.device)


class Located(Tensor):
    """A tensor in the CPU's memory that says it is on another device. What is computed from it is there as well."""

    place: torch.device

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, (), args, kwargs or {})


_classes: dict[torch.device, type[Located]] = {}


def located(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, saying that it is on `device`."""
    if device.type == "cpu":
        return tensor.as_subclass(Tensor)
    kind = _classes.setdefault(device, type(f"On{device.type}{device.index}", (Located,), {"place": device}))
    return tensor.as_subclass(Tensor).as_subclass(kind)


@contextlib.contextmanager
def simulated(*gpus: SimulatedGpu) -> Iterator[None]:
    """The server's devices are these. Moving a tensor or a module to one of them only marks it; torch.cuda answers for them."""
    by_device = {gpu.device: gpu for gpu in gpus}

    def compile_backbone(
        backbone: Backbone, device: torch.device, options: Options | None = None, layer: Any = None, **more: Any
    ) -> SimulatedRuntime:
        return by_device[device].compile(backbone)

    with contextlib.ExitStack() as stack:
        for target, name, value in [
            (engine_module, "devices", lambda name: [gpu.device for gpu in gpus]),
            (loaded_module, "compile_backbone", compile_backbone),
            *_moving(by_device),
            *((torch.cuda, name, answer) for name, answer in _answers(gpus).items()),
        ]:
            stack.enter_context(mock.patch.object(target, name, value))
        yield


def _moving(by_device: dict[torch.device, SimulatedGpu]) -> Iterator[tuple[Any, str, Any]]:
    real_to, real_module_to = Tensor.to, nn.Module.to

    def destination(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
        named = [a for a in (*args, kwargs.get("device")) if isinstance(a, str | torch.device)]
        return torch.device(named[0]) if named else None

    def without_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        rest = [a for a in args if not isinstance(a, str | torch.device)]
        return rest, {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = destination(args, kwargs)
        if device not in by_device and not (isinstance(self, Located) and device is not None):
            return real_to(self, *args, **kwargs)
        if device in by_device:
            by_device[device].check()
        rest, named = without_device(args, kwargs)
        plain = self.as_subclass(Tensor)
        return located(real_to(plain, *rest, **named) if rest or named else plain, device or torch.device("cpu"))

    def module_to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device = destination(args, kwargs)
        if device not in by_device:
            return real_module_to(self, *args, **kwargs)
        by_device[device].check()
        rest, named = without_device(args, kwargs)
        return real_module_to(self, *rest, **named) if rest or named else self

    def made(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> Tensor:
            place = torch.device(device) if device is not None else None
            if place not in by_device:
                return real(*args, device=device, **kwargs)
            by_device[place].check()
            return located(real(*args, **kwargs), place)

        return make

    yield Tensor, "to", to
    yield Tensor, "pin_memory", lambda self, *args: self
    yield nn.Module, "to", module_to
    for name in ("empty", "zeros", "ones", "full", "tensor", "arange"):
        yield torch, name, made(getattr(torch, name))


def _answers(gpus: tuple[SimulatedGpu, ...]) -> dict[str, Callable[..., Any]]:
    def which(device: Any = None) -> SimulatedGpu:
        index = device if isinstance(device, int) else torch.device(device or "cuda:0").index
        return next(gpu for gpu in gpus if gpu.device.index == (index or 0))

    def noted(name: str, answer: Callable[[SimulatedGpu], Any]) -> Callable[..., Any]:
        def call(device: Any = None) -> Any:
            gpu = which(device)
            gpu.calls.append(name)
            gpu.check()
            return answer(gpu)

        return call

    return {
        "is_available": lambda: True,
        "device_count": lambda: len(gpus),
        "current_device": lambda: gpus[0].device.index,
        "get_device_name": noted("get_device_name", lambda gpu: f"Simulated GPU {gpu.device.index}"),
        "get_device_capability": noted("get_device_capability", lambda gpu: gpu.capability),
        "mem_get_info": noted("mem_get_info", lambda gpu: (gpu.free, gpu.total)),
        "synchronize": noted("synchronize", lambda gpu: None),
        "empty_cache": noted("empty_cache", lambda gpu: None),
        "set_device": lambda device: None,
        "device": lambda device: contextlib.nullcontext(),
    }


# Servers on them

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
