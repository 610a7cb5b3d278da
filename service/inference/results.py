"""What a call asks for, what a forward pass gives, and what is answered.

PredictOptions    what is wanted of each image, and on which terms
Output            one image through one backbone: values by part
Prediction        the best classes of one image by one model, and how far they may be trusted
ModelResults      one model's answer to each image of a call
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from models.classifier import ModelConfig, top_k
from models.decision_rules import Decision
from models.errors import ModelError
from models.uncertainty import NearestNeighbours, Reference, kth
from service.errors import NotProvided, ValidationFailed

T = TypeVar("T")


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
class PredictOptions:
    """What a call wants to know of each image, and the terms on which its images are taken.

    `client`: clients take turns, see `auth.client_of`, and so do the models of a client. Among the images of their client and model they
    are as if they had come `head_start_s` earlier.
    """

    top_k: int = 5
    explain: Explain | None = None
    alpha: float | None = None  # 1 - the coverage of the conformal set
    neighbours: int = 0  # how many of the nearest training images
    timeout_ms: int | None = None
    head_start_s: float = 0.0
    client: str = ""


DEFAULTS = PredictOptions()


EXPLAINED_VALUES = 200  # a heat map has so many numbers, or a picture
MAX_PREDICTIONS = 50_000  # of a request: images x models x classes named; about 4 MB of answer
MAX_MAPS = 320  # of a request: images x models x classes explained; about a second of the decode pool


def check_size(images: int, classes: Sequence[int], options: PredictOptions) -> None:
    """`classes`: the number of each model. Raises ValidationFailed where the answer would be larger than the bounds."""
    named = images * sum(min(options.top_k, count) + (count if options.alpha is not None else 0) for count in classes)
    if named > MAX_PREDICTIONS:
        raise ValidationFailed(
            f"the answer would name {named} classes (images x models x top_k, and all classes with alpha); at most {MAX_PREDICTIONS}: "
            "send fewer images, or ask for less",
            param="top_k",
        )
    maps = images * sum(min(options.top_k, count) for count in classes)
    if options.explain and maps > MAX_MAPS:
        raise ValidationFailed(
            f"the answer would have {maps} heat maps (images x models x top_k); at most {MAX_MAPS}: send fewer images, or ask for less",
            param="explain",
        )


def check_provided(config: ModelConfig, reference: Reference | None, options: PredictOptions) -> None:
    """Raises NotProvided where this version keeps nothing to answer by."""
    if options.alpha is None and not options.neighbours:
        return
    label = f"{config.name}@{config.version}"
    if options.neighbours and len(config.backbones) > 1:
        raise NotProvided(f"{label} stands on several backbones, and has no one distance", param="neighbours")
    if reference is None:
        raise NotProvided(
            f"{label} keeps nothing of held-out and training images; models trained here do, and "
            f"`imago models calibrate {label} DATASET` gives it to others",
            param="neighbours" if options.alpha is None else "alpha",
        )


# What a forward pass gives


@dataclass(frozen=True)
class Timings:
    """Where a call's time went, in ms; of several images, the slowest counts."""

    decode: float = 0.0
    queue: float = 0.0
    compute: float = 0.0

    @classmethod
    def slowest(cls, timings: "Sequence[Timings]") -> "Timings":
        if len(timings) == 1:
            return timings[0]
        return cls(*(max((getattr(t, stage.name) for t in timings), default=0.0) for stage in fields(cls)))

    @property
    def header(self) -> str:
        """As `Server-Timing` says it."""
        return f"decode;dur={self.decode:.2f}, queue;dur={self.queue:.2f}, compute;dur={self.compute:.2f}"


PartFunction = Callable[[Tensor], Tensor]  # features (n, D) of the rows that asked for it -> (n, K), on the same device


@dataclass(eq=False)
class Forward:
    """A forward pass: how many images travelled together, through what, and from when until when (time.monotonic()).

    `origins` and `span` belong to who traces requests: what came with the images, and what was made of it.
    """

    backbone: str
    device: str
    images: int
    started: float
    ended: float
    origins: Sequence[Any] = ()
    span: Any = None


@dataclass(frozen=True)
class Output:
    """One image through one backbone: a float32 (K,) CPU tensor for each part that was asked for, and where the time went.

    `pixels`: the image as the backbone saw it, uint8 (C, H, W). `map`: what the features come from, float32 (D, h, w) on the CPU, where it
    was asked for.
    """

    values: Mapping[PartFunction, Tensor]
    forward: Forward
    timings: Timings
    pixels: Tensor
    map: Tensor | None = None


