"""Calibration: the temperature of the scores, and the expected calibration error."""

import math

from torch import Tensor

from models.files.records import Record

COLDEST, HOTTEST = 0.05, 20.0
BISECTIONS = 25  # of a range of log(400): the temperature is exact to 2e-7
BINS = 15


class Bin(Record):
    """The images whose confidence is in one interval."""

    confidence: float  # mean probability of the best class
    accuracy: float
    count: int


class Calibration(Record):
    """Calibration before and after the scores are divided by the temperature, on the images to which it was fitted."""

    temperature: float
    ece_before: float
    ece_after: float
    before: tuple[Bin, ...]
    after: tuple[Bin, ...]


def calibrate(scores: Tensor, labels: Tensor) -> Calibration:
    """Fits the temperature to scores (n, C) and labels (n,) of images that the classifier was not trained on."""
    fitted = temperature(scores, labels)
    before, after = (reliability(s.softmax(dim=1), labels) for s in (scores, scores / fitted))
    return Calibration(
        temperature=fitted, ece_before=_error(before), ece_after=_error(after), before=before, after=after
    )


def temperature(scores: Tensor, labels: Tensor) -> float:
    """Returns the T in 0.05..20 for which softmax(scores / T) has the lowest log-loss; scores (n, C), labels (n,).

    One image whose label is uniform over the classes is added to the n: otherwise a few correct predictions would make every
    probability 1. The loss is convex in 1 / T, so bisection on the sign of its slope finds the minimum.
    """
    scores = scores.double()
    own = scores.gather(1, labels[:, None])[:, 0].mean()
    target = (len(labels) * own + scores.mean()) / (len(labels) + 1)
    low, high = math.log(COLDEST), math.log(HOTTEST)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        probabilities = (scores * math.exp(-middle)).softmax(dim=1)
        too_confident = (probabilities * scores).sum(dim=1).mean() > target
        low, high = (middle, high) if too_confident else (low, middle)
    return math.exp((low + high) / 2)


def reliability(probabilities: Tensor, labels: Tensor) -> tuple[Bin, ...]:
    """Returns the images in BINS intervals of equal width of their best probability (n, C), lowest first, without empty ones."""
    confidence, predicted = probabilities.double().max(dim=1)
    right = (predicted == labels).double()
    places = (confidence * BINS).long().clamp(0, BINS - 1)
    counts = places.bincount(minlength=BINS)
    sums = [places.bincount(weights=values, minlength=BINS) for values in (confidence, right)]
    return tuple(
        Bin(confidence=float(sums[0][i] / n), accuracy=float(sums[1][i] / n), count=n)
        for i, n in enumerate(counts.tolist())
        if n
    )


def expected_calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Returns the mean distance between confidence and accuracy over the bins of `reliability`, weighted by their images."""
    return _error(reliability(probabilities, labels))


def _error(bins: tuple[Bin, ...]) -> float:
    return sum(b.count * abs(b.confidence - b.accuracy) for b in bins) / sum(b.count for b in bins)
