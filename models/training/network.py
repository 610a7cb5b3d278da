"""Training a whole network: SGD with Nesterov momentum, a linear one-cycle learning rate, averaged weights, the best epoch kept.

rows --shuffle--> batch uint8 (B, C, H, W) --augment, normalise--> network --cross-entropy--> SGD step --every 5 steps--> average
each epoch: the averaged weights are validated, and everything is written to the checkpoint
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.classifier import Preprocessing, normalise
from models.errors import TrainingError
from models.training.augment import flips, light
from models.training.dataset import Dataset
from models.training.evaluate import outputs
from models.training.request import Effective, Event

MOMENTUM = 0.9
AVERAGE_EVERY = 5  # steps; averaging every step costs more and gains nothing
WARM_UP = 0.2  # of all steps
REPORT_EVERY = 20  # steps between two events

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class History:
    """What each epoch brought, and the weights of the best."""

    losses: list[float]  # training loss, mean over the epoch
    accuracies: list[float]  # on the validation part
    seconds: list[float]  # wall time, validation included
    best: Weights

    @property
    def best_epoch(self) -> int:
        """1-based. Of equal epochs the later, which has seen the lower learning rate."""
        return max(range(len(self.accuracies)), key=lambda i: (self.accuracies[i], i)) + 1

    def as_dict(self) -> dict[str, Any]:
        """For the model's metrics: all but the weights."""
        rounded = {
            name: [round(value, 4) for value in getattr(self, name)] for name in ("losses", "accuracies", "seconds")
        }
        return {"epochs": len(self.losses), "best_epoch": self.best_epoch, "history": rounded}


def train(
    network: nn.Module,
    data: Dataset,
    preprocessing: Preprocessing,
    settings: Effective,
    checkpoint: Path,
    progress: Callable[[Event], None],
) -> History:
    """Train `network` in place, on the device it lies on, and leave it with the weights of its best epoch.

    Goes on from `checkpoint` where there is one, to the same result. Raises TrainingError when the loss is no longer finite.
    """
    trainer = Trainer(network, data, preprocessing, settings, progress)
    history = trainer.resume(checkpoint)
    for epoch in range(len(history.losses) + 1, settings.epochs + 1):
        started = time.monotonic()
        loss = trainer.train_one_epoch(epoch)
        accuracy = trainer.validate()
        best = accuracy >= max(history.accuracies, default=0.0)
        history = History(
            [*history.losses, loss],
            [*history.accuracies, accuracy],
            [*history.seconds, time.monotonic() - started],
            trainer.weights() if best else history.best,
        )
        trainer.save(checkpoint, history)
        progress(Event("train", epoch / settings.epochs, epoch, loss, accuracy))
    network.load_state_dict(history.best)
    return history


