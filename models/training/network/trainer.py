"""Training a whole network: backbone, then last layer; the weights of its best epoch stay.

    batches --images (B, C, H, W)--> network --cross-entropy--> gradients --accumulate--> step
    every 5 steps the weights join their average; each epoch it is validated, the rest of the run decided, and a checkpoint written

Everything random follows from seed and epoch, and every decision from the history, so a run that was killed goes on to the same result.
"""

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.data.dataset import LoadedDataset
from models.errors import TrainingError
from models.preprocessing import Preprocessing
from models.progress import Stop, never
from models.training.evaluation.evaluate import outputs
from models.training.head.regression import class_weights
from models.training.job.hyperparameters import ResolvedHyperparameters
from models.training.job.job_files import StopReason
from models.training.job.request import Budget, EarlyStopping, Event, OnEvent
from models.training.network import checkpoint as checkpoints
from models.training.network.augment import SEED_STEP
from models.training.network.auxiliary import Auxiliary
from models.training.network.batches import Batches
from models.training.network.early_stopping import reason_to_stop, trade
from models.training.network.freezing import Freezing
from models.training.network.gradient_checkpointing import recomputing
from models.training.network.process_group import ALONE, ProcessGroup
from models.training.network.schedule import share
from models.training.network.step import Groups, Stepper

AVERAGE_EVERY = 5  # steps; averaging every step costs more and gains nothing
REPORT_EVERY_S = 0.4  # between two events

REASONS: tuple[StopReason | None, ...] = (None, "budget", "stopped")  # for which an epoch is cut short
StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class History:
    """What each epoch brought, why there are no more, and the weights of the best."""

    losses: list[float] = field(default_factory=list)  # of training, mean over the epoch
    val_losses: list[float] = field(default_factory=list)  # cross-entropy, without smoothing or class weights
    train_accuracies: list[float | None] = field(
        default_factory=list
    )  # see `train_one_epoch`; None where labels are mixed
    accuracies: list[float] = field(default_factory=list)  # on the validation part
    learning_rates: list[float] = field(default_factory=list)  # of the backbone's last stage, at the epoch's first step
    seconds: list[float] = field(default_factory=list)  # wall time, validation included
    stop_reason: StopReason | None = None  # None: all epochs ran, or more are to come
    trade: str = ""  # what early stopping saved and may have cost, for people
    best: StateDict = field(default_factory=dict)
    kept_epoch: int = 0  # whose weights stay, once the run is over

    @property
    def best_epoch(self) -> int:
        """1-based: of the highest accuracy; of equals that with the lower loss."""
        epochs = range(len(self.accuracies))
        return max(epochs, key=lambda i: (self.accuracies[i], -self.val_losses[i], i)) + 1


def train(
    network: nn.Sequential,
    data: LoadedDataset,
    preprocessing: Preprocessing,
    settings: ResolvedHyperparameters,
    stopping: EarlyStopping,
    budget: Budget,
    checkpoint: Path,
    progress: OnEvent,
    stop: Stop = never,
    aux: Auxiliary | None = None,
) -> History:
    """Train `network`, a backbone and a last layer, in place, on the device it lies on, and leave it with the weights of the epoch that
    is kept: its best, or with `keep` "last" its last.

    Goes on from `checkpoint` where there is one, to the same result. `stop` is asked at each step; when it says yes, or the seconds of the
    budget are over (those of earlier attempts count), the epoch under way is cut short, validated, and the last. `aux` trains beside it.
    Raises TrainingError: a loss that is no longer finite, a checkpoint of another run; OutOfMemory.
    """
    history = run(Trainer(network, data, preprocessing, settings, progress, aux), stopping, budget, checkpoint, stop)
    network.load_state_dict(history.best)
    return history


def run(trainer: "Trainer", stopping: EarlyStopping, budget: Budget, checkpoint: Path, stop: Stop) -> History:
    """All epochs that are left; `best` are the weights to keep."""
    settings = trainer.settings
    with trainer.ready():
        history = trainer.resume(checkpoint)
        limits = RunLimits(budget, stop, spent=sum(history.seconds))
        while not history.stop_reason and len(history.losses) < settings.epochs:
            history = trainer.next_epoch(history, limits)
            history = replace(history, stop_reason=history.stop_reason or _reason(history, stopping, budget, settings))
            trainer.save(checkpoint, history)
            trainer.tell_epoch(history)
    last = stopping.keep == "last"
    return replace(
        history,
        best=trainer.weights() if last else history.best,
        kept_epoch=len(history.losses) if last else history.best_epoch,
        trade=trade(stopping, history.losses, history.val_losses, settings.epochs),
    )


def _reason(
    history: History, stopping: EarlyStopping, budget: Budget, settings: ResolvedHyperparameters
) -> StopReason | None:
    """Why this epoch is the last; None: it is not, or all that were asked for have run."""
    epoch = len(history.losses)
    if epoch < settings.epochs and reason_to_stop(stopping, history.losses, history.val_losses):
        return "early_stopping"
    return "budget" if budget.max_epochs and epoch >= budget.max_epochs else None


