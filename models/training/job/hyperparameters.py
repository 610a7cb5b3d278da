"""The hyperparameters of a request, and those that a run uses."""

from typing import Annotated, Any, Generic, Literal, Never, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo, model_validator

from models.errors import TrainingError
from models.files.records import Record
from models.runtime.options import Precision

Mode = Literal["head", "finetune", "head_then_finetune", "scratch", "auto"]
Augmentation = Literal["none", "light", "standard", "trivial", "randaugment"]
Optimizer = Literal["sgd", "adam", "adamw"]
Scheduler = Literal["one_cycle", "cosine", "step", "plateau", "constant"]

IMAGES_PER_DEVICE = 16  # of a batch: fewer do not keep a GPU busy

Gap = TypeVar("Gap")  # stands for a value that is left out: None in a request, Never in a run
LEFT_OUT: Any = None


class FiniteRecord(Record):
    """A record whose numbers are finite."""

    model_config = ConfigDict(allow_inf_nan=False)


def zero_or(least: float) -> AfterValidator:
    """Refuses numbers between 0 and `least`: they have no effect, and computations with them underflow."""

    def check(value: float, info: ValidationInfo) -> float:
        if 0 < value < least:
            raise ValueError(f"{info.field_name} is 0, or at least {least:g}")
        return value

    return AfterValidator(check)


class _Fields(FiniteRecord, Generic[Gap]):
    epochs: int | Gap = Field(
        default=LEFT_OUT,
        ge=1,
        le=10_000,
        description="Passes over the training images; in mode head, iterations of L-BFGS",
    )
    batch_size: int | Gap = Field(default=LEFT_OUT, ge=2, le=8192, description="Images in one batch")
    lr: float | Gap = Field(default=LEFT_OUT, ge=1e-12, le=10, description="Peak learning rate")
    head_lr: float | Gap = Field(
        default=LEFT_OUT, ge=1e-12, le=10, description="Peak learning rate of the last layer; by default that of lr"
    )
    layer_decay: float | Gap = Field(
        default=LEFT_OUT,
        ge=1e-6,
        le=1,
        description="Factor by which each stage's learning rate is below that of the next stage",
    )
    weight_decay: Annotated[float, Field(ge=0, le=10), zero_or(1e-12)] | None = Field(
        default=None, description="Weight decay; in mode head, the one to use instead of a choice by cross-validation"
    )
    optimizer: Optimizer | Gap = Field(default=LEFT_OUT, description="Optimizer; sgd has Nesterov momentum")
    scheduler: Scheduler | Gap = Field(default=LEFT_OUT, description="Learning-rate schedule")
    label_smoothing: Annotated[float, Field(ge=0, lt=1), zero_or(1e-6)] | Gap = Field(
        default=LEFT_OUT, description="Share of the target spread over all classes"
    )
    class_weight: Literal["none", "balanced"] | Gap = Field(
        default=LEFT_OUT, description="balanced: rare classes weigh more in the loss"
    )
    augmentation: Augmentation | Gap = Field(
        default=LEFT_OUT, description="Random changes to the training images; in mode head, to their copies"
    )
    hflip: bool | Gap = Field(
        default=LEFT_OUT, description="Mirror left and right at random; by default with any augmentation"
    )
    vflip: bool | Gap = Field(default=LEFT_OUT, description="Mirror top and bottom at random")
    rotation: Annotated[float, Field(ge=0, le=180), zero_or(0.01)] | Gap = Field(
        default=LEFT_OUT, description="Largest random rotation to either side, in degrees"
    )
    mixup: Annotated[float, Field(ge=0, le=10), zero_or(0.01)] | Gap = Field(
        default=LEFT_OUT,
        description="Mixup: alpha of the Beta distribution of the blending weight; 0 turns it off",
    )
    cutmix: Annotated[float, Field(ge=0, le=10), zero_or(0.01)] | Gap = Field(
        default=LEFT_OUT,
        description="CutMix: alpha of the Beta distribution of the patch area; 0 turns it off",
    )
    freeze_until: str | None = Field(
        default=None, max_length=200, description="Freeze the network up to and including this stage"
    )
    fresh_from: str | None = Field(
        default=None,
        max_length=200,
        description="Initialise this stage of the network and all later ones anew, instead of taking the base's weights",
    )
    thaw_every: int | None = Field(
        default=None,
        ge=1,
        le=10_000,
        description="Unfreeze one more stage, from the last to the first, after each so many epochs",
    )
    precision: Precision | Gap = Field(
        default=LEFT_OUT, description="Arithmetic of training; by default the fastest for the device"
    )
    accumulate: int | Gap = Field(default=LEFT_OUT, ge=1, le=1024, description="Batches per optimizer step")
    gradient_checkpointing: bool | Gap = Field(
        default=LEFT_OUT,
        description="Recompute activations in the backward pass instead of storing them: less memory, more time",
    )
    devices: int | Gap = Field(
        default=LEFT_OUT,
        ge=1,
        le=64,
        description="GPUs that share each batch; by default as many as get at least 16 images each",
    )
    ema: Annotated[float, Field(ge=0, lt=1), zero_or(1e-6)] | Gap = Field(
        default=LEFT_OUT,
        description="Decay of the exponential moving average of the weights, per update; 0 turns it off",
    )
    small_until: Annotated[float, Field(ge=0, le=1), zero_or(1e-6)] | Gap = Field(
        default=LEFT_OUT, description="Share of the epochs that train at 3/4 of the image size, at 0.6 of the cost"
    )
    copies: int | Gap = Field(
        default=LEFT_OUT, ge=0, le=100, description="Mode head: augmented copies of each training image"
    )
    features_from: str | None = Field(
        default=None, max_length=200, description="Mode head: name of the module whose pooled output is the features"
    )
    ensemble: Literal["mean", "feature_sum"] | Gap = Field(
        default=LEFT_OUT,
        description="Mode head with several bases: the mean of a head on each, or one head on the sum of their features; "
        "by default mean",
    )
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="Seed of all random numbers")


