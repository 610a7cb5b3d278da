"""The results of the calls in a pickle: containers, numbers and placeholders. No function of a file is called."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from models.store.checkpoints.placeholders import NameAt, NumpyArrayAt, StorageAt, TensorAt, Thing, Unordered

MAX_INTEGER = 2**53  # of a key: larger ones could be chosen to have the same hash
DTYPE = re.compile(r"[<>=|]?(?:[biufc](?:1|2|4|8|16)|[US]\d{1,6})")


def storage_of(identity: Any) -> Any:
    """Returns the storage of a persistent id of torch: ("storage", class, key, device, count), in old files also a view."""
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        return identity[1] if isinstance(identity, tuple) and len(identity) > 1 else None  # a class with its source
    _, kind, key, _, count, *view = identity
    start = view[0][1] if view and isinstance(view[0], tuple) and len(view[0]) == 3 else 0
    kind = kind.name.rpartition(".")[2] if isinstance(kind, NameAt) else ""
    if not isinstance(count, int) or not isinstance(start, int):
        return None
    return StorageAt(kind, str(key), count, start)


def key_of(key: Any) -> Any:
    """Returns text or a small number as it is, whose hash is fast; any other key as a unique placeholder."""
    if (
        key is None
        or isinstance(key, str | bytes | bool)
        or (isinstance(key, int) and -MAX_INTEGER < key < MAX_INTEGER)
    ):
        return key
    return Thing("a key", key)


def name_of(value: Any) -> str:
    return value.name if isinstance(value, Thing) else type(value).__name__


def modern(name: str) -> str:
    return name.replace("numpy._core.", "numpy.core.").replace("__builtin__.", "builtins.")


def dtype_name(value: Any) -> str | None:
    """Returns `dtype("f4")` with its byte order as text for NumPy; None for dtypes other than numbers and text."""
    if isinstance(value, NameAt):  # numpy.float32
        value = Thing("numpy.dtype", (value.name.rpartition(".")[2],))
    if not isinstance(value, Thing) or not isinstance(value.arguments, tuple) or not value.arguments:
        return None
    kind = value.arguments[0]
    order = value.state[1] if isinstance(value.state, tuple) and len(value.state) > 1 else ""
    kind = f"{order if order in ('<', '>') else ''}{kind}"
    return kind if DTYPE.fullmatch(kind) else None


def _scalar(dtype: Any, data: Any = b"") -> Any:
    kind = dtype_name(dtype)
    if kind is None or not isinstance(data, bytes):
        raise ValueError("no number")
    return np.frombuffer(data, np.dtype(kind), 1)[0].item()


def _array(data: Any, dtype: Any, shape: Any, order: Any = "C") -> NumpyArrayAt:
    kind = dtype_name(dtype)
    if kind is None:
        raise ValueError("no numbers")
    return NumpyArrayAt(kind, shape, data, order == "F")


def _pairs(pairs: Any = (), *_: Any) -> dict[Any, Any]:
    if isinstance(pairs, dict):
        return dict(pairs)
    return {key_of(key): value for key, value in (pairs if isinstance(pairs, list | tuple) else ())}


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> TensorAt:
    dtype = rest[2].name if len(rest) > 2 and isinstance(rest[2], NameAt) else None
    return TensorAt(storage, offset, shape, stride, dtype)


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise ValueError("no text")
    return text.encode(encoding)


def _of_type(function: Any, _type: Any, arguments: Any, _state: Any = None) -> Any:
    if isinstance(function, NameAt) and function.name in TENSORS and isinstance(arguments, tuple):
        return MAKERS[function.name](*arguments)
    raise ValueError("no tensor")


# The functions that may be called inside a call, which the step limit does not count: they only keep their arguments.
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")


def _reconstructor(kind: Any, _base: Any = None, state: Any = None) -> Thing:
    return Thing(name_of(kind), (state,))


# The replacement of each function. Each only keeps its arguments.
MAKERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _pairs,
    "collections.Counter": _pairs,
    "collections.defaultdict": lambda *_: {},
    "builtins.dict": _pairs,
    "builtins.list": lambda items=(): list(items) if isinstance(items, list | tuple) else [],
    "builtins.tuple": lambda items=(): tuple(items) if isinstance(items, list | tuple) else (),
    "builtins.set": lambda items=(): Unordered(items if isinstance(items, list | tuple) else ()),
    "builtins.frozenset": lambda items=(): Unordered(items if isinstance(items, list | tuple) else ()),
    "torch.Size": lambda items=(): tuple(items) if isinstance(items, list | tuple) else (),
    "_codecs.encode": _encoded,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _array,
    "numpy.core.multiarray._reconstruct": lambda *_: NumpyArrayAt(),
    "copy_reg._reconstructor": _reconstructor,
    "copyreg._reconstructor": _reconstructor,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch.nn.parameter.Parameter": lambda data, *_: data,
    "torch.nn.parameter.Buffer": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch._utils._rebuild_device_tensor_from_numpy": lambda data, *_: data,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": lambda data, *_: data,
    "torch._utils._rebuild_xla_tensor": lambda data, *_: data,
    "torch._utils._rebuild_qtensor": lambda *_: TensorAt(None, problem="quantised"),
    "torch._utils._rebuild_sparse_tensor": lambda *_: TensorAt(None, problem="sparse"),
    "torch._utils._rebuild_sparse_csr_tensor": lambda *_: TensorAt(None, problem="sparse"),
    "torch._utils._rebuild_nested_tensor": lambda *_: TensorAt(None, problem="nested"),
    "torch._utils._rebuild_meta_tensor_no_storage": lambda *_: TensorAt(None, problem="without values"),
}
