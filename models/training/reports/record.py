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
    """One epoch of the training of a network; unmeasured values are None."""

    epoch: int = Field(ge=1)
    loss: float
    accuracy: float | None = None  # on the augmented training images, while the weights changed
    val_loss: float | None = None
    val_accuracy: float | None = None
    lr: float | None = None
    seconds: float | None = None


class Parity(Record):
    """The comparison of the stored version with the trained one, from the bytes of the same files to probabilities."""

    images: int
    max_difference: float  # of a probability
    agrees: bool
    precision: Precision = "float32"  # of the features
    features: float = 0.0  # largest distance from the features in training, see models/runtime/tolerances.py
    explained: float = 0.0  # the distance that the precision explains

    @property
    def reason(self) -> str:
        """Describes the difference that is too large."""
        if self.features > self.explained:
            return (
                f"its backbone computes other features than in training: they differ by {self.features:.1%} of their length, and "
                f"{self.precision} explains {self.explained:.1%}"
            )
        return f"it computes other probabilities than in training, by up to {self.max_difference:.3f}"


class AugmentedThumbnails(NamedTuple):
    """Thumbnails of augmented training images. They are on the page only, not in the record."""

    said: str  # a caption for all
    pictures: tuple[tuple[str, bytes], ...]  # label and JPEG of each


class Report(Record):
    """The results of a run. Fields that do not apply to its mode are None or empty."""

    schema_version: Literal[1] = 1
    name: str
    version: int | None = None  # None: nothing was published
    mode: str
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    request: dict[str, Any]
    effective: dict[str, Any]
    audit: Audit  # with the sizes of the parts
    history: tuple[Epoch, ...] = ()
    best_epoch: int | None = None  # whose weights were kept: the best on validation, or the last with keep "last"
    layers: tuple[TrainedLayer, ...] = ()
    fresh_stages: tuple[str, ...] = ()  # stages of the base that were newly initialised
    path: tuple[PathPoint, ...] = ()  # the cross-validated strengths of the head's penalty
    strength: float | None = None  # the chosen one
    stop_reason: str | None = None
    stopping: str | None = None  # what early stopping saved and may have cost
    candidates: BaseChoice | None = None
    calibration: Calibration
    val: Evaluation
    test: Evaluation | None = None
    label_errors: tuple[LabelError, ...] = ()
    labels_checked: tuple[Part, ...] = ()  # the parts that were searched for `label_errors`
    learning_curve: LearningCurve | None = None
    verdict: GateVerdict | None = None
    parity: Parity | None = None
    timings: dict[str, float] = Field(default={})  # phase -> seconds
    lineage: dict[str, Any] = Field(default={})
