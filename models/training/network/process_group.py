"""One step of training, shared by several processes: each takes its part of the batch, on a device of its own.

    batch --part--> images of this rank --network--> gradients --DistributedDataParallel: mean over the ranks--> the same step everywhere

What is to be the same everywhere is said by the first rank. A run in one process has no group, and nothing here costs it anything.
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
    """The processes that train one network together, as one of them sees it: number `rank` of `count`, from 0.

    Where there are several, torch's process group stands already, with a backend for tensors on the CPU too.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank = rank
        self.count = count

    def part(self, images: int, mixed: bool) -> AugmentedBatch | None:
        """This rank's own of so many images; None: all. Where they are `mixed`, each with the one before it, the first of them is the
        one before its own, and only lends itself."""
        if self.count == 1:
            return None
        start, stop = (images * number // self.count for number in (self.rank, self.rank + 1))
        return AugmentedBatch(torch.arange(start - mixed, stop) % images, images)

    def wrap(self, module: nn.Module, *, unused: bool) -> nn.Module:
        """The module with its gradients averaged over the ranks; `unused` where some of its weights may take no part in a step.

        Buffers are left alone: the running statistics of a batch norm are those of the first rank's images, as in torchvision's training.
        """
        if self.count == 1:
            return module
        return DistributedDataParallel(module, forward_sync_buffers=False, find_unused_parameters=unused)

    def sums(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Of all ranks' values, each (), on their devices; in one exchange."""
        if self.count == 1:
            return values
        together = torch.stack(values)
        dist.all_reduce(together)
        return together.unbind()

    def agree(self, value: T) -> T:
        """The first rank's value, whatever the others have; anything that can be pickled."""
        if self.count == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said, device=CPU)
        return said[0]

    def choose(self, options: tuple[T, ...], ask: Callable[[], T]) -> T:
        """What the first rank is answered when it asks, one of `options`: for every step, and so without pickling."""
        if self.count == 1:
            return ask()
        place = torch.tensor(0 if self.rank else options.index(ask()))
        dist.broadcast(place, 0)
        return options[int(place)]

    @contextmanager
    def own_chance(self, seed: int) -> Iterator[None]:
        """Within, each rank draws its own: dropout on two parts of a batch is not to be alike. Outside, all draw the same."""
        if self.count == 1:
            yield
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((seed * MAX_RANKS + self.rank) % 2**63)
            yield


ALONE = ProcessGroup()
