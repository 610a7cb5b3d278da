"""Gradient checkpointing: a stage keeps only its input, and computes its activations again for the gradient (Chen et al. 2016)."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputing(stages: Iterable[nn.Module]) -> Iterator[None]:
    """Apply gradient checkpointing to these stages. The result is the same to the bit, with dropout and batch norm's statistics."""
    stages = list(stages)
    for stage in stages:
        stage.forward = _forgetful(stage)
    try:
        yield
    finally:
        for stage in stages:
            del stage.forward  # uncovers the class's own


def _forgetful(stage: nn.Module) -> Callable[[Tensor], Tensor]:
    forward = stage.forward
    norms = [module for module in stage.modules() if isinstance(module, _BatchNorm)]

    def forget(x: Tensor) -> Tensor:
        if not (stage.training and torch.is_grad_enabled()):
            return forward(x)  # type: ignore[no-any-return]
        contexts = lambda: (nullcontext(), _unmoved(norms))  # noqa: E731
        return checkpoint(forward, x, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]

    return forget


@contextmanager
def _unmoved(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Keep the running statistics unchanged in the second pass, which sees the same batch."""
    before = [(norm, norm.momentum, _copy(norm.num_batches_tracked)) for norm in norms]
    for norm, _, _ in before:
        norm.momentum = 0.0  # not `track_running_stats`, with which other tensors would be kept than in the first pass
    try:
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum = momentum
            norm.num_batches_tracked = batches


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
