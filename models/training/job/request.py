"""What a training run is asked for, what it decides by itself, and what it tells while it runs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from models.data.samples import Layout, NearDuplicates
from models.decision_rules import PRECISION
from models.errors import TrainingError
from models.files.records import NAME_PATTERN, Record
from models.files.text_encodings import AUTO, check_encoding
from models.runtime.options import Precision

Mode = Literal["head", "finetune", "head_then_finetune", "scratch", "auto"]
Augmentation = Literal["none", "light", "standard", "trivial", "randaugment"]
Optimizer = Literal["sgd", "adam", "adamw"]
Scheduler = Literal["one_cycle", "cosine", "step", "plateau", "constant"]
Phase = Literal["audit", "features", "select", "train", "calibrate", "evaluate", "publish"]

MAX_BASES = 8  # of an ensemble, or to choose from
FOLDS, FOLD_EPOCHS = 3, 3  # of the choice among architectures, where the request says nothing
IMAGES_PER_DEVICE = 16  # of a batch, fewer of which keep no GPU busy


# Of those that may be 0: below these they do nothing, and what computes with them underflows.
LEAST = {
    "weight_decay": 1e-12,
    "label_smoothing": 1e-6,
    "rotation": 0.01,
    "mixup": 0.01,
    "cutmix": 0.01,
    "ema": 1e-6,
    "small_until": 1e-6,
    "test_fraction": 0.001,
}


class _Asked(Record):
    """A part of a request: its numbers are finite, and those that may be 0 are not almost 0."""

    model_config = ConfigDict(allow_inf_nan=False)

    @field_validator(*LEAST, check_fields=False)
    @classmethod
    def _zero_or_enough(cls, given: float | None, info: ValidationInfo) -> float | None:
        least = LEAST[str(info.field_name)]
        if given and given < least:
            raise ValueError(f"{info.field_name} is 0, or at least {least:g}")
        return given


class Hyperparameters(_Asked):
    """Each may be left out, or be "auto": then it follows from the mode and the number of training images, see `effective`."""

    epochs: int | None = Field(
        default=None, ge=1, le=10_000, description="Passes over the training images; in mode head, iterations of L-BFGS"
    )
    batch_size: int | None = Field(default=None, ge=2, le=8192, description="Images in one batch")
    lr: float | None = Field(default=None, ge=1e-12, le=10, description="Peak learning rate")
    head_lr: float | None = Field(
        default=None, ge=1e-12, le=10, description="Peak learning rate of the last layer; otherwise as lr"
    )
    layer_decay: float | None = Field(
        default=None, ge=1e-6, le=1, description="Learning rate of each stage over that of the next one"
    )
    weight_decay: float | None = Field(
        default=None, ge=0, le=10, description="Weight decay; in mode head, the one strength instead of a path of them"
    )
    optimizer: Optimizer | None = Field(default=None, description="Optimizer; sgd has Nesterov momentum")
    scheduler: Scheduler | None = Field(default=None, description="Course of the learning rate")
    label_smoothing: float | None = Field(
        default=None, ge=0, lt=1, description="Share of the target spread over all classes"
    )
    class_weight: Literal["none", "balanced"] | None = Field(
        default=None, description="Whether rare classes count more"
    )
    augmentation: Augmentation | None = Field(
        default=None, description="Random changes to the training images; in mode head, to their copies"
    )
    hflip: bool | None = Field(
        default=None, description="Mirror left and right at random; by default with any augmentation"
    )
    vflip: bool | None = Field(default=None, description="Mirror top and bottom at random")
    rotation: float | None = Field(
        default=None, ge=0, le=180, description="Rotate at random by up to so many degrees to either side"
    )
    mixup: float | None = Field(
        default=None,
        ge=0,
        le=10,
        description="Alpha of the Beta distribution by which two images are blended; 0 is off",
    )
    cutmix: float | None = Field(
        default=None, ge=0, le=10, description="Alpha of the Beta distribution by which a patch is replaced; 0 is off"
    )
    freeze_until: str | None = Field(
        default=None, max_length=200, description="This stage of the network and all before it stay as they are"
    )
    fresh_from: str | None = Field(
        default=None,
        max_length=200,
        description="This stage of the network and all after it are initialised anew instead of borrowed from the base",
    )
    thaw_every: int | None = Field(
        default=None, ge=1, le=10_000, description="Epochs after which one more frozen stage trains, from the last"
    )
    precision: Precision | None = Field(
        default=None, description="Arithmetic of training; by default what the device gains by"
    )
    accumulate: int | None = Field(default=None, ge=1, le=1024, description="Batches to one step")
    gradient_checkpointing: bool | None = Field(
        default=None, description="Compute again in the backward pass instead of keeping: memory for time"
    )
    devices: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="GPUs that share each batch; by default all there are, as long as each gets 16 images of it",
    )
    ema: float | None = Field(
        default=None, ge=0, lt=1, description="Decay of the averaged weights at each update; 0 is no average"
    )
    small_until: float | None = Field(
        default=None, ge=0, le=1, description="Share of the epochs at 3/4 of the image's side, for 0.6 of the cost"
    )
    copies: int | None = Field(
        default=None, ge=0, le=100, description="Mode head: augmented copies of each training image"
    )
    features_from: str | None = Field(
        default=None, max_length=200, description="Mode head: the named module whose pooled output are the features"
    )
    ensemble: Literal["mean", "feature_sum"] | None = Field(
        default=None,
        description="Mode head with several bases: the mean of a head on each, or one head on the sum of their features; "
        "by default mean",
    )
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="Of everything random")

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value != "auto" or name not in cls.model_fields}


class EarlyStopping(_Asked):
    """When a run of epochs ends before its last one.

    Prechelt 1998, Early stopping, but when?: GL is generalisation loss, PQ its quotient with progress, UP successive rises.
    """

    criterion: Literal["patience", "gl", "pq", "up", "none"] = Field(
        default="up", description="What ends the run before its last epoch: patience, or one of Prechelt's three"
    )
    patience: int = Field(
        default=3, ge=1, le=1000, description="Epochs without a better loss; of up, strips in a row that rose"
    )
    alpha: float = Field(default=5.0, ge=1e-6, le=1e6, description="Threshold of gl (percent) and pq")
    strip: int | None = Field(
        default=None, ge=1, le=100, description="Epochs of a strip, for pq and up; by default 2 to 5, an eighth of all"
    )

    keep: Literal["best", "last"] = Field(
        default="best",
        description="Weights of which epoch; last where the base has seen the validation images, whose best epoch says nothing",
    )

    def for_epochs(self, epochs: int) -> "EarlyStopping":
        """With its strip decided: of Prechelt's 5 epochs, `up` could not end a run of fewer than 20."""
        return self.model_copy(update={"strip": self.strip or max(2, min(5, epochs // 8))})


class Budget(_Asked):
    """What a run may cost; where it is reached, the best so far is kept."""

    max_seconds: float | None = Field(
        default=None, ge=1e-6, le=1e9, description="Seconds after which the best so far is kept"
    )
    max_epochs: int | None = Field(
        default=None, ge=1, le=10_000, description="Epochs after which the best so far is kept"
    )
    max_latency_ms: float | None = Field(
        default=None, ge=1e-6, le=1e9, description="Base auto: most milliseconds that one image may take"
    )


class FinetuneRequest(_Asked):
    """One training run. A base is a model of the store (`head`, `finetune`, `head_then_finetune`) or an architecture (`scratch`);
    several models are an ensemble, of several architectures one is chosen, and "auto" chooses among the store's models."""

    dataset: Path = Field(description="Folder, zip or CSV of labelled images")
    name: str = Field(pattern=NAME_PATTERN, description="Name of the model that comes of it")
    base: str | tuple[str, ...] | None = Field(
        default=None,
        description="Model of the store to start from, several for an ensemble, auto to choose one; in mode scratch, an architecture, "
        "or several to choose one by cross-validation. "
        "By default the model that requests get which name none",
    )
    mode: Mode = Field(default="head", description="What is trained")
    folds: int | None = Field(
        default=None,
        ge=2,
        le=10,
        description="Mode scratch with several bases: parts of the training images for cross-validation; by default 3",
    )
    selection_epochs: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Mode scratch with several bases: epochs of each fold's training; by default 3",
    )
    val_fraction: float = Field(
        default=0.2, ge=0.01, le=0.5, description="Share of the images held out, where there is no val/"
    )
    test_fraction: float = Field(
        default=0.0, ge=0, le=0.5, description="Share held out for the final figures, where there is no test/"
    )
    on_bad_file: Literal["skip", "fail"] = Field(
        default="skip", description="What to do with a file that is no usable image"
    )
    encoding: str = Field(
        default=AUTO,
        max_length=40,
        description="Encoding of tables, and of names in zips, that are not UTF-8: cp1252, gbk, cp932 ...; auto refuses to guess",
    )
    near_duplicates: NearDuplicates = Field(
        default="group",
        description="Versions of one photograph: group keeps them on one side of the split, report only lists them, off does not search",
    )
    layout: Layout = Field(
        default="auto",
        description="What the folders are where their names leave it in doubt: classes; splits, that is train, val and test with "
        "class folders in them; or csv, where a CSV at the top has the labels",
    )
    min_per_class: int = Field(
        default=2, ge=2, le=1_000_000, description="Training images that each class needs; one with fewer is refused"
    )
    hyperparameters: Hyperparameters = Hyperparameters()
    early_stopping: EarlyStopping = EarlyStopping()
    budget: Budget = Budget()
    deploy: Literal["never", "manual", "gate", "always"] = Field(
        default="gate",
        description="When the new version is served: gate is where it is not worse than the one that serves",
    )
    accept_precision: float = Field(
        default=PRECISION, ge=0.5, lt=1, description="Share of accepted images that is to be right; sets `decision`"
    )
    metadata: dict[str, str] = Field(default={}, max_length=16, description="Up to 16 texts of your own")
    half: bool = Field(default=False, description="Store the backbone in float16")
    channels: Literal[1, 3] = Field(
        default=3, description="Mode scratch: input channels; 1 for gray images, to which coloured ones are turned"
    )

    @field_validator("dataset", mode="before")
    @classmethod
    def _is_text(cls, given: Any) -> Any:
        if not isinstance(given, str | Path):
            raise ValueError("dataset is a path, as text")
        return given

    @field_validator("encoding")
    @classmethod
    def _is_encoding(cls, given: str) -> str:
        return check_encoding(given)

    @field_validator("hyperparameters", mode="before")
    @classmethod
    def _all_auto(cls, given: Any) -> Any:
        return {} if given == "auto" else given

    @field_validator("metadata")
    @classmethod
    def _short(cls, given: dict[str, str]) -> dict[str, str]:
        if any(len(key) > 64 or len(value) > 512 for key, value in given.items()):
            raise ValueError("a key of metadata has at most 64 characters, a value at most 512")
        return given

    @model_validator(mode="after")
    def _consistent(self) -> "FinetuneRequest":
        self._check_bases()
        given = self.hyperparameters.model_dump(exclude_none=True)
        if self.mode == "head":
            epochs = ["budget.max_epochs"] if self.budget.max_epochs else []
            stopping = ["early_stopping"] if self.early_stopping != EarlyStopping() else []
            self._refuse(sorted(given.keys() - HEAD_FIELDS) + epochs + stopping, "fits a head on fixed features")
            if self.half:
                raise ValueError("mode head shares its base's backbone as it is stored; half is for the other modes")
        elif self.mode != "auto":
            self._refuse(sorted(given.keys() & {"copies", "features_from", "ensemble"}), "trains the network itself")
        if self.mode == "scratch":
            self._refuse(
                sorted(given.keys() & {"freeze_until", "fresh_from", "thaw_every", "layer_decay"}),
                "has no borrowed weights",
            )
        elif self.channels != 3:
            raise ValueError(f"mode {self.mode} has its base's channels; channels is for mode scratch")
        if "thaw_every" in given and "freeze_until" not in given:
            raise ValueError("thaw_every needs freeze_until: nothing is frozen")
        return self

    def _check_bases(self) -> None:
        if isinstance(self.base, tuple):
            if not 2 <= len(self.base) <= MAX_BASES:
                raise ValueError(f"an ensemble has 2 to {MAX_BASES} bases")
            if self.mode == "scratch" and len(set(self.base)) < len(self.base):
                raise ValueError("the bases to choose from must differ: name each architecture once")
            if self.mode not in ("head", "auto", "scratch"):
                raise ValueError(f"mode {self.mode} trains one base; an ensemble of several is trained by mode head")
        if self.mode == "scratch" and self.base in (None, "auto"):
            raise ValueError("mode scratch needs the name of an architecture as its base")
        for name in ("folds", "selection_epochs"):
            if getattr(self, name) is not None and not self.selects_architecture:
                raise ValueError(f"{name} needs mode scratch and several bases, of which cross-validation chooses one")

    @property
    def selects_architecture(self) -> bool:
        """Whether cross-validation chooses among several architectures."""
        return self.mode == "scratch" and isinstance(self.base, tuple)

    @property
    def selection_folds(self) -> int:
        return self.folds or FOLDS

    @property
    def fold_epochs(self) -> int:
        return self.selection_epochs or FOLD_EPOCHS

    def _refuse(self, fields: list[str], why: str) -> None:
        if fields:
            raise ValueError(f"mode {self.mode} {why} and has no {', '.join(fields)}; leave it out or use another mode")


# What means something where only a head is fitted; the augmentation is that of the copies.
HEAD_FIELDS = frozenset(
    {"epochs", "weight_decay", "label_smoothing", "class_weight", "augmentation", "hflip", "vflip", "rotation"}
) | {"copies", "features_from", "ensemble", "seed"}


@dataclass(frozen=True)
class Event:
    """A sign of life: `progress` runs from 0 to 1 within `phase`; `message` is a line for the reader (a bad file, a resumed run)."""

    phase: Phase
    progress: float
    epoch: int | None = None  # 1-based, when it has just ended
    loss: float | None = None  # of training
    val_loss: float | None = None
    accuracy: float | None = None  # on validation
    message: str | None = None


@dataclass(frozen=True)
class ResolvedHyperparameters:
    """The hyperparameters that a run really uses."""

    epochs: int
    batch_size: int
    lr: float
    head_lr: float
    layer_decay: float
    weight_decay: float | None  # None: a path of strengths, chosen by cross-validation
    optimizer: Optimizer
    scheduler: Scheduler
    label_smoothing: float
    class_weight: Literal["none", "balanced"]
    augmentation: Augmentation
    hflip: bool
    vflip: bool
    rotation: float
    mixup: float
    cutmix: float
    freeze_until: str | None
    fresh_from: str | None
    thaw_every: int | None
    precision: Precision
    accumulate: int
    gradient_checkpointing: bool
    devices: int  # that share each batch
    ema: float
    small_until: float
    copies: int
    features_from: str | None
    ensemble: Literal["mean", "feature_sum"]
    seed: int


_DEFAULTS: dict[str, Any] = {
    "layer_decay": 1.0,
    "optimizer": "sgd",
    "scheduler": "one_cycle",
    "class_weight": "none",
    "vflip": False,
    "rotation": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "freeze_until": None,
    "fresh_from": None,
    "thaw_every": None,
    "precision": "float32",
    "accumulate": 1,
    "gradient_checkpointing": False,
    "small_until": 0.0,
    "copies": 0,
    "features_from": None,
    "ensemble": "mean",
}
_TRAINED = {"label_smoothing": 0.1, "augmentation": "light", "ema": 0.95}
_BY_MODE: dict[Mode, dict[str, Any]] = {
    "head": {"epochs": 200, "weight_decay": None, "label_smoothing": 0.0, "augmentation": "none", "ema": 0.0},
    "finetune": {"epochs": 8, "weight_decay": 1e-4, **_TRAINED},
    "head_then_finetune": {"epochs": 8, "weight_decay": 1e-4, **_TRAINED},
    "scratch": {"epochs": 10, "weight_decay": 5e-4, **_TRAINED},
}
_MAX_BATCH: dict[Mode, int] = {"head": 256, "finetune": 64, "head_then_finetune": 64, "scratch": 128}
# Peak learning rate of SGD for one image in the batch; Adam's do not grow with the batch.
_SGD_LR_PER_IMAGE: dict[Mode, float] = {
    "head": 0.0,
    "finetune": 0.01 / 64,
    "head_then_finetune": 0.01 / 64,
    "scratch": 0.15 / 128,
}
_ADAM_LR: dict[Mode, float] = {"head": 0.0, "finetune": 1e-4, "head_then_finetune": 1e-4, "scratch": 1e-3}


def effective(
    request: FinetuneRequest, mode: Mode, train_images: int, precision: Precision = "float32", devices: int = 1
) -> ResolvedHyperparameters:
    """The request's hyperparameters with every gap filled; a batch is never larger than the training part.

    `mode` is the request's, or what `auto` has become; `precision` is what the device gains by; `devices` is how many there are.
    Raises TrainingError: more devices asked for than there are, or than the batch has images for.
    """
    given = request.hyperparameters.model_dump(exclude_none=True)
    if request.mode == "auto" and mode == "head":  # `epochs` were meant for a network
        given = {name: value for name, value in given.items() if name in HEAD_FIELDS - {"epochs"}}
    chosen = {**_DEFAULTS, **_BY_MODE[mode], "precision": precision, **given}
    chosen["batch_size"] = min(given.get("batch_size") or _batch_size(mode, train_images), max(train_images, 2))
    chosen["devices"] = 1 if mode == "head" else _devices(given.get("devices"), devices, chosen["batch_size"])
    chosen.setdefault("hflip", chosen["augmentation"] != "none")
    images = chosen["batch_size"] * chosen["accumulate"]
    chosen.setdefault("lr", _SGD_LR_PER_IMAGE[mode] * images if chosen["optimizer"] == "sgd" else _ADAM_LR[mode])
    chosen.setdefault("head_lr", chosen["lr"])
    if request.budget.max_epochs and mode != "head":
        chosen["epochs"] = min(chosen["epochs"], request.budget.max_epochs)
    return ResolvedHyperparameters(**chosen)


def _batch_size(mode: Mode, train_images: int) -> int:
    """The largest power of two that leaves some 20 steps an epoch, from 8 up to what the mode likes."""
    size = 8
    while size * 2 <= min(_MAX_BATCH[mode], train_images // 20):
        size *= 2
    return size


def _devices(asked: int | None, there: int, batch_size: int) -> int:
    """A batch norm sees a device's own images, and wants more than a few."""
    if asked is None:
        return max(1, min(there, batch_size // IMAGES_PER_DEVICE))
    if asked > there:
        raise TrainingError(
            f"devices is {asked}, and the trainer sees {there}: leave it out, or ask for at most {there}"
        )
    if batch_size < 2 * asked:
        raise TrainingError(f"a batch of {batch_size} is too small for {asked} devices, of 2 images at least each")
    return asked


OnEvent = Callable[[Event], None]
