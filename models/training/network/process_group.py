"""Shares one training step among several processes, each with its part of the batch and a device of its own.

    batch --part--> images of this rank --network--> gradients --DistributedDataParallel: mean over the ranks--> the same step everywhere

Rank 0 decides what must be the same everywhere. A run in one process has no group, and everything here does nothing for it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.training.network.augment import AugmentedBatch

T = TypeVar("T")

CPU = torch.device("cpu")
MAX_RANKS = 1024  # seeds are that far apart


class ProcessGroup:
    """One of the processes that train a network together: number `rank` (from 0) of `count`.

    If there are several, torch's process group must exist, with a backend for tensors on the CPU too.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank = rank
        self.count = count

    def part(self, images: int, mixed: bool) -> AugmentedBatch | None:
        """Return this rank's part of a batch of `images`; None: all of it. If the images are `mixed`, each with the one before it, the part
        begins with the last image of the rank before, which is used for mixing only."""
        if self.count == 1:
            return None
        start, stop = (images * number // self.count for number in (self.rank, self.rank + 1))
        return AugmentedBatch(torch.arange(start - mixed, stop) % images, images)

    def wrap(self, module: nn.Module, *, unused: bool) -> nn.Module:
        """Return the module with its gradients averaged over the ranks; `unused`: some weights may take no part in a step.

        Buffers are not exchanged: batch norm's running statistics are those of rank 0's images, as in torchvision's training.
        """
        if self.count == 1:
            return module
        return DistributedDataParallel(module, forward_sync_buffers=False, find_unused_parameters=unused)

    def sums(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Return the sums over all ranks of each value (), in one exchange."""
        if self.count == 1:
            return values
        together = torch.stack(values)
        dist.all_reduce(together)
        return together.unbind()

    def agree(self, value: T) -> T:
        """Return rank 0's value, which can be anything that can be pickled; those of the others are ignored."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=CPU)
        return values[0]

    def choose(self, options: tuple[T, ...], ask: Callable[[], T]) -> T:
        """Return one of `options`, the result of `ask` on rank 0. It is called in every step, so it does not pickle."""
        if self.count == 1:
            return ask()
        index = torch.tensor(0 if self.rank else options.index(ask()))
        dist.broadcast(index, 0)
        return options[int(index)]

    @contextmanager
    def own_chance(self, seed: int) -> Iterator[None]:
        """Give each rank its own random numbers, so that dropout differs between the parts; outside, all ranks draw the same."""
        if self.count == 1:
            yield
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((seed * MAX_RANKS + self.rank) % 2**63)
            yield


ALONE = ProcessGroup()
