"""Folds batch norm into the convolution before it, which computes the same and saves one pass over memory.

The pairs are found by recording one forward pass. `torch.fx` would not need one, but while it traces it replaces
`nn.Module.__call__` for the whole process, so that forward passes of other threads fail, and a server loads versions while it
serves. A `TorchFunctionMode` affects its own thread only.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode


class _Watch(TorchFunctionMode):
    """Records which convolution made each tensor, which functions took it, and which batch norms took what."""

    def __init__(self) -> None:
        super().__init__()
        self.made_by: dict[int, Tensor] = {}  # a convolution's output -> its weight
        self.uses: Counter[int] = Counter()  # functions that took a convolution's output
        self.normalised: list[tuple[Tensor, int]] = []  # a batch norm's running mean, the id of its input
        self.norms: Counter[int] = Counter()  # calls by the id of the running mean
        self._kept: list[Tensor] = []  # keeps tensors alive, so that their ids stay unique

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.conv2d:
            self.made_by[id(result)] = args[1]
            self._kept.append(result)
        elif func is F.batch_norm:
            self.norms[id(args[1])] += 1
            if id(args[0]) in self.made_by:
                self.normalised.append((args[1], id(args[0])))
        if _tensors([result]):  # not a query of its shape
            self.uses.update(id(arg) for arg in _tensors([*args, *kwargs.values()]) if id(arg) in self.made_by)
        return result


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    found = []
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, list | tuple):
            found += _tensors(arg)
    return found


@torch.no_grad()
def fold_batch_norm(module: nn.Module, example: Tensor) -> tuple[nn.Module, int]:
    """Return a copy for inference of a float32 CPU network, and the number of folded batch norms.

    `example` is one float32 input (1, C, H, W). A batch norm is folded if its input is a convolution's output that nothing else uses, and
    neither module is used twice.
    """
    duplicate = copy.deepcopy(module).eval().requires_grad_(False)
    with _Watch() as watch:
        duplicate(example)
    convolutions = {id(m.weight): (name, m) for name, m in duplicate.named_modules() if isinstance(m, nn.Conv2d)}
    norms = {id(m.running_mean): (name, m) for name, m in duplicate.named_modules() if isinstance(m, nn.BatchNorm2d)}
    calls = Counter(id(weight) for weight in watch.made_by.values())
    folded = 0
    for mean, taken in watch.normalised:
        weight = watch.made_by[taken]
        if (watch.uses[taken], calls[id(weight)], watch.norms[id(mean)]) != (1, 1, 1):
            continue
        if id(weight) not in convolutions or id(mean) not in norms:
            continue
        (conv_name, convolution), (norm_name, norm) = convolutions[id(weight)], norms[id(mean)]
        if convolution._forward_hooks or norm._forward_hooks:  # a Tap reads this very output
            continue
        duplicate.set_submodule(conv_name, fuse_conv_bn_eval(convolution, norm))
        duplicate.set_submodule(norm_name, nn.Identity())
        folded += 1
    return duplicate, folded