class RunLimits:
    """What may end a run at any step."""

    def __init__(self, budget: Budget, stop: Stop, spent: float) -> None:
        left = math.inf if budget.max_seconds is None else budget.max_seconds - spent
        self.deadline = time.monotonic() + left
        self.stop = stop

    def reached(self) -> StopReason | None:
        if self.stop():
            return "stopped"
        return "budget" if time.monotonic() >= self.deadline else None


class Trainer:
    """The network, its average and its optimiser; everything that a checkpoint must hold."""

    def __init__(
        self,
        network: nn.Sequential,
        data: LoadedDataset,
        preprocessing: Preprocessing,
        settings: ResolvedHyperparameters,
        progress: OnEvent,
        aux: Auxiliary | None = None,
        ranks: ProcessGroup = ALONE,
    ) -> None:
        self.device = next(network.parameters()).device
        self.network = network.to(memory_format=torch.channels_last)
        self.average = (
            AveragedModel(network, multi_avg_fn=_ema(settings.ema), use_buffers=True) if settings.ema else None
        )
        self.ranks = ranks
        self.aux = aux.to(self.device) if aux else None
        self.data = data
        self.batches = Batches(data, preprocessing, settings, self.device, ranks)
        self.steps = self.batches.steps  # of an epoch
        self.preprocessing = preprocessing
        self.settings = settings
        self.progress = progress
        self.done = 0.0  # share of the run, as last told
        self.freezing = Freezing(network[0], settings.freeze_until, settings.thaw_every)
        self.stepper = Stepper(network, self.aux, self._groups(), settings, self._class_weights(), self.tell, ranks)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within, the network may be trained: what is hooked into it for that is gone afterwards."""
        with ExitStack() as stack:
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True))
            if self.device.type == "cuda":
                stack.enter_context(deterministic())
            if self.aux:
                stack.enter_context(self.aux.listening(self.network[0]))
            if self.settings.gradient_checkpointing:
                stack.enter_context(recomputing(self.freezing.stages.values()))
            yield

    # One epoch

    def next_epoch(self, history: History, limits: RunLimits) -> History:
        started, epoch = time.monotonic(), len(history.losses) + 1
        rate = self.rate(self.steps * (epoch - 1), history)
        self.ranks.agree(replace(history, best={}))  # the others follow
        loss, train_accuracy, reason = self.train_one_epoch(epoch, history, limits)
        val_loss, accuracy = self.validate()
        if not math.isfinite(val_loss):
            raise self.diverged(epoch)
        longer = replace(
            history,
            losses=[*history.losses, loss],
            val_losses=[*history.val_losses, val_loss],
            train_accuracies=[*history.train_accuracies, train_accuracy],
            accuracies=[*history.accuracies, accuracy],
            learning_rates=[*history.learning_rates, self.settings.lr * rate],
            seconds=[*history.seconds, time.monotonic() - started],
            stop_reason=reason,
        )
        return replace(longer, best=self.weights()) if longer.best_epoch == epoch else longer

    def train_one_epoch(
        self, epoch: int, history: History, limits: RunLimits
    ) -> tuple[float, float | None, StopReason | None]:
        """-> the mean training loss, the training accuracy, and why it ended early. All chance follows from seed and epoch, so a resumed
        run draws the same.

        The accuracy comes from the scores that the steps computed anyway: of augmented images, by weights that moved from step to step,
        dropout on. So it lies below that of the finished epoch on the plain images. None where labels are mixed.
        """
        self.freezing.begin(epoch)
        self.network.train()
        self.freezing.hold()
        self.stepper.begin()
        total, right = (torch.zeros((), device=self.device) for _ in range(2))
        reported = time.monotonic()
        for step, (images, labels) in enumerate(self.batches.epoch(epoch), start=1):
            number = self.steps * (epoch - 1) + step - 1  # from the start of the run
            with self.ranks.own_chance(self.settings.seed + SEED_STEP * number):
                taken = self.stepper.step(images, labels, self.rate(number, history), of=self.batches.images)
            total += taken.loss
            right += taken.right
            if self.average and number % AVERAGE_EVERY == 0:
                self.average.update_parameters(self.network)
            reason = self.ranks.choose(REASONS, limits.reached)
            if reason or step == self.steps or time.monotonic() - reported > REPORT_EVERY_S:
                self.report(epoch, step, total.item() / step)
                reported = time.monotonic()
            if reason:
                break
        mixed = bool(self.settings.mixup or self.settings.cutmix)
        return total.item() / step, None if mixed else right.item() / (step * self.batches.images), reason

    def rate(self, step: int, history: History) -> float:
        """The share of the peak learning rates at `step`, counted from the start of the run."""
        return share(self.settings.scheduler, step, self.steps * self.settings.epochs, history.val_losses)

    # What is told and kept

    def report(self, epoch: int, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise self.diverged(epoch)
        self.done = (epoch - 1 + step / self.steps) / self.settings.epochs
        self.progress(Event("train", self.done, loss=loss))

    def diverged(self, epoch: int) -> TrainingError:
        lr = self.settings.lr
        half = ", or precision bfloat16" if self.settings.precision == "float16" else ""
        return TrainingError(
            f"the loss is no longer finite in epoch {epoch}: the learning rate {lr:g} is too high for this network; "
            f"try lr {lr / 10:g}{half}"
        )

    def tell(self, message: str) -> None:
        self.progress(Event("train", self.done, message=message))

    def tell_epoch(self, history: History) -> None:
        epoch = len(history.losses)
        self.done = 1.0 if history.stop_reason else epoch / self.settings.epochs
        loss, val_loss, accuracy = (series[-1] for series in (history.losses, history.val_losses, history.accuracies))
        self.progress(Event("train", self.done, epoch, loss, val_loss, accuracy))

    def validate(self) -> tuple[float, float]:
        """-> loss and accuracy of the averaged weights on the validation part."""
        rows = self.data.rows["val"]
        labels = self.data.labels[rows]
        scores = outputs(
            self.average or self.network, self.data.pixels, rows, self.preprocessing, 4 * self.stepper.micro
        )
        return F.cross_entropy(scores, labels).item(), int((scores.argmax(dim=1) == labels).sum()) / len(rows)

    def weights(self) -> StateDict:
        """A copy of the weights that are validated: the average, or the network's own."""
        module = self.average.module if self.average else self.network
        return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}

    def save(self, path: Path, history: History) -> None:
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        state = {"identity": self._identity(), "micro": self.stepper.micro, "history": vars(history), **parts}
        checkpoints.save(path, state)

    def resume(self, path: Path) -> History:
        found = checkpoints.load(path, torch.device("cpu"))  # the best weights stay there; the parts copy theirs
        if found is None:
            return History()
        state, file = found
        self._check_identity(state["identity"], file)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.stepper.micro = min(self.stepper.micro, state["micro"])
        history = History(**state["history"])
        self.done = len(history.losses) / self.settings.epochs
        self.freezing.begin(len(history.losses))
        self.tell(f"going on after epoch {len(history.losses)}, from {file.name}")
        return history

    def _parts(self) -> dict[str, Any]:
        parts = {"network": self.network, "average": self.average, "aux": self.aux}
        return {name: part for name, part in parts.items() if part is not None} | self.stepper.parts()

    def _identity(self) -> dict[str, Any]:
        """What must be the same for the result to be the same; the budget and the rule for stopping may change."""
        shapes = [f"{name} {tuple(value.shape)}" for name, value in self.network.state_dict().items()]
        network = hashlib.sha256("\n".join(shapes).encode()).hexdigest()
        preprocessing = self.preprocessing.model_dump_json()
        settings = {f"hyperparameter {name}": value for name, value in self.settings.model_dump().items()}
        return {"dataset": self.data.sha256, "network": network, "preprocessing": preprocessing, **settings}

    def _check_identity(self, found: dict[str, Any], file: Path) -> None:
        own = self._identity()
        other = [name for name in own if own[name] != found.get(name)]
        if other:
            raise TrainingError(
                f"the checkpoint {file.name} was written by another run, with another {', '.join(other)}: "
                "bring that back to go on, or remove the checkpoint to start anew"
            )

    # How it is made

    def _groups(self) -> Groups:
        """A fused step wants gradients of all of a group or of none, and an auxiliary classifier has none while its place is frozen."""
        settings, own = self.settings, [self.network[1:], *(self.aux.classifiers if self.aux else ())]
        groups = [{"params": list(part.parameters()), "peak": settings.head_lr} for part in own]
        return [*self.freezing.groups(settings.lr, settings.layer_decay), *groups]

    def _class_weights(self) -> Tensor | None:
        if self.settings.class_weight == "none":
            return None
        labels = self.data.labels[self.data.rows["train"]]
        return class_weights(labels, len(self.data.classes))


@contextmanager
def deterministic() -> Iterator[None]:
    """Within, torch takes the deterministic one of its algorithms, where an operation has one."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    options: Any = torch.utils.deterministic  # a module whose one attribute has no type
    fills = options.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    options.fill_uninitialized_memory = False  # one more kernel for each new tensor
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", ".*determinis", UserWarning
            )  # one a step: docs/guide/training.md names them
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        options.fill_uninitialized_memory = fills


def _ema(decay: float) -> Callable[[Any, Any, Any], None]:
    """The exponential average with a warm-up, so that early on it does not remember the initial weights."""

    def average(averaged: Any, current: Any, updates: Any) -> None:
        now = min(decay, (1 + int(updates)) / (10 + int(updates)))
        get_ema_multi_avg_fn(now)(averaged, current, updates)  # type: ignore[no-untyped-call]

    return average
