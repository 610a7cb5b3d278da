"""What the API says and hears: JSON bodies, and the documented shapes of answers, which the hot path builds as plain dicts."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from models.decision_rules import Decision
from models.files.records import NAME_PATTERN
from models.training.job.request import FinetuneRequest
from service.datasets import DatasetEntry
from service.inference.batcher import DeviceState
from service.inference.registry.loader import ModelStatus
from service.jobs import Job


class ErrorBody(BaseModel):
    code: str = Field(description="Stable, for programs")
    message: str = Field(description="One sentence for people: the limit or cause, and what to do")
    param: str | None = Field(None, description="The field at fault")
    request_id: str | None


class ErrorAnswer(BaseModel):
    """The one shape of every failure."""

    error: ErrorBody


class ImageErrorBody(BaseModel):
    code: str
    message: str


class Heat(BaseModel):
    """Where the image shows the class."""

    grid: list[list[float]] = Field(description="Rows of the network's last map, over the square it saw; 1 is hottest")
    share: float = Field(
        description="The side of that square, in the middle of the image, over the image's shorter side"
    )
    crop_mode: Literal["center", "squash", "border"] = Field(
        "center",
        description="squash: the network saw this share of both sides, as a square; border: of the longer side, with a border",
    )
    overlay: str | None = Field(None, description="That square under its heat, a PNG in base64; with `explain=overlay`")


class LabelScore(BaseModel):
    label: str
    index: int = Field(description="The class's place in the model's `classes`")
    probability: float
    explanation: Heat | None = Field(None, description="With `explain`")


class InDistribution(BaseModel):
    """Whether the image is like the training images."""

    within: bool = Field(description="The distance is at most the threshold")
    distance: float = Field(description="To the 10th nearest training image, between features of unit length")
    threshold: float = Field(description="Which 5 % of the held-out images exceed")


class NearImage(BaseModel):
    name: str = Field(description="Path in the dataset that the model was trained on")
    distance: float = Field(description="Between features of unit length, 0 to 2")


class ImageResult(BaseModel):
    """One image's predictions, best first, or its error."""

    filename: str | None = Field(description="As the part named it, made printable; null for a raw body")
    predictions: list[LabelScore] | None = None
    decision: Decision | None = Field(
        None,
        description="Where the model keeps held-out images: accept is certain enough for the precision asked for, reject is unlike the "
        "training images, review is for a person",
    )
    set: list[str] | None = Field(None, description="With `alpha`: the conformal set, the likeliest first")
    in_distribution: InDistribution | None = Field(None, description="Where the model keeps training images")
    neighbours: list[NearImage] | None = Field(None, description="With `neighbours`, nearest first")
    error: ImageErrorBody | None = None


class PredictAnswer(BaseModel):
    """Results stand in the order of the images."""

    model: str
    version: int
    results: list[ImageResult]


class PredictAnswers(BaseModel):
    """The answer to a request that names several models."""

    models: list[PredictAnswer]


class EmbedResult(BaseModel):
    filename: str | None
    embedding: list[float] | None = None
    error: ImageErrorBody | None = None


class EmbedAnswer(BaseModel):
    model: str
    version: int
    dim: int = Field(description="Length of each embedding")
    results: list[EmbedResult]


class ModelList(BaseModel):
    models: list[ModelStatus]
    devices: dict[str, DeviceState] = Field(description="What the server computes on; `lost` until it is started again")
    device_note: str | None = Field(
        None, description="Why no GPU is used, where `IMAGO_DEVICE=auto` found none that is usable"
    )
    has_more: bool = Field(False, description="With `limit`: there are more; the next page is `after` the last name")


class JobList(BaseModel):
    """Jobs from the latest on; for the next page, `after` is the id of the last one here."""

    object: Literal["list"] = "list"
    data: list[Job]
    has_more: bool


class DatasetList(BaseModel):
    """Datasets by name; for the next page, `after` is the name of the last one here."""

    object: Literal["list"] = "list"
    data: list[DatasetEntry]
    has_more: bool


class Validate(FinetuneRequest):
    """A dataset, and whatever else of a job's request changes how it is split; the model needs no name yet."""

    name: str = Field(default="dataset", pattern=NAME_PATTERN, description="Name of the model to be")