class Trainer:
    """The network, its average and its optimiser; everything that a checkpoint must hold."""

    def __init__(
        self,
        network: nn.Module,
        data: Dataset,
        preprocessing: Preprocessing,
        settings: Effective,
        progress: Callable[[Event], None],
    ) -> None:
        self.network = network.to(memory_format=torch.channels_last)
        self.average = (
            AveragedModel(network, multi_avg_fn=_ema(settings.ema), use_buffers=True) if settings.ema else None
        )
        self.optimizer = torch.optim.SGD(
            network.parameters(), settings.lr, MOMENTUM, weight_decay=settings.weight_decay, nesterov=True
        )
        self.data = data
        self.preprocessing = preprocessing
        self.settings = settings
        self.progress = progress
        self.steps = len(data.rows["train"]) // settings.batch_size  # the last partial batch is left out
        self.device = next(network.parameters()).device

    def train_one_epoch(self, epoch: int) -> float:
        """-> the mean training loss. All chance of the epoch follows from seed and epoch, so a resumed run draws the same."""
        torch.manual_seed(self.settings.seed + 1_000_003 * epoch)
        self.network.train()
        rows = self.data.rows["train"]
        order = rows[torch.randperm(len(rows))][: self.steps * self.settings.batch_size]
        flip = flips(len(self.data.pixels), self.settings.seed, epoch)
        small = epoch <= round(self.settings.small_until * self.settings.epochs)
        total = torch.zeros((), device=self.device)
        for step, batch in enumerate(torch.split(order, self.settings.batch_size)):
            images = self.images(batch, flip[batch], small)
            total += self.train_one_batch(images, self.data.labels[batch], (epoch - 1) * self.steps + step)
            if step % REPORT_EVERY == 0 or step + 1 == self.steps:
                self.report(epoch, step + 1, total.item())
        return total.item() / self.steps

    def images(self, rows: Tensor, flip: Tensor, small: bool) -> Tensor:
        """The images at `rows` (B,), mirrored where `flip` (B,), as the network wants them: float32 (B, C, H, W) on its device.

        `small` brings them to three quarters of the side: in the epochs of a high learning rate, as good as the full size.
        """
        pixels = self.data.pixels[rows]
        if self.settings.augmentation == "light":
            pixels = light(pixels, flip)
        images = normalise(pixels.to(self.device), self.preprocessing)
        if small:
            images = F.interpolate(images, scale_factor=0.75, mode="bilinear", antialias=True)
        return images.contiguous(memory_format=torch.channels_last)

    def train_one_batch(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """One step of SGD; `step` counts from the start of the run. -> the loss, ()"""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * one_cycle(step, self.steps * self.settings.epochs)
        self.optimizer.zero_grad()
        loss = F.cross_entropy(
            self.network(images), labels.to(self.device), label_smoothing=self.settings.label_smoothing
        )
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.average and step % AVERAGE_EVERY == 0:
            self.average.update_parameters(self.network)
        return loss.detach()

    def report(self, epoch: int, steps: int, total_loss: float) -> None:
        if total_loss != total_loss or abs(total_loss) == float("inf"):
            raise TrainingError(
                f"the loss is no longer finite in epoch {epoch}: the learning rate {self.settings.lr:g} is too high for this network; "
                f"try --lr {self.settings.lr / 10:g}"
            )
        self.progress(Event("train", (epoch - 1 + steps / self.steps) / self.settings.epochs, loss=total_loss / steps))

    def validate(self) -> float:
        """-> accuracy of the averaged weights on the validation part."""
        rows = self.data.rows["val"]
        scores = outputs(self.average or self.network, self.data.pixels, rows, self.preprocessing)
        return int((scores.argmax(dim=1) == self.data.labels[rows]).sum()) / len(rows)

    def weights(self) -> Weights:
        """A copy of the weights that are validated: the average, or the network's own."""
        module = self.average.module if self.average else self.network
        return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}

    def save(self, path: Path, history: History) -> None:
        """Write everything of the run, whole or not at all."""
        state = {
            "network": self.network.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "history": vars(history),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def resume(self, path: Path) -> History:
        if not path.exists():
            return History([], [], [], {})
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        self.network.load_state_dict(state["network"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        history = History(**state["history"])
        done = len(history.losses)
        self.progress(
            Event("train", done / self.settings.epochs, message=f"going on after epoch {done}, from {path.name}")
        )
        return history


def one_cycle(step: int, total: int) -> float:
    """The share of the peak learning rate at `step` of `total`: a tenth, up to 1 after a fifth of the steps, down to 0, both linear."""
    return min(0.1 + 0.9 * step / (WARM_UP * total), (total - step) / (total - WARM_UP * total))


def _ema(decay: float) -> Callable[[Any, Any, Any], None]:
    """The exponential average with a warm-up, so that early on it does not remember the initial weights."""

    def average(averaged: Any, current: Any, updates: Any) -> None:
        now = min(decay, (1 + int(updates)) / (10 + int(updates)))
        get_ema_multi_avg_fn(now)(averaged, current, updates)  # type: ignore[no-untyped-call]

    return average