class Hyperparameters(_Fields[None]):
    """As asked for. A field that is left out, or is "auto", follows from the mode and the number of training images, see `resolve`."""

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value != "auto" or name not in cls.model_fields}


class ResolvedHyperparameters(_Fields[Never]):
    """As used by a run. `weight_decay` None: cross-validation chooses from a path of strengths (mode head)."""


# The fields that mode head uses; the augmentation is that of the copies.
HEAD_FIELDS = frozenset(
    {"epochs", "weight_decay", "label_smoothing", "class_weight", "augmentation", "hflip", "vflip", "rotation"}
) | {"copies", "features_from", "ensemble", "seed"}

_DEFAULTS: dict[str, Any] = {
    "layer_decay": 1.0,
    "optimizer": "sgd",
    "scheduler": "one_cycle",
    "class_weight": "none",
    "vflip": False,
    "rotation": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "accumulate": 1,
    "gradient_checkpointing": False,
    "small_until": 0.0,
    "copies": 0,
    "ensemble": "mean",
}
_TRAINED = {"label_smoothing": 0.1, "augmentation": "light", "ema": 0.95}
_BY_MODE: dict[Mode, dict[str, Any]] = {
    "head": {"epochs": 200, "label_smoothing": 0.0, "augmentation": "none", "ema": 0.0},
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


def resolve(
    given: dict[str, Any], mode: Mode, train_images: int, precision: Precision, devices: int
) -> ResolvedHyperparameters:
    """Fills the gaps; a batch is never larger than the training part.

    `precision`: the fastest that the device gains from. `devices`: the number of GPUs that there are. Raises TrainingError where more
    are asked for, or more than the batch has images for.
    """
    chosen = {**_DEFAULTS, **_BY_MODE[mode], "precision": precision, **given}
    chosen["batch_size"] = min(given.get("batch_size") or _batch_size(mode, train_images), max(train_images, 2))
    chosen["devices"] = 1 if mode == "head" else _devices(given.get("devices"), devices, chosen["batch_size"])
    chosen.setdefault("hflip", chosen["augmentation"] != "none")
    images = chosen["batch_size"] * chosen["accumulate"]
    chosen.setdefault("lr", _SGD_LR_PER_IMAGE[mode] * images if chosen["optimizer"] == "sgd" else _ADAM_LR[mode])
    chosen.setdefault("head_lr", chosen["lr"])
    return ResolvedHyperparameters.model_construct(**chosen)  # not validated again: in mode head, lr is 0


def _batch_size(mode: Mode, train_images: int) -> int:
    """Returns the largest power of two that leaves at least 20 steps per epoch, from 8 to the mode's largest."""
    size = 8
    while size * 2 <= min(_MAX_BATCH[mode], train_images // 20):
        size *= 2
    return size


def _devices(asked: int | None, there: int, batch_size: int) -> int:
    """Each device computes batch norm over its own images, so it needs more than a few of them."""
    if asked is None:
        return max(1, min(there, batch_size // IMAGES_PER_DEVICE))
    if asked > there:
        raise TrainingError(
            f"devices is {asked}, and the trainer sees {there}: leave it out, or ask for at most {there}"
        )
    if batch_size < 2 * asked:
        raise TrainingError(f"a batch of {batch_size} is too small for {asked} devices, of 2 images at least each")
    return asked
