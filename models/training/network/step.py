"""One training step, in as many pieces as memory requires.

images (B, C, H, W) --pieces of at most `micro`--> network --cross-entropy--> summed gradients --> optimiser
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from models.errors import OutOfMemory
from models.runtime import is_out_of_memory
from models.runtime.device import release_cached_memory
from models.training.job.hyperparameters import ResolvedHyperparameters
from models.training.network.auxiliary import Auxiliary
from models.training.network.process_group import ALONE, ProcessGroup

MOMENTUM = 0.9

Groups = list[dict[str, Any]]  # the optimiser's: "params", and "peak", their highest learning rate


class MicroBatchTooLarge(Exception):
    """A device ran out of memory in a step that several processes share, so that one of them cannot repeat it. `micro` images may fit."""

    def __init__(self, micro: int) -> None:
        super().__init__(micro)
        self.micro = micro


class ScoresWithAuxiliary(nn.Module):
    """A network and its auxiliary classifiers as one module: images -> the network's scores (N, C), then those of each classifier."""

    def __init__(self, network: nn.Module, aux: Auxiliary | None) -> None:
        super().__init__()
        self.network = network
        self.aux = aux

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.network(images), *(self.aux.take() if self.aux else ())]


class StepResult(NamedTuple):
    """The figures of a step."""

    loss: Tensor  # (): the mean
    right: Tensor  # (): images whose label, or largest share, got the highest score


