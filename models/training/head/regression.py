"""Fits a linear head to fixed features: multinomial logistic regression by L-BFGS, with the strength chosen by cross-validation.

    features (n, D) --centre, scale, rotate to the principal axes--> x (n, r), r <= min(n, D)
    each strength, from strong to weak: k folds, each started from the solution for the strength before --> log-loss on the held-out images
    the best strength, all images --> linear map (D) -> (C)

On the principal axes the cost depends on the number of images where these are fewer than the features, and the curvature along each axis
is known in advance, which saves most of L-BFGS's steps.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.classifier import Head
from models.errors import TrainingError
from models.files.records import Record
from models.progress import Progress, Stop, never, silent
from models.training.head.lbfgs import minimise
from models.training.job.hyperparameters import ResolvedHyperparameters

FOLDS = 5
STRENGTHS = tuple(10.0 ** (exponent / 3) for exponent in range(2, -16, -2))  # 4.6 down to 2e-5, by a factor of about 5
DEFAULT_STRENGTH = 10.0**-2  # if some class cannot be cross-validated
RISES = 2  # of the held-out loss in a row, after which weaker strengths, which cost most, are not tried
TOLERANCE = 1e-10  # of the head's loss above its minimum
ROUGH_TOLERANCE = 1e-5  # the same while strengths are compared
SMALLEST_VARIANCE = 1e-13  # of an axis, as a share of the largest; smaller ones are rounding
SMALL_STEP = 20_000_000  # multiplications, about 3 ms; for smaller steps a second thread is slower than one


class PathPoint(Record):
    """The result of cross-validation for one strength."""

    strength: float
    cv_loss: float  # mean log-loss of the images while they were held out
    cv_accuracy: float  # share of them that was right
    spread: float  # standard deviation of the accuracy over the folds


@dataclass(frozen=True, eq=False)
class Fit:
    """A head, and the held-out predictions of heads fitted in the same way."""

    head: Head
    strength: float | None  # None if each member of an ensemble has its own
    path: tuple[PathPoint, ...]  # from strong to weak
    out_of_fold: Tensor  # float32 (n, C): each image's probabilities, from a head fitted without its group


@dataclass(frozen=True, eq=False)
class Validation:
    """The cross-validated path of strengths."""

    path: tuple[PathPoint, ...]
    best: PathPoint  # of the lowest loss
    out_of_fold: Tensor  # float32 (n, C), at the best


def fit(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    groups: Tensor,
    settings: ResolvedHyperparameters,
    progress: Progress,
    stop: Stop = never,
) -> Fit:
    """Fit a head to features (n, D) and class indices (n,). Images of one of the groups (n,) stay in one fold.

    Minimises the mean cross-entropy + strength / 2 * ||W||^2 in float64, over features that are centred and scaled to a mean square of 1,
    so that the same strengths suit every backbone; the centring is folded into the bias. When `stop` returns True, the best strength so
    far is used. Raises TrainingError.
    """
    with threads_for(features.numel() * num_classes):
        problem = RegressionProblem.of(features, labels, num_classes, settings)
        found = cross_validate(problem, groups, lambda done: progress(0.9 * done), stop)
        weights = problem.solve(found.best.strength, tick=lambda done: progress(0.9 + 0.1 * done))
    progress(1.0)
    return Fit(Head.of(problem.layer(weights)), found.best.strength, found.path, found.out_of_fold)


def fit_at(
    features: Tensor, labels: Tensor, num_classes: int, strength: float, settings: ResolvedHyperparameters
) -> Head:
    """Fit a head at one strength, without cross-validation."""
    with threads_for(features.numel() * num_classes):
        problem = RegressionProblem.of(features, labels, num_classes, settings)
        return Head.of(problem.layer(problem.solve(strength)))


@contextmanager
def threads_for(multiplications: int) -> Iterator[None]:
    """Use one thread for small steps: on a busy machine they took ten times as long with two threads, which wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if multiplications < SMALL_STEP else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Axes(NamedTuple):
    """The coordinates of features: x = (features - mean) / scale @ rotation."""

    mean: Tensor  # (D,)
    scale: float
    rotation: Tensor  # (D, r), orthonormal columns

    @classmethod
    def turn(cls, features: Tensor) -> tuple["Axes", Tensor]:
        """Return the axes of features (n, D), and x (n, r) in float64, which keeps all that a linear map with a norm penalty can use."""
        x = features.double()
        mean = x.mean(dim=0)
        x = x - mean
        scale = max(float(x.square().mean().sqrt()), 1e-12)
        x /= scale
        rows, columns = x.shape
        squares, vectors = torch.linalg.eigh(x @ x.T if rows < columns else x.T @ x)
        kept = squares > SMALLEST_VARIANCE * squares[-1]
        vectors = vectors[:, kept]
        rotation = x.T @ vectors / squares[kept].sqrt() if rows < columns else vectors
        return cls(mean, scale, rotation), x @ rotation


