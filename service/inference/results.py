"""What the engine answers, and what it remembers of it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from models.classifier import ModelConfig, top_k
from models.decision_rules import Decision
from models.errors import ModelError
from service.errors import ValidationFailed


@dataclass(frozen=True)
class ParityImage:
    """An image's bytes, their features by each backbone's float32 original, (D,) each, and the probabilities by class that the head gives
    for these."""

    name: str
    data: bytes
    features: Sequence[Tensor]
    probabilities: Mapping[str, float]


Explain = Literal["grid", "overlay"]  # a heat map as numbers, or as a picture too


@dataclass(frozen=True)
class Explanation:
    """Where an image shows a class: rows of numbers in 0..1, and the image under that heat as a PNG in base64 where it was asked for.

    `share`: the side of the centre square that the network sees, over the image's shorter side; in crop mode `border` over its longer
    side, in `squash` of either side over that side.
    """

    grid: list[list[float]]
    share: float
    overlay: str | None = None
    crop_mode: str = "center"

    def document(self) -> dict[str, Any]:
        document = {"grid": self.grid, "share": round(self.share, 4), "crop_mode": self.crop_mode}
        return document | ({"overlay": self.overlay} if self.overlay is not None else {})


@dataclass(frozen=True)
class Wanted:
    """What a call wants to know beside the best classes."""

    explain: Explain | None = None
    alpha: float | None = None  # 1 - the coverage of the conformal set
    neighbours: int = 0  # how many of the nearest training images


PLAIN = Wanted()


EXPLAINED_VALUES = 200  # a heat map has so many numbers, or a picture
MAX_PREDICTIONS = 50_000  # of a request: images x models x classes named; about 4 MB of answer
MAX_MAPS = 320  # of a request: images x models x classes explained; about a second of the decode pool


def check_size(images: int, classes: Sequence[int], k: int, wanted: Wanted) -> None:
    """`classes`: the number of each model. Raises ValidationFailed where the answer would be larger than the bounds."""
    named = images * sum(min(k, count) + (count if wanted.alpha is not None else 0) for count in classes)
    if named > MAX_PREDICTIONS:
        raise ValidationFailed(
            f"the answer would name {named} classes (images x models x top_k, and all classes with alpha); at most {MAX_PREDICTIONS}: "
            "send fewer images, or ask for less",
            param="top_k",
        )
    maps = images * sum(min(k, count) for count in classes)
    if wanted.explain and maps > MAX_MAPS:
        raise ValidationFailed(
            f"the answer would have {maps} heat maps (images x models x top_k); at most {MAX_MAPS}: send fewer images, or ask for less",
            param="explain",
        )


@dataclass(frozen=True)
class Terms:
    """On which a call's images are taken. Among those of their client and model they are as if they had come `head_start_s` earlier.

    `client`: clients take turns, see `auth.client_of`, and so do the models of a client.
    """

    timeout_ms: int | None = None
    head_start_s: float = 0.0
    client: str = ""
    model: str = ""
    explained: bool = False  # their maps are wanted too
    judged: bool = False  # their distances to training images are wanted too


@dataclass(frozen=True)
class WithinTraining:
    """How far an image is from the training images, and up to where most images like them are."""

    distance: float
    threshold: float

    def document(self) -> dict[str, Any]:
        return {
            "within": self.distance <= self.threshold,
            "distance": round(self.distance, 4),
            "threshold": round(self.threshold, 4),
        }


@dataclass(frozen=True)
class Nearest:
    """A training image, by its path in the dataset."""

    name: str
    distance: float


@dataclass(frozen=True)
class Prediction:
    """The best classes of one image, best first; the rest where it was asked for, and the model has it."""

    labels: list[str]
    indices: list[int]
    probabilities: list[float]
    explanations: list[Explanation] | None = None  # of these classes
    conformal: list[str] | None = None
    in_distribution: WithinTraining | None = None
    nearest: list[Nearest] | None = None
    decision: Decision | None = None  # where the version keeps what it needs for one

    @property
    def size(self) -> int:
        """Values in its JSON, roughly."""
        return (len(self.labels) + len(self.conformal or ())) * (EXPLAINED_VALUES if self.explanations else 1)

    def document(self) -> dict[str, Any]:
        rows = zip(self.labels, self.indices, self.probabilities, strict=True)
        predictions: list[dict[str, Any]] = [{"label": name, "index": i, "probability": p} for name, i, p in rows]
        for prediction, explanation in zip(predictions, self.explanations or (), strict=False):
            prediction["explanation"] = explanation.document()
        document: dict[str, Any] = {"predictions": predictions}
        if self.decision is not None:
            document["decision"] = self.decision
        if self.conformal is not None:
            document["set"] = self.conformal
        if self.in_distribution is not None:
            document["in_distribution"] = self.in_distribution.document()
        if self.nearest is not None:
            document["neighbours"] = [{"name": n.name, "distance": round(n.distance, 4)} for n in self.nearest]
        return document


@dataclass(frozen=True)
class Timings:
    """Where a call's time went, in ms; of several images, the slowest counts."""

    decode: float = 0.0
    queue: float = 0.0
    compute: float = 0.0

    @classmethod
    def slowest(cls, timings: "Sequence[Timings]") -> "Timings":
        return cls(*(max((getattr(t, stage.name) for t in timings), default=0.0) for stage in fields(cls)))

    @property
    def header(self) -> str:
        """As `Server-Timing` says it."""
        return f"decode;dur={self.decode:.2f}, queue;dur={self.queue:.2f}, compute;dur={self.compute:.2f}"


