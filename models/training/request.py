"""What a training run is asked for, what it decides by itself, and what it tells while it runs."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from models.classifier import NAME_PATTERN, Record

Mode = Literal["head", "finetune", "scratch"]
Augmentation = Literal["none", "light"]


class Hyperparameters(Record):
    """Each may be left out (None): then it follows from the mode and the number of training images, see `effective`."""

    epochs: int | None = Field(
        default=None, ge=1, le=10_000
    )  # in mode `head`: iterations of L-BFGS, each a pass over the features
    batch_size: int | None = Field(default=None, ge=2, le=8192)
    lr: float | None = Field(default=None, gt=0, le=10)  # the peak of the one-cycle schedule
    weight_decay: float | None = Field(default=None, ge=0, le=10)
    label_smoothing: float | None = Field(default=None, ge=0, lt=1)
    augmentation: Augmentation | None = None
    ema: float | None = Field(default=None, ge=0, lt=1)  # decay of the averaged weights at each update; 0 is no average
    small_until: float | None = Field(
        default=None, ge=0, le=1
    )  # share of the epochs at three quarters of the side: 0.6 of the cost
    seed: int = Field(default=0, ge=0, le=2**31 - 1)


class FinetuneRequest(Record):
    """One training run. `base` is a model of the store (`head`, `finetune`) or an architecture (`scratch`)."""

    dataset: Path
    name: str = Field(pattern=NAME_PATTERN)
    base: str = "resnet18"
    mode: Mode = "head"
    val_fraction: float = Field(default=0.2, ge=0.01, le=0.5)
    on_bad_file: Literal["skip", "fail"] = "skip"
    hyperparameters: Hyperparameters = Hyperparameters()
    half: bool = False  # float16 backbone on disk

    @model_validator(mode="after")
    def _consistent(self) -> "FinetuneRequest":
        given = self.hyperparameters.model_dump(exclude_none=True)
        unused = [field for field in ("lr", "augmentation", "ema", "small_until") if field in given]
        if self.mode == "head" and unused:
            raise ValueError(
                f"mode head fits a head on fixed features and has no {', '.join(unused)}; leave it out or use mode finetune"
            )
        if self.mode == "head" and self.half:
            raise ValueError(
                "mode head shares its base's backbone as it is stored; half is for the modes finetune and scratch"
            )
        return self


@dataclass(frozen=True)
class Event:
    """A sign of life: `progress` runs from 0 to 1 within `phase`; `message` is a line for the reader (a bad file, a resumed run)."""

    phase: Literal["decode", "features", "train", "evaluate", "publish"]
    progress: float
    epoch: int | None = None  # 1-based, when it has just ended
    loss: float | None = None
    accuracy: float | None = None
    message: str | None = None


# Where one default fits all sizes of dataset. lr is per image in the batch: the peak is lr_per_image * batch_size.
_DEFAULTS: dict[Mode, dict[str, float | str]] = {
    "head": {
        "epochs": 100,
        "weight_decay": 1e-3,
        "label_smoothing": 0.0,
        "augmentation": "none",
        "ema": 0.0,
        "small_until": 0.0,
    },
    "finetune": {
        "epochs": 8,
        "weight_decay": 1e-4,
        "label_smoothing": 0.1,
        "augmentation": "light",
        "ema": 0.95,
        "small_until": 0.0,
    },
    "scratch": {
        "epochs": 10,
        "weight_decay": 5e-4,
        "label_smoothing": 0.1,
        "augmentation": "light",
        "ema": 0.95,
        "small_until": 0.0,
    },
}
_LR_PER_IMAGE: dict[Mode, float] = {"head": 0.0, "finetune": 0.01 / 64, "scratch": 0.15 / 128}
_MAX_BATCH: dict[Mode, int] = {"head": 256, "finetune": 64, "scratch": 128}


@dataclass(frozen=True)
class Effective:
    """The hyperparameters that a run really uses."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    label_smoothing: float
    augmentation: Augmentation
    ema: float
    small_until: float
    seed: int


def effective(request: FinetuneRequest, train_images: int) -> Effective:
    """The request's hyperparameters with every gap filled; a batch is never larger than the training part."""
    given = request.hyperparameters.model_dump(exclude_none=True)
    batch_size = min(given.get("batch_size") or _batch_size(request.mode, train_images), max(train_images, 2))
    lr = _LR_PER_IMAGE[request.mode] * batch_size
    return Effective(**{"lr": lr, **_DEFAULTS[request.mode], **given, "batch_size": batch_size})


def _batch_size(mode: Mode, train_images: int) -> int:
    """The largest power of two that leaves some 20 steps an epoch, from 8 up to what the mode likes."""
    size = 8
    while size * 2 <= min(_MAX_BATCH[mode], train_images // 20):
        size *= 2
    return size


def command(request: FinetuneRequest) -> str:
    """The command line that asks for this run, with the dataset by its name alone: it goes into the lineage."""
    words = [
        "imago",
        "finetune",
        request.dataset.resolve().name,
        "--name",
        request.name,
        "--base",
        request.base,
        "--mode",
        request.mode,
    ]
    words += ["--val-fraction", str(request.val_fraction), "--on-bad-file", request.on_bad_file]
    for field, value in request.hyperparameters.model_dump(exclude_none=True).items():
        words += [f"--{field.replace('_', '-')}", str(value)]
    return shlex.join([*words, "--half"] if request.half else words)
