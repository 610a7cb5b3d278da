"""Metrics of a classifier on held-out images with a confidence interval, its mistakes, and labels that are probably wrong."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.files.records import Record
from models.preprocessing import Preprocessing, normalise
from models.progress import Progress, silent
from models.training.evaluation.calibrate import expected_calibration_error

Z_95 = 1.959964
MAX_CONFUSION = 200  # classes, above which the matrix is left out
MAX_PAIRS = 20
MAX_MISTAKES = 50
MAX_LABEL_ERRORS = 100


class ClassScore(Record):
    """The metrics of one class; None where they would divide by 0."""

    images: int
    recall: float | None  # share of its images that were predicted correctly
    precision: float | None  # share of its predictions that are correct
    f1: float | None


class ConfusedPair(Record):
    """How often one class was predicted as another."""

    true: str
    predicted: str
    count: int


class Mistake(Record):
    """An image with a wrong prediction; `path` is relative to the dataset."""

    path: str
    true: str
    predicted: str
    probability: float  # of the prediction


class LabelError(Record):
    """An image whose label is probably wrong."""

    path: str
    given: str
    suggested: str
    probability: float  # of the suggestion, by a head or network that was not fitted to the image


class Evaluation(Record):
    """The metrics of one part of a dataset. `interval`: the 95 % Wilson interval of the accuracy."""

    images: int
    accuracy: float
    interval: tuple[float, float]
    macro_f1: float  # mean over the classes that have images
    nll: float  # mean of -log(probability of the true class)
    ece: float  # expected calibration error
    per_class: dict[str, ClassScore]  # in the order of the classes
    confusion: tuple[tuple[int, ...], ...] | None  # [true][predicted]; None above 200 classes
    confused: tuple[ConfusedPair, ...]  # most frequent first
    mistakes: tuple[Mistake, ...]  # most confident first


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Returns the 95 % Wilson score interval of `correct` successes in `total` trials."""
    share, z2 = correct / total, Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return round(max(0.0, centre - half), 6), round(min(1.0, centre + half), 6)


def evaluate(probabilities: Tensor, labels: Tensor, classes: Sequence[str], paths: Sequence[str]) -> Evaluation:
    """Evaluates probabilities (n, C) against true class indices (n,), n > 0; `paths` name the images."""
    confidence, predicted = probabilities.max(dim=1)
    matrix = confusion_matrix(predicted, labels, len(classes))
    correct = int(matrix.diag().sum())
    scores = class_scores(matrix, classes)
    f1 = [score.f1 for score in scores.values() if score.images and score.f1 is not None]
    own = probabilities.double().gather(1, labels[:, None]).clamp_min(1e-12)
    return Evaluation(
        images=len(labels),
        accuracy=correct / len(labels),
        interval=wilson(correct, len(labels)),
        macro_f1=round(sum(f1) / len(f1), 6),
        nll=round(float(-own.log().mean()), 6),
        ece=round(expected_calibration_error(probabilities, labels), 6),
        per_class=scores,
        confusion=tuple(map(tuple, matrix.tolist())) if len(classes) <= MAX_CONFUSION else None,
        confused=_confused(matrix, classes),
        mistakes=_mistakes(confidence, predicted, labels, classes, paths),
    )


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Returns int64 (C, C): the number of images by true class (row) and predicted class (column)."""
    return (labels * num_classes + predicted).bincount(minlength=num_classes**2).view(num_classes, num_classes)


def class_scores(matrix: Tensor, classes: Sequence[str]) -> dict[str, ClassScore]:
    """Returns the metrics of every class from the confusion matrix (C, C)."""
    sums = zip(classes, matrix.diag().tolist(), matrix.sum(dim=1).tolist(), matrix.sum(dim=0).tolist(), strict=True)
    return {
        name: ClassScore(
            images=images,
            recall=_share(hits, images),
            precision=_share(hits, calls),
            f1=_share(2 * hits, images + calls),
        )
        for name, hits, images, calls in sums
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None


def _confused(matrix: Tensor, classes: Sequence[str]) -> tuple[ConfusedPair, ...]:
    wrong = matrix - matrix.diag().diag()
    order = wrong.flatten().argsort(descending=True, stable=True)[:MAX_PAIRS].tolist()
    places = [divmod(place, len(classes)) for place in order]
    return tuple(
        ConfusedPair(true=classes[t], predicted=classes[p], count=int(wrong[t, p])) for t, p in places if wrong[t, p]
    )


def _mistakes(
    confidence: Tensor, predicted: Tensor, labels: Tensor, classes: Sequence[str], paths: Sequence[str]
) -> tuple[Mistake, ...]:
    worst = _highest(confidence, predicted != labels, MAX_MISTAKES)
    return tuple(
        Mistake(
            path=paths[row],
            true=classes[int(labels[row])],
            predicted=classes[int(predicted[row])],
            probability=round(float(confidence[row]), 4),
        )
        for row in worst
    )


def label_errors(
    probabilities: Tensor, labels: Tensor, paths: Sequence[str], classes: Sequence[str]
) -> tuple[LabelError, ...]:
    """Returns images whose label is probably wrong, the most probable first, by confident learning (Northcutt et al. 2021).

    `probabilities` (n, C) are those of a model that was not fitted to these images. An image is assigned to the class j whose p_j is at
    least the mean p_j of the images labelled j, to the most probable where there are several. A label that differs is reported.
    """
    one_hot = torch.nn.functional.one_hot(labels, len(classes)).to(probabilities.dtype)
    counts = one_hot.sum(dim=0)
    thresholds = (one_hot * probabilities).sum(dim=0) / counts  # a class without images: NaN, which nothing reaches
    reached = probabilities.where(probabilities >= thresholds, -1.0)
    value, suggested = reached.max(dim=1)
    margin = value - probabilities.gather(1, labels[:, None])[:, 0]
    worst = _highest(margin, (value >= 0) & (suggested != labels) & (margin > 0), MAX_LABEL_ERRORS)
    return tuple(
        LabelError(
            path=paths[row],
            given=classes[int(labels[row])],
            suggested=classes[int(suggested[row])],
            probability=round(float(value[row]), 4),
        )
        for row in worst
    )


def _highest(values: Tensor, mask: Tensor, count: int) -> list[int]:
    """Returns the rows of `mask` (n,) with the highest values (n,), at most `count` of them."""
    rows = mask.nonzero()[:, 0]
    highest: list[int] = rows[values[rows].argsort(descending=True, stable=True)][:count].tolist()
    return highest


@torch.inference_mode()
def outputs(
    module: nn.Module,
    pixels: Tensor,
    rows: Tensor,
    preprocessing: Preprocessing,
    batch_size: int = 256,
    progress: Progress = silent,
) -> Tensor:
    """Returns the outputs of `module`, float32 (n, K) on the CPU, for `rows` (n,) of uint8 `pixels` (N, C, H, W).

    The module runs on its own device and is put in eval mode.
    """
    device = next(module.parameters()).device
    module.eval()
    answers = []
    for start in range(0, len(rows), batch_size):
        batch = pixels[rows[start : start + batch_size]].to(device)
        answers.append(module(normalise(batch, preprocessing)).float().cpu())
        progress(min(1.0, (start + batch_size) / len(rows)))
    return torch.cat(answers)
