"""A GPU's arithmetic on the CPU: TF32 by rounding, bfloat16 and float16 by torch's own CPU kernels.

with tf32():                    # convolutions and matrix products round their inputs to 10 bits, as Ampere's tensor cores do
    features = engine(pixels)

with computed_in("float16"):    # every TorchEngine built inside computes in float16, whatever it is asked for
    finetune.run(...)
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.runtime.options import Precision
from models.runtime.torch_engine import TorchEngine

MATRIX_PRODUCTS = {
    torch.ops.aten.convolution.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.matmul.default,
    torch.ops.aten.linear.default,
}


class _Tf32(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in MATRIX_PRODUCTS:
            args = tuple(round_to_tf32(a) if isinstance(a, Tensor) and a.ndim > 1 else a for a in args)
        return func(*args, **(kwargs or {}))


def round_to_tf32(tensor: Tensor) -> Tensor:
    """float32 rounded to the 10 bits of TF32's mantissa; other dtypes as they are."""
    if tensor.dtype != torch.float32:
        return tensor
    bits = tensor.detach().clone().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Convolutions and matrix products of this thread compute in TF32."""
    with _Tf32():
        yield


@contextlib.contextmanager
def computed_in(precision: Precision) -> Iterator[None]:
    """Engines built inside the block compute in `precision`, and say so, as on a GPU that was asked for it."""
    real = TorchEngine.__init__

    def init(
        self: TorchEngine, backbone: Any, device: Any, _precision: Any, memory_format: Any, threads: int, **more: Any
    ) -> None:
        real(self, backbone, device, precision, memory_format, threads, **more)

    with mock.patch.object(TorchEngine, "__init__", init):
        yield
