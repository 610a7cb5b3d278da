"""What the engine answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from models.classifier import top_k
from models.errors import ModelError


@dataclass(frozen=True)
class Sample:
    """An image's bytes, and the probabilities by class index that they are known to get."""

    name: str
    data: bytes
    probabilities: Sequence[float]


@dataclass(frozen=True)
class Prediction:
    """The best classes of one image, best first."""

    labels: list[str]
    indices: list[int]
    probabilities: list[float]


@dataclass(frozen=True)
class Timings:
    """Where a call's time went, in ms; of several images, the slowest counts."""

    decode: float = 0.0
    queue: float = 0.0
    compute: float = 0.0


@dataclass(frozen=True)
class Answer:
    """What one model says of each image of a call, in order; an image that failed has its error in its place."""

    model: str
    version: int
    results: list[Prediction | ModelError]
    timings: Timings

    def document(self, filenames: Sequence[str | None]) -> dict[str, Any]:
        """As `POST /predict` and `imago predict --json` show it."""
        results = []
        for filename, result in zip(filenames, self.results, strict=True):
            if isinstance(result, ModelError):
                results.append(failed(filename, result))
            else:
                rows = zip(result.labels, result.indices, result.probabilities, strict=True)
                predictions = [{"label": label, "index": index, "probability": p} for label, index, p in rows]
                results.append({"filename": filename, "predictions": predictions})
        return {"model": self.model, "version": self.version, "results": results}


def failed(filename: str | None, error: ModelError) -> dict[str, Any]:
    """An image's own error, in its place among the results."""
    return {"filename": filename, "error": {"code": error.code, "message": str(error)}}


@dataclass(frozen=True)
class Embedding:
    """Feature vectors, float32 (D,) each, of one model's backbones (concatenated where there are several)."""

    model: str
    version: int
    results: list[Tensor | ModelError]
    timings: Timings


def best(probabilities: Tensor, classes: Sequence[str], k: int) -> Prediction:
    """Probabilities (1, classes) of one image -> its k best classes."""
    [indices], [values] = top_k(probabilities, k)
    return Prediction([classes[i] for i in indices], indices, values)
