"""Probabilities that mean what they say: a temperature for the scores, and how far confidence is from accuracy."""

import math

from torch import Tensor

from models.files.records import Record

COLDEST, HOTTEST = 0.05, 20.0
BISECTIONS = 25  # of a range of log(400): the temperature is exact to 2e-7
BINS = 15


class Bin(Record):
    """The images whose confidence lies between two bounds."""

    confidence: float  # mean probability of the best class
    accuracy: float
    count: int


class Calibration(Record):
    """Before and after the scores are divided by the temperature; on the images that it was fitted to."""

    temperature: float
    ece_before: float
    ece_after: float
    before: tuple[Bin, ...]
    after: tuple[Bin, ...]


def calibrate(scores: Tensor, labels: Tensor) -> Calibration:
    """Scores (n, C) of images that the classifier was not trained on, and their labels (n,)."""
    found = temperature(scores, labels)
    before, after = scores.softmax(dim=1), (scores / found).softmax(dim=1)
    return Calibration(
        temperature=found,
        ece_before=expected_calibration_error(before, labels),
        ece_after=expected_calibration_error(after, labels),
        before=reliability(before, labels),
        after=reliability(after, labels),
    )


def temperature(scores: Tensor, labels: Tensor) -> float:
    """The T in 0.05..20 for which softmax(scores / T) has the lowest log-loss; scores (n, C), labels (n,).

    The images count as n, and one more as if its label were any class: otherwise a few images that are all right would make every
    probability 1. The loss is convex in 1 / T, so the sign of its slope leads to the minimum.
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


def reliability(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> tuple[Bin, ...]:
    """Images by the probability (n, C) of their best class, in bins of equal width, lowest first; empty bins are left out."""
    confidence, predicted = probabilities.double().max(dim=1)
    right = (predicted == labels).double()
    places = (confidence * bins).long().clamp(0, bins - 1)
    counts = places.bincount(minlength=bins)
    sums = [places.bincount(weights=values, minlength=bins) for values in (confidence, right)]
    return tuple(
        Bin(confidence=float(sums[0][i] / n), accuracy=float(sums[1][i] / n), count=n)
        for i, n in enumerate(counts.tolist())
        if n
    )


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Mean distance of confidence and accuracy over the bins of `reliability`, weighted by their images."""
    found = reliability(probabilities, labels, bins)
    return sum(b.count * abs(b.confidence - b.accuracy) for b in found) / len(labels)