@dataclass(frozen=True, eq=False)
class RegressionProblem:
    """A regression that can be solved at any strength, for all or some of the images."""

    axes: Axes
    x: Tensor  # float64 (n, r + 1); the last column is 1, for the bias
    labels: Tensor  # int64 (n,)
    importance: Tensor  # float64 (n,), weight of each image
    num_classes: int
    settings: ResolvedHyperparameters

    @classmethod
    def of(
        cls, features: Tensor, labels: Tensor, num_classes: int, settings: ResolvedHyperparameters
    ) -> "RegressionProblem":
        if not features.isfinite().all():
            raise TrainingError("the base's features are not finite numbers: check the base with `imago predict`")
        axes, x = Axes.turn(features)
        importance = torch.ones(len(labels), dtype=torch.float64)
        if settings.class_weight == "balanced":
            importance = class_weights(labels, num_classes).double()[labels]
        return cls(axes, F.pad(x, (0, 1), value=1.0), labels, importance, num_classes, settings)

    def solve(
        self,
        strength: float,
        rows: Tensor | slice = slice(None),
        start: Tensor | None = None,
        tolerance: float = TOLERANCE,
        tick: Progress = silent,
    ) -> Tensor:
        """Return the weights (C, r + 1), with the bias as the last column, for the given rows, starting from `start`."""
        x, importance = self.x[rows], self.importance[rows]
        loss = _Loss(x, self.labels[rows], importance / importance.sum(), strength, self.settings.label_smoothing)
        stretch = loss.curvature(self.num_classes).rsqrt()  # scales each axis to a curvature of about 1

        def objective(stretched: Tensor) -> tuple[float, Tensor]:
            value, gradient = loss(stretched * stretch)
            return value, gradient * stretch

        begin = torch.zeros(self.num_classes, x.shape[1], dtype=torch.float64) if start is None else start
        return minimise(objective, begin / stretch, self.settings.epochs, tolerance, tick) * stretch

    def layer(self, weights: Tensor) -> nn.Linear:
        """Return the float32 layer for raw features, from weights on the axes."""
        weight = weights[:, :-1] @ self.axes.rotation.T / self.axes.scale
        layer = nn.Linear(weight.shape[1], self.num_classes)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(weights[:, -1] - weight @ self.axes.mean)
        return layer


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """Return the weight of an image of each class, float32 (C,), by which all classes count equally; 1 on average over the images."""
    counts = labels.bincount(minlength=num_classes).clamp_min(1)
    return len(labels) / (int((labels.bincount() > 0).sum()) * counts)


def part_of(progress: Progress, number: int, of: int) -> Progress:
    """Return a callback that reports the progress of part `number` (from 0) as progress of the whole."""
    return lambda done: progress((number + done) / of)


# The loss


