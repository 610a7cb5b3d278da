"""The gain to expect from more images: heads fitted to a quarter, a half, three quarters and all of the features."""

import math
from statistics import linear_regression

import torch
from torch import Tensor

from models.files.records import Record
from models.training.evaluation.evaluate import wilson
from models.training.head.regression import fit_at
from models.training.job.hyperparameters import ResolvedHyperparameters

SHARES = (0.25, 0.5, 0.75, 1.0)
FEW = 40  # validation images, below which there is no advice
SMALL_GAIN = 0.005  # of accuracy


class CurvePoint(Record):
    """Validation accuracy after training on `images`."""

    images: int
    accuracy: float
    interval: tuple[float, float]


class LearningCurve(Record):
    """Validation accuracy by the number of training images, with one line of advice."""

    points: tuple[CurvePoint, ...]
    advice: str


def learning_curve(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    val_features: Tensor,
    val_labels: Tensor,
    strength: float,
    settings: ResolvedHyperparameters,
) -> LearningCurve:
    """Fits heads to parts of features (n, D) and labels (n,), and validates them on (m, D) and (m,).

    The parts are nested and stratified. A smaller part gets a proportionally greater strength, so that the ratio of penalty to loss per
    image stays the same.
    """
    ranks = _ranks(labels, num_classes, settings.seed)
    points = []
    for share in SHARES:
        rows = (ranks < share).nonzero()[:, 0]
        head = fit_at(features[rows], labels[rows], num_classes, strength * len(labels) / len(rows), settings)
        with torch.inference_mode():
            correct = int((head(val_features).argmax(dim=1) == val_labels).sum())
        accuracy, interval = correct / len(val_labels), wilson(correct, len(val_labels))
        points.append(CurvePoint(images=len(rows), accuracy=accuracy, interval=interval))
    return LearningCurve(points=tuple(points), advice=advice(points, len(val_labels)))


def _ranks(labels: Tensor, num_classes: int, seed: int) -> Tensor:
    """Returns float64 (n,) in [0, 1): the rank of each image in a random order of its class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    ranks = torch.empty(len(labels), dtype=torch.float64)
    for label in range(num_classes):
        own = order[labels[order] == label]
        ranks[own] = torch.arange(len(own), dtype=torch.float64) / max(1, len(own))
    return ranks


def advice(points: list[CurvePoint], validation_images: int) -> str:
    """Returns one line; it assumes that every further doubling of the images reduces the error by the same factor as so far."""
    if validation_images < FEW:
        return f"{validation_images} validation images are too few to say what more training images would bring."
    now, error = points[-1].accuracy, _smoothed(points[-1], validation_images)
    doubled = 1 - error * min(1.0, 2 ** _slope(points, validation_images))
    noise = math.sqrt(2 * error * (1 - error) / validation_images)  # of the difference of two accuracies
    half = points[1].accuracy
    if doubled - now < SMALL_GAIN:
        seen = f"from half of them to all, the accuracy went from {half:.1%} to {now:.1%}"
        return f"More images like these would probably bring little: {seen}."
    line = f"Twice as many images might bring the accuracy from {now:.1%} to about {doubled:.1%}"
    return line + (
        "." if now - half > noise else f", but {validation_images} validation images are too few to be sure."
    )


def _smoothed(point: CurvePoint, images: int) -> float:
    """Returns the error rate, smoothed so that it is never 0."""
    return ((1 - point.accuracy) * images + 0.5) / (images + 1)


def _slope(points: list[CurvePoint], validation_images: int) -> float:
    """Returns the slope of log(error) by log(images), 0 where all points have the same number of images."""
    x = [math.log(point.images) for point in points]
    y = [math.log(_smoothed(point, validation_images)) for point in points]
    return linear_regression(x, y).slope if len(set(x)) > 1 else 0.0