@dataclass(frozen=True)
class ModelResults:
    """What one model says of each image of a call, in order; an image that failed has its error in its place."""

    model: str
    version: int
    results: list[Prediction | ModelError]
    timings: Timings

    def document(self, filenames: Sequence[str | None]) -> dict[str, Any]:
        """As `POST /predict` and `imago predict --json` show it."""
        return {"model": self.model, "version": self.version, "results": list(self.documents(filenames))}

    def documents(self, filenames: Sequence[str | None]) -> Iterator[dict[str, Any]]:
        """One of each image."""
        for filename, result in zip(filenames, self.results, strict=True):
            if isinstance(result, ModelError):
                yield failed(filename, result)
            else:
                yield {"filename": filename, **result.document()}


def failed(filename: str | None, error: ModelError) -> dict[str, Any]:
    """An image's own error, in its place among the results."""
    return {"filename": filename, "error": {"code": error.code, "message": str(error)}}


@dataclass(frozen=True)
class BackboneView:
    """An image as one backbone saw it, uint8 (C, H, W), and the map that its features come from, float32 (D, h, w), where there is one."""

    pixels: Tensor
    map: Tensor | None


@dataclass(frozen=True)
class Probabilities:
    """What one model version makes of each image of a call, in order: float32 probabilities (1, classes), or the image's own error.

    `seen`: of each image, by each backbone, where an explanation was asked for. `near`: of each image, where the version keeps training
    images, the distances to the nearest and their places, (2 * M,).
    """

    config: ModelConfig
    results: list[Tensor | ModelError]
    timings: Timings
    seen: list[list[BackboneView]] = field(default_factory=list)
    near: list[Tensor | None] = field(default_factory=list)

    def probabilities(self) -> Tensor:
        """(images, classes). Raises the first error of an image, which then says which image it is."""
        rows = []
        for number, result in enumerate(self.results, 1):
            if isinstance(result, ModelError):
                single = len(self.results) == 1
                raise result if single else type(result)(f"image {number} of {len(self.results)}: {result}")
            rows.append(result)
        return torch.cat(rows)

    def answer(self, k: int) -> ModelResults:
        """The k best classes of each."""
        results = [row if isinstance(row, ModelError) else best(row, self.config.classes, k) for row in self.results]
        return ModelResults(self.config.name, self.config.version, results, self.timings)


@dataclass(frozen=True)
class Embedding:
    """Feature vectors, float32 (D,) each, of one model's backbones (concatenated where there are several)."""

    model: str
    version: int
    results: list[Tensor | ModelError]
    timings: Timings

    @property
    def dim(self) -> int:
        """D; 0 where every image failed."""
        return next((len(result) for result in self.results if isinstance(result, Tensor)), 0)


def best(probabilities: Tensor, classes: Sequence[str], k: int) -> Prediction:
    """Probabilities (1, classes) of one image -> its k best classes."""
    [indices], [values] = top_k(probabilities, k)
    return Prediction([classes[i] for i in indices], indices, values)


@dataclass
class Total:
    """How often, and how long in all."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.ns += round(seconds * 1e9)


@dataclass
class Statistics:
    """What one version was asked since it was loaded. Times are of requests; of several images, the slowest counts."""

    images: int = 0  # answered
    last_at: float = 0.0  # time.time() of the last answer
    success: Total = field(default_factory=Total)
    failure: Total = field(default_factory=Total)
    decode: Total = field(default_factory=Total)
    queue: Total = field(default_factory=Total)
    compute: Total = field(default_factory=Total)

    def answered(self, scores: Probabilities, seconds: float) -> None:
        """A request that was answered; one of which every image failed is a failure."""
        images = sum(not isinstance(result, ModelError) for result in scores.results)
        if not images:
            self.failure.add(seconds)
            return
        self.images, self.last_at = self.images + images, time.time()
        self.success.add(seconds)
        self.decode.add(scores.timings.decode / 1000)
        self.queue.add(scores.timings.queue / 1000)
        self.compute.add(scores.timings.compute / 1000)
