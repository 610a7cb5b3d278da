"""A GPU's code paths without a GPU: tensors on `cuda:0` that have a shape and a dtype, and no numbers.

    with fake_cuda() as gpu:                                   # torch.cuda answers as a GPU would
        engine = TorchEngine(gpu.backbone("resnet18"), CUDA, "float16", "channels_last", 1)
        with crossings() as log, torch.inference_mode():
            engine(pixels)                                     # an operation that mixes devices or dtypes raises
    assert log.blocking == []                                  # copies for which the CPU waits

Rests on torch's FakeTensorMode: an operation that mixes devices or dtypes raises, as it does on a GPU. A value that code reads
(`.item()`, `if tensor:`, `.tolist()`) is 1 or True, and a blocking crossing if the tensor is on the GPU. Modes belong to the thread
that entered them, so code under test must run in this thread. Modules that were made outside go through `gpu.faked` first.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from models import architectures
from models.classifier import Backbone, BackboneRef
from models.store.backbones import skeleton

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
_EMPTY = torch.empty


# Their fake versions take tensors of several dtypes, which the real ones refuse.
SAME_DTYPE = {
    aten.convolution.default,
    aten.conv2d.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.matmul.default,
    aten.linear.default,
    aten.scaled_dot_product_attention.default,
}


class _SameDtype(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SAME_DTYPE:
            dtypes = {a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()}
            if len(dtypes) > 1:
                raise RuntimeError(f"{func}: expected tensors of the same dtype, but got {dtypes}")
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Crossing:
    """A copy between the CPU and the GPU. `to` is `cuda` or `cpu`; `blocking`: the CPU waits until it is done."""

    operation: str
    to: str
    blocking: bool
    shape: tuple[int, ...]


@dataclass
class FakeGpu:
    """Answers of the pretended GPU. `calls` names the functions of torch.cuda that were called, in their order."""

    mode: FakeTensorMode
    capability: tuple[int, int] = (9, 0)
    free: int = 100 * 2**30  # bytes
    total: int = 140 * 2**30
    count: int = 1
    calls: list[str] = field(default_factory=list)
    pinned: set[int] = field(default_factory=set)  # storages
    kept: list[Any] = field(default_factory=list)  # so that no other storage takes the place of a pinned one

    def faked(self, module: nn.Module) -> nn.Module:
        """`module` itself, with fake tensors on the CPU in place of its parameters and buffers."""
        return _apply(module, self.mode.from_tensor)

    def backbone(self, name: str) -> Backbone:
        """An architecture without its last layer, with fake tensors on the CPU, as `faked` would give the store's. It has no `map`."""
        with _disable_current_modes(), mock.patch.object(torch, "empty", _EMPTY):  # as `skeleton` knows it
            preprocessing = architectures.preprocessing_of(name, 3)
            module = skeleton(name, preprocessing).eval().requires_grad_(False)
        _apply(module, self._on_cpu)
        ref = BackboneRef(architecture=name, sha256="0" * 64, preprocessing=preprocessing)
        with torch.inference_mode():
            images = torch.zeros(1, preprocessing.channels, preprocessing.height, preprocessing.width)
            return Backbone(ref, module, module(images).shape[1])

    def _on_cpu(self, meta: Tensor) -> Tensor:
        with _disable_current_modes():
            empty = torch.empty(meta.shape, dtype=meta.dtype, device="meta")
        return FakeTensor(self.mode, empty, torch.device("cpu"))

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned.add(tensor.untyped_storage()._cdata)
        self.kept.append(tensor.untyped_storage())
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.pinned


class Crossings(TorchDispatchMode):
    """Records every copy between the CPU and the GPU.

    A copy to the GPU does not block if it is `non_blocking` and its source is pinned; a copy to the CPU if it is `non_blocking`.
    """

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.all: list[Crossing] = []

    @property
    def blocking(self) -> list[Crossing]:
        return [crossing for crossing in self.all if crossing.blocking]

    def to(self, kind: str) -> list[Crossing]:
        """Those in one direction: `cuda` or `cpu`."""
        return [crossing for crossing in self.all if crossing.to == kind]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default):
            return self._read(args[0])
        out = func(*args, **kwargs)
        sources = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if func is aten.copy_.default:  # (target, source)
            self._note(func, args[1], args[0], _non_blocking(func, args, kwargs))
        elif func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            for index in tree_leaves(args[1]):  # torch copies an index that is on the CPU, and waits for it
                if isinstance(index, Tensor):
                    self._note(func, index, results[0], False)
        elif sources and results:
            self._note(func, sources[0], results[0], _non_blocking(func, args, kwargs))
        return out

    def _note(self, func: Any, source: Tensor, result: Tensor, non_blocking: bool) -> None:
        if source.device.type != result.device.type and "meta" not in (source.device.type, result.device.type):
            free = non_blocking and (source.device.type == "cuda" or self.gpu.is_pinned(source))
            self.all.append(Crossing(str(func), result.device.type, not free, tuple(result.shape)))

    def _read(self, tensor: Tensor) -> Any:
        if tensor.device.type == "cuda":
            self.all.append(Crossing("item", "cpu", True, tuple(tensor.shape)))
        return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1

    def listed(self, tensor: Tensor) -> Any:
        """Stands for the answer of `tensor.tolist()`."""
        if tensor.device.type == "cuda":
            self.all.append(Crossing("tolist", "cpu", True, tuple(tensor.shape)))
        with _disable_current_modes():
            return torch.ones(tuple(tensor.shape), dtype=tensor.dtype).tolist()


