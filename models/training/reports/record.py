"""The report as a record; `report.json` is its `model_dump_json()`."""

from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from pydantic import Field

from models.data.audit import Audit
from models.data.samples import Part
from models.files.records import Record
from models.runtime.options import Precision
from models.training.candidates import BaseChoice
from models.training.evaluation.calibrate import Calibration
from models.training.evaluation.evaluate import Evaluation, LabelError
from models.training.evaluation.gate import GateVerdict
from models.training.evaluation.layer_activity import TrainedLayer
from models.training.evaluation.learning_curve import LearningCurve
from models.training.head.regression import PathPoint


class Epoch(Record):
    """One epoch of a network's training; what was not measured is None."""

    epoch: int = Field(ge=1)
    loss: float
    accuracy: float | None = None  # on the training images as they were augmented, by weights on the move
    val_loss: float | None = None
    val_accuracy: float | None = None
    lr: float | None = None
    seconds: float | None = None


class Parity(Record):
    """Whether the server's way from bytes to probabilities answers as the trainer's did, on the same files."""

    images: int
    max_difference: float  # of a probability
    agrees: bool
    precision: Precision = "float32"  # of the features, in training and here
    features: float = 0.0  # distance of an image's features from training's, see models/runtime/tolerances.py
    explained: float = 0.0  # the distance that the precision explains

    @property
    def reason(self) -> str:
        """The difference that is too large."""
        if self.features > self.explained:
            return (
                f"its backbone gives other features than in training: they differ by {self.features:.1%} of their length, and "
                f"{self.precision} explains {self.explained:.1%}"
            )
        return f"it answers other probabilities than in training, by up to {self.max_difference:.3f}"


class AugmentedThumbnails(NamedTuple):
    """Pictures of images as they were trained on. They are on the page alone, and not in the record."""

    said: str  # what they are
    pictures: tuple[tuple[str, bytes], ...]  # label and JPEG of each


class Report(Record):
    """All that a run found out. What a mode does not have is None or empty."""

    schema_version: Literal[1] = 1
    name: str
    version: int | None = None  # None: nothing was published
    mode: str
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    request: dict[str, Any]
    effective: dict[str, Any]
    audit: Audit  # with the sizes of the parts
    history: tuple[Epoch, ...] = ()
    best_epoch: int | None = None  # whose weights were kept: the best on validation, or with keep "last" the last
    layers: tuple[TrainedLayer, ...] = ()
    fresh_stages: tuple[str, ...] = ()  # of the base's network, that were initialised anew
    path: tuple[PathPoint, ...] = ()  # of the head's strengths
    strength: float | None = None  # the one that was taken
    stop_reason: str | None = None
    stopping: str | None = None  # what stopping early saved and may have cost, in words
    candidates: BaseChoice | None = None
    calibration: Calibration
    val: Evaluation
    test: Evaluation | None = None
    label_errors: tuple[LabelError, ...] = ()
    labels_checked: tuple[Part, ...] = ()  # the parts whose images were looked at for `label_errors`
    learning_curve: LearningCurve | None = None
    verdict: GateVerdict | None = None
    parity: Parity | None = None
    timings: dict[str, float] = Field(default={})  # phase -> seconds
    lineage: dict[str, Any] = Field(default={})
