"""Trains a whole network, a backbone and its last layer; it keeps the weights of the best epoch.

    batches --images (B, C, H, W)--> network --cross-entropy--> gradients --accumulate--> step
    every 5 steps the weights join their average; after each epoch: validate, decide whether to stop, write a checkpoint

Everything random follows from seed and epoch, and every decision from the history, so a run that was killed resumes to the same result.
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


@dataclass(frozen=True, eq=False)
class TrainingPlan:
    """What a network is trained on, how, and for how long."""

    data: LoadedDataset
    preprocessing: Preprocessing
    settings: ResolvedHyperparameters
    stopping: EarlyStopping
    budget: Budget
    checkpoint: Path
    aux: Auxiliary | None = None  # trained beside the network


@dataclass(frozen=True)
class History:
    """The figures of each epoch, why there are no more, and the weights of the best epoch."""

    losses: list[float] = field(default_factory=list)  # of training, mean over the epoch
    val_losses: list[float] = field(default_factory=list)  # cross-entropy, without smoothing or class weights
    train_accuracies: list[float | None] = field(default_factory=list)  # see `train_one_epoch`
    accuracies: list[float] = field(default_factory=list)  # on the validation part
    learning_rates: list[float] = field(default_factory=list)  # of the backbone's last stage, at the epoch's first step
    seconds: list[float] = field(default_factory=list)  # wall time, including validation
    stop_reason: StopReason | None = None  # None: all epochs ran, or more are to come
    trade: str = ""  # what early stopping saved and may have cost, as text for the report
    best: StateDict = field(default_factory=dict)
    kept_epoch: int = 0  # the epoch whose weights are kept, set at the end of the run

    @property
    def best_epoch(self) -> int:
        """The epoch (from 1) with the highest accuracy; among equals the one with the lower loss."""
        epochs = range(len(self.accuracies))
        return max(epochs, key=lambda i: (self.accuracies[i], -self.val_losses[i], i)) + 1


def train(network: nn.Sequential, plan: TrainingPlan, progress: OnEvent, stop: Stop = never) -> History:
    """Train `network`, a backbone and a last layer, in place and on its device, and leave it with the weights of the best epoch, or of
    the last one with `keep` "last".

    Resumes from the plan's checkpoint if there is one, with the same result. `stop` is asked at each step. When it returns True, or the
    budget's seconds are used up (earlier attempts count), the current epoch is cut short, validated, and is the last.
    Raises TrainingError (a loss that is no longer finite, a checkpoint of another run) and OutOfMemory.
    """
    history = run(Trainer(network, plan, progress), stop)
    network.load_state_dict(history.best)
    return history


def run(trainer: "Trainer", stop: Stop) -> History:
    """Train all epochs that are left; `best` then holds the weights to keep."""
    plan = trainer.plan
    with trainer.ready():
        history = trainer.resume()
        limits = RunLimits(plan.budget, stop, spent=sum(history.seconds))
        while not history.stop_reason and len(history.losses) < plan.settings.epochs:
            history = trainer.next_epoch(history, limits)
            history = replace(history, stop_reason=history.stop_reason or _stop_reason(history, plan))
            trainer.save(history)
            trainer.report_epoch(history)
    last = plan.stopping.keep == "last"
    return replace(
        history,
        best=trainer.weights() if last else history.best,
        kept_epoch=len(history.losses) if last else history.best_epoch,
        trade=trade(plan.stopping, history.losses, history.val_losses, plan.settings.epochs),
    )


def _stop_reason(history: History, plan: TrainingPlan) -> StopReason | None:
    """Why this epoch is the last; None if it is not, or if all epochs have run."""
    epoch, most = len(history.losses), plan.budget.max_epochs
    if epoch < plan.settings.epochs and reason_to_stop(plan.stopping, history.losses, history.val_losses):
        return "early_stopping"
    return "budget" if most and epoch >= most else None


class RunLimits:
    """The limits that may end a run at any step."""

    def __init__(self, budget: Budget, stop: Stop, spent: float) -> None:
        left = math.inf if budget.max_seconds is None else budget.max_seconds - spent
        self.deadline = time.monotonic() + left
        self.stop = stop

    def reached(self) -> StopReason | None:
        if self.stop():
            return "stopped"
        return "budget" if time.monotonic() >= self.deadline else None


class Trainer:
    """The network, its average and its optimiser: everything that a checkpoint must hold."""

    def __init__(
        self, network: nn.Sequential, plan: TrainingPlan, progress: OnEvent, ranks: ProcessGroup = ALONE
    ) -> None:
        settings = self.settings = plan.settings
        self.plan, self.data, self.progress, self.ranks = plan, plan.data, progress, ranks
        self.device = next(network.parameters()).device
        self.network = network.to(memory_format=torch.channels_last)
        self.average = (
            AveragedModel(network, multi_avg_fn=_ema(settings.ema), use_buffers=True) if settings.ema else None
        )
        self.aux = plan.aux.to(self.device) if plan.aux else None
        self.batches = Batches(plan.data, plan.preprocessing, settings, self.device, ranks)
        self.steps = self.batches.steps  # per epoch
        self.done = 0.0  # share of the run, as last reported
        self.freezing = Freezing(network[0], settings.freeze_until, settings.thaw_every)
        self.stepper = Stepper(network, self.aux, self._groups(), settings, self._class_weights(), self.tell, ranks)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Prepare the network for training, and undo it at the end: deterministic algorithms, hooks, recomputed stages."""
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
        self.ranks.agree(replace(history, best={}))  # starts the epoch on the other ranks, see `distributed.follow`
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
        """Return the mean training loss, the training accuracy, and why the epoch ended early (None: it did not).

        All randomness follows from seed and epoch, so a resumed run draws the same. The accuracy comes from the scores that the steps
        computed anyway, on augmented images, with dropout, while the weights changed; so it is below the accuracy of the finished epoch on
        the plain images. It is None where labels are mixed.
        """
        self.freezing.begin(epoch)
        self.network.train()
        self.freezing.hold()
        self.stepper.begin()
        total, right = (torch.zeros((), device=self.device) for _ in range(2))
        reported = time.monotonic()
        for step, (images, labels) in enumerate(self.batches.epoch(epoch), start=1):
            number = self.steps * (epoch - 1) + step - 1  # counted from the start of the run
            with self.ranks.own_chance(self.settings.seed + SEED_STEP * number):
                result = self.stepper.step(images, labels, self.rate(number, history), of=self.batches.images)
            total += result.loss
            right += result.right
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
        """Return the share of the peak learning rates at `step`, counted from the start of the run."""
        return share(self.settings.scheduler, step, self.steps * self.settings.epochs, history.val_losses)

    # Reports and checkpoints

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

    def report_epoch(self, history: History) -> None:
        epoch = len(history.losses)
        self.done = 1.0 if history.stop_reason else epoch / self.settings.epochs
        loss, val_loss, accuracy = (series[-1] for series in (history.losses, history.val_losses, history.accuracies))
        self.progress(Event("train", self.done, epoch, loss, val_loss, accuracy))

    def validate(self) -> tuple[float, float]:
        """Return loss and accuracy on the validation part, with the averaged weights."""
        rows = self.data.rows["val"]
        labels = self.data.labels[rows]
        scores = outputs(
            self.average or self.network, self.data.pixels, rows, self.plan.preprocessing, 4 * self.stepper.micro
        )
        return F.cross_entropy(scores, labels).item(), int((scores.argmax(dim=1) == labels).sum()) / len(rows)

    def weights(self) -> StateDict:
        """Return a copy of the weights that are validated: the average, or the network's own."""
        module = self.average.module if self.average else self.network
        return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}

    def save(self, history: History) -> None:
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        state = {"identity": self._identity(), "micro": self.stepper.micro, "history": vars(history), **parts}
        checkpoints.save(self.plan.checkpoint, state)

    def resume(self) -> History:
        """Load the checkpoint, if there is one. Raises TrainingError where it was written by another run."""
        found = checkpoints.load(self.plan.checkpoint, torch.device("cpu"))  # the best weights stay on the CPU
        if found is None:
            return History()
        state, file = found
        own, saved = self._identity(), state["identity"]
        if other := [name for name in own if own[name] != saved.get(name)]:
            raise TrainingError(
                f"the checkpoint {file.name} was written by another run, with another {', '.join(other)}: "
                "bring that back to go on, or remove the checkpoint to start anew"
            )
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
        """Return what must be equal for a resumed run to give the same result; the budget and the rule for stopping may change."""
        shapes = [f"{name} {tuple(value.shape)}" for name, value in self.network.state_dict().items()]
        network = hashlib.sha256("\n".join(shapes).encode()).hexdigest()
        preprocessing = self.plan.preprocessing.model_dump_json()
        settings = {f"hyperparameter {name}": value for name, value in self.settings.model_dump().items()}
        return {"dataset": self.data.sha256, "network": network, "preprocessing": preprocessing, **settings}

    def _groups(self) -> Groups:
        """Return the optimiser's groups; one for each auxiliary classifier, because a fused step needs gradients for all of a group or for
        none, and a classifier has none while the module that it reads is frozen."""
        settings, heads = self.settings, [self.network[1:], *(self.aux.classifiers if self.aux else ())]
        groups = [{"params": list(head.parameters()), "peak": settings.head_lr} for head in heads]
        return [*self.freezing.groups(settings.lr, settings.layer_decay), *groups]

    def _class_weights(self) -> Tensor | None:
        if self.settings.class_weight == "none":
            return None
        return class_weights(self.data.labels[self.data.rows["train"]], len(self.data.classes))


@contextmanager
def deterministic() -> Iterator[None]:
    """Make torch use deterministic algorithms, where an operation has one."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    options: Any = torch.utils.deterministic  # a module whose one attribute has no type
    fills = options.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    options.fill_uninitialized_memory = False  # filling takes one more kernel for each new tensor
    try:
        with warnings.catch_warnings():
            # One warning a step; docs/guide/training.md names the operations.
            warnings.filterwarnings("ignore", ".*determinis", UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        options.fill_uninitialized_memory = fills


def _ema(decay: float) -> Callable[[Any, Any, Any], None]:
    """Return the exponential average with a warm-up, so that the initial weights are soon forgotten."""

    def average(averaged: Any, current: Any, updates: Any) -> None:
        now = min(decay, (1 + int(updates)) / (10 + int(updates)))
        get_ema_multi_avg_fn(now)(averaged, current, updates)  # type: ignore[no-untyped-call]

    return average
