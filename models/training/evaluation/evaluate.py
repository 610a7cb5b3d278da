"""How good a classifier is on images it has not seen, with the interval that so many images allow; and where it, or a label, is wrong."""

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
    """One class, of which there are `images`; the recall is the class's own accuracy. None: nothing to divide by."""

    images: int
    recall: float | None  # share of its images that were found
    precision: float | None  # share of the images called so that were
    f1: float | None


class ConfusedPair(Record):
    """How often one class was taken for another."""

    true: str
    predicted: str
    count: int


class Mistake(Record):
    """An image that was answered wrong; `path` is relative to the dataset."""

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
    """`interval` is Wilson's, at 95 %: sqrt(n)-honest for small validation sets."""

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
    """The 95 % score interval of `correct` successes in `total` trials."""
    share, z2 = correct / total, Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return round(max(0.0, centre - half), 6), round(min(1.0, centre + half), 6)


def evaluate(probabilities: Tensor, labels: Tensor, classes: Sequence[str], paths: Sequence[str]) -> Evaluation:
    """Probabilities (n, C), true class indices (n,) and the images' paths, n > 0."""
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
    """int64 (C, C): images by true class (row) and predicted class (column)."""
    return (labels * num_classes + predicted).bincount(minlength=num_classes**2).view(num_classes, num_classes)


def class_scores(matrix: Tensor, classes: Sequence[str]) -> dict[str, ClassScore]:
    """Of every class, in their order, from the confusion matrix."""
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
    wrong = (predicted != labels).nonzero()[:, 0]
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MAX_MISTAKES].tolist()
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
    """Images whose label is probably wrong, the surest first, by confident learning (Northcutt et al. 2021).

    From the probabilities (n, C) of whoever was not fitted to these images: an image counts as of class j where p_j reaches the mean
    that images labelled j have; where several do, of the likeliest. If that is not its label, the label is doubted.
    """
    one_hot = torch.nn.functional.one_hot(labels, len(classes)).to(probabilities.dtype)
    counts = one_hot.sum(dim=0)
    thresholds = (one_hot * probabilities).sum(dim=0) / counts  # a class without images: NaN, which nothing reaches
    reached = probabilities.where(probabilities >= thresholds, -1.0)
    value, suggested = reached.max(dim=1)
    margin = value - probabilities.gather(1, labels[:, None])[:, 0]
    doubted = ((value >= 0) & (suggested != labels) & (margin > 0)).nonzero()[:, 0]
    worst = doubted[margin[doubted].argsort(descending=True, stable=True)][:MAX_LABEL_ERRORS].tolist()
    return tuple(
        LabelError(
            path=paths[row],
            given=classes[int(labels[row])],
            suggested=classes[int(suggested[row])],
            probability=round(float(value[row]), 4),
        )
        for row in worst
    )


@torch.inference_mode()
def outputs(
    module: nn.Module,
    pixels: Tensor,
    rows: Tensor,
    preprocessing: Preprocessing,
    batch_size: int = 256,
    progress: Progress = silent,
) -> Tensor:
    """Run `module`, in eval mode on its own device, over rows of uint8 (N, C, H, W) -> its outputs, float32 (n, K), on the CPU."""
    device = next(module.parameters()).device
    module.eval()
    answers = []
    for start in range(0, len(rows), batch_size):
        batch = pixels[rows[start : start + batch_size]].to(device)
        answers.append(module(normalise(batch, preprocessing)).float().cpu())
        progress(min(1.0, (start + batch_size) / len(rows)))
    return torch.cat(answers)