class Stepper:
    """The optimiser of a network, and the steps that it takes. `classes` (C,) is the weight of an image of each class; None: 1.

    Call `begin` before the first step if several `ranks` share each step.
    """

    def __init__(
        self,
        network: nn.Module,
        aux: Auxiliary | None,
        groups: Groups,
        settings: ResolvedHyperparameters,
        classes: Tensor | None,
        tell: Callable[[str], None],
        ranks: ProcessGroup = ALONE,
    ) -> None:
        self.whole = ScoresWithAuxiliary(network, aux)
        self.scores: nn.Module = self.whole
        self.aux = aux
        self.settings = settings
        self.ranks = ranks
        self.device = next(network.parameters()).device
        self.classes = classes.to(self.device) if classes is not None else None
        self.tell = tell
        self.optimizer = _optimizer(groups, settings)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "float16")
        self.micro = math.ceil(settings.batch_size / ranks.count)  # images in one pass
        # A batch norm cannot normalise a single value.
        self.least = 2 if any(isinstance(module, _BatchNorm) for module in network.modules()) else 1

    def begin(self) -> None:
        """Wrap the network anew at the start of each epoch, because other weights may train now, as a resumed run does."""
        frozen = not all(parameter.requires_grad for parameter in self.whole.parameters())
        self.scores = self.ranks.wrap(self.whole, unused=self.aux is not None and frozen)  # none for frozen modules

    def step(self, images: Tensor, labels: Tensor, rate: float, of: int | None = None) -> StepResult:
        """Take one step. `labels` are (B,) or shares (B, C), `rate` is the share of the peak learning rates.

        `of` is the number of images on all ranks together, to which the result refers.

        If memory runs out, the step is repeated with half as many images in each pass. Raises OutOfMemory; MicroBatchTooLarge if several
        ranks share the step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        share = (of or len(images)) / self.ranks.count  # the mean over the ranks is then that over all images
        while (result := self._gradients(images, labels, share)) is None:
            self._halve(images)
        self._move_weights()
        self.scaler.update()
        loss, right = self.ranks.sums(*result)
        return StepResult(loss / self.ranks.count, right)

    def parts(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {"optimizer": self.optimizer, "scaler": self.scaler}

    def _gradients(self, images: Tensor, labels: Tensor, share: float) -> StepResult | None:
        """Compute the gradient of the summed loss / `share`, averaged over the ranks; None if memory ran out."""
        self.optimizer.zero_grad()
        pieces = max(1, min(math.ceil(len(images) / self.micro), len(images) // self.least))
        total, right = (torch.zeros((), device=self.device) for _ in range(2))
        try:
            parts = zip(images.tensor_split(pieces), labels.tensor_split(pieces), strict=True)
            for number, (some_images, some_labels) in enumerate(parts, start=1):
                with self._exchange(number == pieces):
                    loss, hits = self._loss(some_images, some_labels)
                    self.scaler.scale(loss / share).backward()  # type: ignore[no-untyped-call]
                total += loss.detach() / share
                right += hits
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error, self.device):
                raise
            return None
        return StepResult(total, right)

    def _move_weights(self) -> None:
        """Take the optimiser's step, one group of weights after the other.

        A group can run out of memory only while its state is allocated, in the first step and before any of its weights has changed. That
        state is dropped, cached memory freed, and the group tried once more. The scaler of float16 takes one step for all groups, which
        is not repeated.
        """
        if self.scaler.is_enabled():
            with self._explained():
                self.scaler.step(self.optimizer)
            return
        groups, optimizer = self.optimizer.param_groups, self.optimizer
        try:
            for group in groups:
                optimizer.param_groups = [group]
                known = set(optimizer.state)
                try:
                    optimizer.step()
                    continue
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error, self.device):
                        raise
                for parameter in set(optimizer.state) - known:
                    del optimizer.state[parameter]
                release_cached_memory(self.device)
                self.tell("out of memory in the optimiser's step: cached memory is freed, and the step done again")
                with self._explained():
                    optimizer.step()
        finally:
            optimizer.param_groups = groups

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise OutOfMemory if memory runs out."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error, self.device):
                raise
            raise OutOfMemory(
                f"not enough memory for the state of the optimiser {self.settings.optimizer}: take sgd, which keeps half as much as "
                "adam and adamw, a smaller network, or freeze a part of it (freeze_until)"
            ) from None

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss summed over the images, with the auxiliary classifiers' part, and the number of images that are right."""
        with self._autocast():
            scores, *others = self.scores(images)
            loss = self._cross_entropy(scores, labels)
            for auxiliary in others:
                if self.aux is None:
                    raise RuntimeError("only auxiliary classifiers have scores beside the network's")
                loss = loss + self.aux.weight * self._cross_entropy(auxiliary, labels)
        likeliest = labels if labels.ndim == 1 else labels.argmax(dim=1)
        return loss, (scores.detach().argmax(dim=1) == likeliest).sum()

    def _exchange(self, last: bool) -> AbstractContextManager[Any]:
        """Exchange gradients with the other ranks in the `last` piece only; those of earlier pieces add up on each rank until then."""
        if last or not isinstance(self.scores, DistributedDataParallel):
            return nullcontext()
        return self.scores.no_sync()

    def _cross_entropy(self, scores: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.settings.label_smoothing
        return F.cross_entropy(scores.float(), labels, self.classes, reduction="sum", label_smoothing=smoothing)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.settings.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.settings.precision))

    def _halve(self, images: Tensor) -> None:
        """Halve the images in each pass. The step stays the same, except for batch norm's statistics."""
        if self.micro <= self.least:
            raise OutOfMemory(
                f"not enough memory to train on {self.micro} images of {images.shape[-1]} px at once: set gradient_checkpointing, "
                "take a smaller network or freeze a part of it (freeze_until), or use a device with more memory"
            )
        self.micro = max(self.least, min(self.micro, len(images)) // 2)
        if self.ranks.count > 1:
            raise MicroBatchTooLarge(self.micro)
        release_cached_memory(self.device)
        self.tell(f"out of memory: {self.micro} images at once from here on, in steps of {len(images)}")


def _optimizer(groups: Groups, settings: ResolvedHyperparameters) -> torch.optim.Optimizer:
    """Return a fused optimiser, which updates all weights in one pass over memory, three to four times as fast on a CPU."""
    decay = settings.weight_decay or 0.0
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, settings.lr, MOMENTUM, weight_decay=decay, nesterov=True, fused=True)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, settings.lr, weight_decay=decay, fused=True)
