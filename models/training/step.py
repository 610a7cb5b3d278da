"""One step down the loss, in as many pieces as memory allows.

images (B, C, H, W) --pieces of at most `micro`--> network --cross-entropy--> gradients, added up --> optimiser
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.errors import OutOfMemory
from models.runtime import is_out_of_memory
from models.training.auxiliary import Auxiliary
from models.training.request import Effective

MOMENTUM = 0.9

Groups = list[dict[str, Any]]  # the optimiser's: "params", and "peak", the highest of their learning rates


class Taken(NamedTuple):
    """A step."""

    loss: Tensor  # (): the mean
    right: Tensor  # (): how many images had their label, of shares the largest, as the highest score


class Stepper:
    """The optimiser of a network, and how a batch goes through it. `classes` (C,) is what an image of each class counts; None: 1."""

    def __init__(
        self,
        network: nn.Module,
        aux: Auxiliary | None,
        groups: Groups,
        settings: Effective,
        classes: Tensor | None,
        tell: Callable[[str], None],
    ) -> None:
        self.network = network
        self.aux = aux
        self.settings = settings
        self.device = next(network.parameters()).device
        self.classes = classes.to(self.device) if classes is not None else None
        self.tell = tell
        self.optimizer = _optimizer(groups, settings)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "float16")
        self.micro = settings.batch_size  # images at once
        # A batch norm cannot normalise a single value.
        self.least = 2 if any(isinstance(module, _BatchNorm) for module in network.modules()) else 1

    def step(self, images: Tensor, labels: Tensor, rate: float) -> Taken:
        """`labels` are (B,) or shares (B, C), `rate` the share of the peak learning rates.

        Where memory runs out, the step is done again with half as many images at once. Raises OutOfMemory.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        taken = self._gradients(images, labels)
        while taken is None:
            self._halve(images)
            taken = self._gradients(images, labels)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return taken

    def parts(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"optimizer": self.optimizer, "scaler": self.scaler}

    def _gradients(self, images: Tensor, labels: Tensor) -> Taken | None:
        """Puts the gradient of the mean loss into the weights; None: out of memory."""
        self.optimizer.zero_grad()
        pieces = max(1, min(math.ceil(len(images) / self.micro), len(images) // self.least))
        total, right = (torch.zeros((), device=self.device) for _ in range(2))
        try:
            for part, own in zip(images.tensor_split(pieces), labels.tensor_split(pieces), strict=True):
                loss, hits = self._loss(part, own)
                self.scaler.scale(loss / len(images)).backward()  # type: ignore[no-untyped-call]
                total += loss.detach() / len(images)
                right += hits
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return Taken(total, right)

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Summed over the images, auxiliary classifiers included; and how many of them the network has right."""
        with self._autocast():
            scores = self.network(images)
            loss = self._cross_entropy(scores, labels)
            if self.aux:
                for auxiliary in self.aux.take():
                    loss = loss + self.aux.weight * self._cross_entropy(auxiliary, labels)
        likeliest = labels if labels.ndim == 1 else labels.argmax(dim=1)
        return loss, (scores.detach().argmax(dim=1) == likeliest).sum()

    def _cross_entropy(self, scores: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.settings.label_smoothing
        return F.cross_entropy(scores.float(), labels, self.classes, reduction="sum", label_smoothing=smoothing)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.settings.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.settings.precision))

    def _halve(self, images: Tensor) -> None:
        """Half as many images at once, twice as many times: the step stays the same, but for batch norm's statistics."""
        if self.micro <= self.least:
            raise OutOfMemory(
                f"not enough memory to train on {self.micro} images of {images.shape[-1]} px at once: set gradient_checkpointing, "
                "take a smaller network or freeze a part of it (freeze_until), or use a device with more memory"
            )
        self.micro = max(self.least, min(self.micro, len(images)) // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.tell(f"out of memory: {self.micro} images at once from here on, in steps of {len(images)}")


def _optimizer(groups: Groups, settings: Effective) -> torch.optim.Optimizer:
    """Fused: all weights in one pass over memory, which is three to four times as fast on a CPU."""
    decay = settings.weight_decay or 0.0
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, settings.lr, MOMENTUM, weight_decay=decay, nesterov=True, fused=True)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, settings.lr, weight_decay=decay, fused=True)