# What is answered


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


def predicted(
    probabilities: Tensor,
    classes: Sequence[str],
    options: PredictOptions,
    reference: Reference | None = None,
    near: Tensor | None = None,
    explanations: list[Explanation] | None = None,
) -> Prediction:
    """Probabilities (1, classes) of one image -> its best classes, and what the version's reference says of them.

    `near`: distances to the nearest training images, then their places, (2 * M,).
    """
    [indices], [values] = top_k(probabilities, options.top_k)
    labels = [classes[i] for i in indices]
    if reference is None:
        return Prediction(labels, indices, values, explanations)
    conformal = None if options.alpha is None else _conformal_set(reference, probabilities, classes, options.alpha)
    in_distribution, nearest = _neighbours(reference.neighbourhood, near, options.neighbours)
    decision = _decision(reference, float(probabilities.max()), in_distribution)
    return Prediction(labels, indices, values, explanations, conformal, in_distribution, nearest, decision)


def _conformal_set(reference: Reference, probabilities: Tensor, classes: Sequence[str], alpha: float) -> list[str]:
    [indices] = reference.conformal.sets(probabilities, alpha)
    return [classes[i] for i in indices]


def _neighbours(
    kept: NearestNeighbours | None, near: Tensor | None, count: int
) -> tuple[WithinTraining | None, list[Nearest] | None]:
    """How far the image is from the training images, and the `count` nearest of them, where any are wanted."""
    if near is None or kept is None:
        return None, None
    distances, places = near.chunk(2)
    within = WithinTraining(float(kth(distances[None])), kept.threshold)
    rows = zip(places[:count].int().tolist(), distances[:count].tolist(), strict=True)
    return within, [Nearest(kept.names[place], distance) for place, distance in rows] if count else None


def _decision(reference: Reference, confidence: float, within: WithinTraining | None) -> Decision | None:
    """By probability and distance; an ensemble has no distance, and rejects nothing. None where the version keeps no rule."""
    if reference.decisions is None:
        return None
    if within is None or (kept := reference.neighbourhood) is None:
        return reference.decisions.decide(confidence)
    far = kept.far is not None and within.distance > kept.far
    return reference.decisions.decide(confidence, within.distance <= within.threshold, far)


@dataclass(frozen=True)
class ModelResults(Generic[T]):
    """What one model makes of each image of a call, in order; an image that failed has its error in its place.

    T is a Prediction, the probabilities float32 (1, classes), or the features float32 (D,) of all its backbones, one after another.
    """

    model: str
    version: int
    results: list[T | ModelError]
    timings: Timings

    def document(self: "ModelResults[Prediction]", filenames: Sequence[str | None]) -> dict[str, Any]:
        """As `POST /predict` and `imago predict --json` show it."""
        return {"model": self.model, "version": self.version, "results": list(self.documents(filenames))}

    def documents(self: "ModelResults[Prediction]", filenames: Sequence[str | None]) -> Iterator[dict[str, Any]]:
        """One of each image."""
        for filename, result in zip(filenames, self.results, strict=True):
            if isinstance(result, ModelError):
                yield failed(filename, result)
            else:
                yield {"filename": filename, **result.document()}

    def stacked(self: "ModelResults[Tensor]") -> Tensor:
        """Probabilities (images, classes). Raises the first error of an image, which then says which image it is."""
        rows = []
        for number, result in enumerate(self.results, 1):
            if isinstance(result, ModelError):
                single = len(self.results) == 1
                raise result if single else type(result)(f"image {number} of {len(self.results)}: {result}")
            rows.append(result)
        return torch.cat(rows)


def failed(filename: str | None, error: ModelError) -> dict[str, Any]:
    """An image's own error, in its place among the results."""
    return {"filename": filename, "error": {"code": error.code, "message": str(error)}}


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

    def answered(self, answer: ModelResults[Any], seconds: float) -> None:
        """A request that was answered; one of which every image failed is a failure."""
        images = sum(not isinstance(result, ModelError) for result in answer.results)
        if not images:
            self.failure.add(seconds)
            return
        self.images, self.last_at = self.images + images, time.time()
        self.success.add(seconds)
        self.decode.add(answer.timings.decode / 1000)
        self.queue.add(answer.timings.queue / 1000)
        self.compute.add(answer.timings.compute / 1000)