def _non_blocking(func: Any, args: Any, kwargs: Any) -> bool:
    """The argument of that name, by position or by keyword; False where the operation has none."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return bool(given.get("non_blocking", False))


_gpu: FakeGpu | None = None


@contextlib.contextmanager
def crossings() -> Iterator[Crossings]:
    """Records the copies between CPU and GPU inside the block, which lies inside `fake_cuda`."""
    if _gpu is None:
        raise RuntimeError("crossings() lies inside fake_cuda()")
    log = Crossings(_gpu)
    with log, mock.patch.object(FakeTensor, "tolist", lambda tensor: log.listed(tensor)):
        yield log


@contextlib.contextmanager
def fake_cuda(**answers: Any) -> Iterator[FakeGpu]:
    """A pretended GPU for this thread; `answers` are fields of FakeGpu: `capability`, `free`, `total`, `count`."""
    global _gpu
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    gpu = FakeGpu(mode, **answers)
    with contextlib.ExitStack() as stack:
        for target, name, value in _patches(gpu):
            stack.enter_context(mock.patch.object(target, name, value, create=not hasattr(target, name)))
        stack.enter_context(mode)
        stack.enter_context(_SameDtype())
        _gpu = gpu
        try:
            yield gpu
        finally:
            _gpu = None


def _patches(gpu: FakeGpu) -> Iterator[tuple[Any, str, Any]]:
    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "device_count": lambda: gpu.count,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "Fake GPU",
        "get_device_capability": lambda device=None: gpu.capability,
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
        "mem_get_info": lambda device=None: (gpu.free, gpu.total),
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "set_device": lambda device: None,
        "set_per_process_memory_fraction": lambda fraction, device=None: None,
        "Stream": lambda *args, **kwargs: mock.MagicMock(),
        "Event": lambda *args, **kwargs: mock.MagicMock(),
        "current_stream": lambda device=None: mock.MagicMock(),
        "default_stream": lambda device=None: mock.MagicMock(),
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
    }
    for name, answer in answers.items():
        yield torch.cuda, name, _counted(gpu, name, answer)
    yield FakeTensorMode, "avoid_device_init", property(lambda self: True)
    yield (
        FakeTensorMode,
        "may_turn_const",
        lambda self, tensor: False,
    )  # constants are computed for real, on the real device
    yield fake_tensor, "init_gpu_context", lambda device: None
    yield FakeTensor, "__deepcopy__", lambda self, memo: memo.setdefault(id(self), self.detach().clone())
    yield nn.Module, "_apply", _apply
    yield Tensor, "pin_memory", _either(lambda t, *args: gpu.pin(t.clone()), Tensor.pin_memory)
    yield Tensor, "is_pinned", _either(lambda t, *args: gpu.is_pinned(t), Tensor.is_pinned)
    yield Tensor, "backward", _either(_backward, Tensor.backward)
    yield torch, "empty", _pinning(gpu, _EMPTY)


def _counted(gpu: FakeGpu, name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        gpu.calls.append(name)
        return answer(*args, **kwargs)

    return call


def _either(fake: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        return fake(self, *args, **kwargs) if isinstance(self, FakeTensor) else real(self, *args, **kwargs)

    return method


def _pinning(gpu: FakeGpu, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        tensor = real(*args, **kwargs)
        return gpu.pin(tensor) if pin_memory else tensor

    return empty


def _backward(self: Tensor, *args: Any, **kwargs: Any) -> None:
    """Gives every leaf a gradient; autograd itself asks for a real GPU."""
    nodes, seen = [self.grad_fn], set[Any]()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            leaf.grad = torch.empty_like(leaf)
        nodes += [following for following, _ in node.next_functions]


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """As nn.Module's, which refuses to exchange a fake tensor for another."""
    if recurse:
        for child in self.children():
            _apply(child, fn)
    with torch.no_grad():
        for name, parameter in self._parameters.items():
            if parameter is not None:
                self._parameters[name] = nn.Parameter(fn(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = fn(buffer)
    return self
