"""The request for a training run, and the events of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from models.data.samples import Layout, NearDuplicates
from models.decision_rules import PRECISION
from models.files.records import NAME_PATTERN
from models.files.text_encodings import AUTO, check_encoding
from models.runtime.options import Precision
from models.training.job.hyperparameters import (
    HEAD_FIELDS,
    FiniteRecord,
    Hyperparameters,
    Mode,
    ResolvedHyperparameters,
    resolve,
    zero_or,
)

Phase = Literal["audit", "features", "select", "train", "calibrate", "evaluate", "publish"]

MAX_BASES = 8  # of an ensemble, or to choose from
FOLDS, FOLD_EPOCHS = 3, 3  # default of the choice among architectures
PATIENCE, RISES = 10, 3  # default of `EarlyStopping.patience`, for the criterion patience and for up


class EarlyStopping(FiniteRecord):
    """The rule that ends training before its last epoch.

    Prechelt 1998, "Early Stopping - but when?": GL is generalisation loss, PQ its quotient with progress, UP successive rises.
    """

    criterion: Literal["patience", "gl", "pq", "up", "none"] = Field(
        default="patience", description="Rule that ends the run early: patience, or one of Prechelt's three"
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Epochs in a row without a lower validation loss, by default 10; for up, strips in a row with a higher one, by "
        "default 3",
    )
    alpha: float = Field(default=5.0, ge=1e-6, le=1e6, description="Threshold of gl (percent) and pq")
    strip: int | None = Field(
        default=None, ge=1, le=100, description="Epochs in a strip, for pq and up; by default an eighth of all, 2 to 5"
    )
    keep: Literal["best", "last"] = Field(
        default="best",
        description="Epoch whose weights are kept; use last where the base was trained on the validation images: their best epoch then "
        "means nothing",
    )

    def for_epochs(self, epochs: int) -> "EarlyStopping":
        """Returns the rule with its strip decided: with Prechelt's 5 epochs, `up` could not end a run of fewer than 20."""
        return self.model_copy(update={"strip": self.strip or max(2, min(5, epochs // 8))})

    @property
    def limit(self) -> int:
        """Epochs or strips in a row that end the run."""
        return self.patience or (RISES if self.criterion == "up" else PATIENCE)


class Budget(FiniteRecord):
    """Bounds of a run. Where one is reached, training ends and the best weights so far are kept."""

    max_seconds: float | None = Field(
        default=None, ge=1e-6, le=1e9, description="Seconds after which training ends with the best so far"
    )
    max_epochs: int | None = Field(
        default=None, ge=1, le=10_000, description="Epochs after which training ends with the best so far"
    )
    max_latency_ms: float | None = Field(
        default=None, ge=1e-6, le=1e9, description="Base auto: maximum latency of one image in milliseconds"
    )


class FinetuneRequest(FiniteRecord):
    """A training run. A base is a model of the store (`head`, `finetune`, `head_then_finetune`) or an architecture (`scratch`).
    Several models form an ensemble; one of several architectures is chosen; "auto" chooses among the store's models."""

    dataset: Path = Field(description="Folder, zip or CSV of labelled images")
    name: str = Field(pattern=NAME_PATTERN, description="Name of the model to publish")
    base: str | tuple[str, ...] | None = Field(
        default=None,
        description="Model of the store to start from, several for an ensemble, auto to choose one; in mode scratch, an architecture, "
        "or several to choose one by cross-validation. By default the server's default model",
    )
    mode: Mode = Field(default="head", description="Part of the network that is trained")
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
        default=0.2, ge=0.01, le=0.5, description="Share of the images held out for validation, where there is no val/"
    )
    test_fraction: Annotated[float, zero_or(0.001)] = Field(
        default=0.0, ge=0, le=0.5, description="Share of the images held out for testing, where there is no test/"
    )
    on_bad_file: Literal["skip", "fail"] = Field(
        default="skip", description="Skip files that are not usable images, or fail"
    )
    encoding: str = Field(
        default=AUTO,
        max_length=40,
        description="Encoding of tables, and of names in zips, that are not UTF-8: cp1252, gbk, cp932 ...; auto refuses to guess",
    )
    near_duplicates: NearDuplicates = Field(
        default="group",
        description="Versions of one photograph: group keeps them in one part of the split, report only lists them, off does not search",
    )
    layout: Layout = Field(
        default="auto",
        description="Meaning of the folders where their names are ambiguous: classes; splits, that is train, val and test with "
        "class folders in them; or csv, where a CSV at the top has the labels",
    )
    min_per_class: int = Field(
        default=2,
        ge=2,
        le=1_000_000,
        description="Training images that each class needs; a class with fewer is an error",
    )
    hyperparameters: Hyperparameters = Hyperparameters()
    early_stopping: EarlyStopping = EarlyStopping()
    budget: Budget = Budget()
    deploy: Literal["never", "manual", "gate", "always"] = Field(
        default="gate",
        description="When the new version is served: gate serves it if it is not worse than the served one",
    )
    accept_precision: float = Field(
        default=PRECISION, ge=0.5, lt=1, description="Share of accepted images that should be right; sets `decision`"
    )
    metadata: dict[str, str] = Field(default={}, max_length=16, description="Up to 16 texts to store with the model")
    half: bool = Field(default=False, description="Store the backbone in float16")
    channels: Literal[1, 3] = Field(
        default=3, description="Mode scratch: input channels; with 1, images are converted to gray"
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
        """True where cross-validation chooses among several architectures."""
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


@dataclass(frozen=True)
class Event:
    """Progress of a run: `progress` goes from 0 to 1 within `phase`; `message` is a line for people (a bad file, a resumed run)."""

    phase: Phase
    progress: float
    epoch: int | None = None  # 1-based, when it has just ended
    loss: float | None = None  # of training
    val_loss: float | None = None
    accuracy: float | None = None  # on validation
    message: str | None = None


OnEvent = Callable[[Event], None]


def effective(
    request: FinetuneRequest, mode: Mode, train_images: int, precision: Precision = "float32", devices: int = 1
) -> ResolvedHyperparameters:
    """Resolves the request's hyperparameters for `mode`: the request's own, or what `auto` has become. See `resolve`."""
    given = request.hyperparameters.model_dump(exclude_none=True)
    if request.mode == "auto" and mode == "head":  # `epochs` were meant for a network
        given = {name: value for name, value in given.items() if name in HEAD_FIELDS - {"epochs"}}
    resolved = resolve(given, mode, train_images, precision, devices)
    if request.budget.max_epochs and mode != "head":
        return resolved.model_copy(update={"epochs": min(resolved.epochs, request.budget.max_epochs)})
    return resolved