class _Loss(NamedTuple):
    """Mean cross-entropy with a penalty, and its gradient by hand, because autograd would keep four arrays (n, C)."""

    x: Tensor  # (n, r + 1)
    labels: Tensor
    importance: Tensor  # (n,), sums to 1
    strength: float
    smoothing: float

    def __call__(self, weights: Tensor) -> tuple[float, Tensor]:
        """Return the loss and its gradient (C, r + 1) at weights (C, r + 1)."""
        logits = self.x @ weights.T
        logits -= logits.logsumexp(dim=1, keepdim=True)  # log-probabilities (n, C)
        own = logits.gather(1, self.labels[:, None])[:, 0]
        entropy = -(1 - self.smoothing) * own - self.smoothing * logits.mean(dim=1)
        excess = logits.exp_().sub_(self.smoothing / logits.shape[1])
        excess[torch.arange(len(self.labels)), self.labels] -= 1 - self.smoothing
        gradient = excess.mul_(self.importance[:, None]).T @ self.x
        penalised = weights.clone()
        penalised[:, -1] = 0
        gradient += self.strength * penalised
        return float(self.importance @ entropy + self.strength / 2 * penalised.square().sum()), gradient

    def curvature(self, classes: int) -> Tensor:
        """Return the second derivative along each axis at equal probabilities, (r + 1,): p (1 - p) times the mean square, + strength."""
        found = (classes - 1) / classes**2 * (self.importance @ self.x.square())
        found[:-1] += self.strength
        return found


# Cross-validation


def cross_validate(problem: RegressionProblem, groups: Tensor, progress: Progress, stop: Stop = never) -> Validation:
    """Try strengths from strong to weak, until the held-out loss has risen twice, or `stop` returns True."""
    folds = fold_of(problem.labels, groups, problem.settings.seed)
    strengths = strengths_for(problem.labels, groups, problem.settings)
    starts: list[Tensor | None] = [None] * FOLDS
    path: list[PathPoint] = []
    kept = torch.empty(0)
    for number, strength in enumerate(strengths):
        log_probabilities = torch.zeros(len(folds), problem.num_classes)
        for fold in range(FOLDS):
            held = folds == fold
            if not held.any():  # fewer groups than folds
                continue
            progress((number + fold / FOLDS) / len(strengths))
            weights = problem.solve(strength, (~held).nonzero()[:, 0], starts[fold], ROUGH_TOLERANCE)
            starts[fold] = weights
            log_probabilities[held] = (problem.x[held] @ weights.T).log_softmax(dim=1).float()
        path.append(score(strength, log_probabilities, problem.labels, problem.importance, folds))
        if path[-1].cv_loss <= min(point.cv_loss for point in path):
            kept = log_probabilities
        elif _rising(path):
            break
        if stop():
            break
    return Validation(tuple(path), min(path, key=lambda point: point.cv_loss), kept.exp_())


def fold_of(labels: Tensor, groups: Tensor, seed: int, folds: int = FOLDS) -> Tensor:
    """Return each image's fold, int64 (n,), 0..folds - 1. Groups stay whole; those of a class are spread evenly, the large ones first."""
    _, group, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    label = torch.zeros(len(sizes), dtype=torch.int64).scatter_reduce(0, group, labels, "amax")
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed))
    for key in (-sizes, label):
        order = order[key[order].argsort(stable=True)]
    fold = torch.empty_like(order)
    fold[order] = torch.arange(len(order)) % folds
    return fold[group]


def strengths_for(labels: Tensor, groups: Tensor, settings: ResolvedHyperparameters) -> Sequence[float]:
    """Return the given weight decay, the path, or one default if a class has a single group, which cannot be held out."""
    if settings.weight_decay is not None:
        return (settings.weight_decay,)
    groups_of = torch.unique(torch.stack([labels, groups], dim=1), dim=0)[:, 0].bincount()
    return (DEFAULT_STRENGTH,) if (groups_of == 1).any() else STRENGTHS


def score(strength: float, log_probabilities: Tensor, labels: Tensor, importance: Tensor, folds: Tensor) -> PathPoint:
    """Return loss, accuracy and spread of the held-out log-probabilities (n, C) of all images."""
    own = log_probabilities.gather(1, labels[:, None])[:, 0].double()
    right = (log_probabilities.argmax(dim=1) == labels).double()
    by_fold = torch.stack([right[folds == fold].mean() for fold in range(FOLDS) if (folds == fold).any()])
    return PathPoint(
        strength=strength,
        cv_loss=float(-(importance @ own) / importance.sum()),
        cv_accuracy=float(right.mean()),
        spread=float(by_fold.std(correction=0)),
    )


def _rising(path: Sequence[PathPoint]) -> bool:
    losses = [point.cv_loss for point in path[-RISES - 1 :]]
    return len(losses) == RISES + 1 and losses == sorted(losses)