class DryRun(BaseModel):
    """What the trainer found in a dataset, and what it would make of it."""

    audit: dict[str, Any] = Field(
        description="Of the images: their layout, how many there are, what was ignored, and which are bad or duplicates"
    )
    pictures: dict[str, str] = Field(
        {}, description="Of the first bad files and duplicates, by path: small JPEGs as `data:` URLs"
    )
    split: dict[str, int] = Field(description="Images by part: train, val, test")
    mode: str = Field(description="What would be trained")
    bases: list[str] = Field(description="The models to start from")
    effective: dict[str, Any] = Field(description="The hyperparameters as they would be used")
    selection: dict[str, int] | None = Field(
        None, description="Where an architecture is to be chosen: `folds`, and the `epochs` on each"
    )
    estimate: dict[str, float] = Field(description="Seconds by phase, and in all as `total`")


class JobEvent(BaseModel):
    """A sign of life of a job; what it has no value for is left out."""

    seq: int = Field(description="Ascending, from 1")
    at: str = Field(description="When, in ISO 8601")
    level: str | None = Field(None, description="info, warning or error")
    status: str | None = Field(None, description="Where the status has changed: the new one")
    phase: str | None = None
    progress: float | None = Field(None, description="Of the phase, from 0 to 1")
    epoch: int | None = None
    loss: float | None = None
    val_loss: float | None = None
    accuracy: float | None = None
    message: str | None = None


class EventList(BaseModel):
    object: Literal["list"] = "list"
    data: list[JobEvent]
    has_more: bool


class Activate(BaseModel):
    """Which version is to serve."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"version": 2}]})

    version: int = Field(ge=1, description="A version that the store has")


PULL_PATTERN = r"^(timm/|hf-hub:[A-Za-z0-9][A-Za-z0-9._-]*/)?[A-Za-z0-9][A-Za-z0-9._-]*(@[A-Za-z0-9._/-]+)?$"


class Pull(BaseModel):
    """Whose published weights are wanted."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"name": "resnet50"}]})

    name: str = Field(
        pattern=PULL_PATTERN,
        description="An architecture of torchvision, imagenet-ensemble, a packaged model, timm/<network>[.<tag>], or "
        "hf-hub:<user>/<repository>[@<revision>]",
    )
    model: str | None = Field(
        None,
        pattern=NAME_PATTERN,
        description="Name of the model, for weights of the Hub; by default from the last part of `name`",
    )


class VersionStatus(BaseModel):
    """A version in the store. Of one that is damaged, `error` says what ails it, and nothing else is known."""

    version: int
    state: Literal["serving", "previous", "stored"] = Field(description="previous is what a rollback would serve")
    created_at: datetime | None = None
    classes: int | None = None
    backbones: list[str] = []
    metrics: dict[str, Any] = {}
    command: str | None = Field(None, description="The command line that made it, where it was trained here")
    error: str | None = None


class VersionList(BaseModel):
    """From the latest on."""

    versions: list[VersionStatus]


class Health(BaseModel):
    status: str


PREDICT_EXAMPLE = {
    "model": "cifar10",
    "version": 1,
    "results": [
        {"filename": "cat.jpg", "predictions": [{"label": "cat", "index": 3, "probability": 0.931}]},
        {"filename": "broken.jpg", "error": {"code": "invalid_image", "message": "the JPEG is truncated"}},
    ],
}
PREDICT_SEVERAL_EXAMPLE = {
    "models": [
        {
            "model": name,
            "version": 1,
            "results": [{"filename": "cat.jpg", "predictions": [{"label": "cat", "index": 3, "probability": 0.93}]}],
        }
        for name in ("cifar10", "pets")
    ]
}
PREDICT_EXPLAINED_EXAMPLE = {
    "model": "cifar10",
    "version": 1,
    "results": [
        {
            "filename": "cat.jpg",
            "decision": "accept",
            "set": ["cat", "dog"],
            "in_distribution": {"within": True, "distance": 0.2114, "threshold": 0.3902},
            "neighbours": [{"name": "train/cat/0231.jpg", "distance": 0.1538}],
            "predictions": [
                {
                    "label": "cat",
                    "index": 3,
                    "probability": 0.931,
                    "explanation": {"grid": [[0.0, 0.12], [0.64, 1.0]], "share": 0.875, "overlay": "iVBORw0KGgo="},
                }
            ],
        }
    ],
}
EMBED_EXAMPLE = {
    "model": "cifar10",
    "version": 1,
    "dim": 3,
    "results": [{"filename": "cat.jpg", "embedding": [0.12, 0.0, 1.7]}],
}
MODEL_EXAMPLE = {
    "name": "cifar10",
    "default": True,
    "state": "ready",
    "version": 1,
    "error": None,
    "classes": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
}
VERSION_EXAMPLE = {
    "version": 2,
    "state": "serving",
    "created_at": "2026-11-22T09:31:00Z",
    "classes": 2,
    "backbones": ["preact_resnet-007a148d"],
    "metrics": {"val": {"images": 153, "accuracy": 0.95, "interval": [0.903, 0.974]}},
    "command": "imago finetune bees --name bees",
    "error": None,
}

BASE_EXAMPLE = {
    "name": "efficientnet_lite0",
    "default": True,
    "in_store": True,
    "architectures": ["efficientnet_lite0"],
    "input": 224,
    "bytes": 13611308,
    "accuracy": 74.8,
    "images_per_s": 95.2,
}

JOB_EXAMPLE = {
    "id": "ftjob-0f8fad5bd9cb469fa16570867728950e",
    "object": "fine_tuning.job",
    "created_at": "2026-11-22T09:30:00Z",
    "started_at": "2026-11-22T09:30:01Z",
    "finished_at": None,
    "status": "running",
    "terminal": False,
    "phase": "features",
    "progress": 0.41,
    "eta_seconds": 12.5,
    "queue_position": None,
    "stop_reason": None,
    "attempt": 1,
    "request": {"dataset": "hymenoptera.zip", "name": "bees", "mode": "head", "deploy": "gate"},
    "effective": None,
    "error": None,
    "model": None,
    "version": None,
    "deployment": None,
}
JOB_REQUEST_EXAMPLE = {
    "dataset": "hymenoptera.zip",
    "name": "bees",
    "base": "resnet18",
    "mode": "finetune",
    "hyperparameters": {"epochs": 8, "augmentation": "standard"},
}
DRY_RUN_EXAMPLE = {
    "audit": {
        "layout": "a folder per class",
        "files": 245,
        "images": 244,
        "bad": [{"path": "ants/17.jpg", "reason": "zero bytes"}],
        "duplicates": [],
        "ignored": [{"reason": "left by Windows", "count": 2, "examples": ["ants/Thumbs.db", "ants/desktop.ini"]}],
        "image_kinds": {"8-bit colour": 240, "8-bit gray": 4},
    },
    "split": {"train": 196, "val": 48, "test": 0},
    "mode": "head",
    "bases": ["resnet18"],
    "effective": {"epochs": 200, "seed": 0},
    "estimate": {"audit": 0.8, "features": 9.1, "train": 3.0, "total": 12.9},
}
DATASET_EXAMPLE = {
    "object": "dataset",
    "name": "hymenoptera.zip",
    "kind": "zip",
    "bytes": 47286322,
    "modified": "2026-11-22T09:29:00Z",
}
EVENT_EXAMPLE = {
    "seq": 7,
    "at": "2026-11-22T09:30:04.120+00:00",
    "level": "info",
    "phase": "train",
    "progress": 0.5,
    "epoch": 4,
    "loss": 0.31,
    "accuracy": 0.93,
}


def error_example(code: str, message: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "param": param, "request_id": "9f86d081884c7d65"}}


def json_answer(description: str, *examples: Any) -> dict[str, Any]:
    """How a route's `responses` documents one status, with examples."""
    named = {f"example{number}": {"value": example} for number, example in enumerate(examples, 1)}
    return {"description": description, "content": {"application/json": {"examples": named}}}


ERROR_ANSWERS: dict[int | str, dict[str, Any]] = {
    "4XX": {
        "model": ErrorAnswer,
        **json_answer("Refused", error_example("validation_error", "must be a whole number from 1", "top_k")),
    },
    "5XX": {
        "model": ErrorAnswer,
        **json_answer("Not now", error_example("not_ready", "the default model is still loading")),
    },
}

BINARY = {"type": "string", "format": "binary"}
