"""A linear head on fixed features: multinomial logistic regression by L-BFGS, its strength chosen by cross-validation.

    features (n, D) --centre, scale, turn to the principal axes--> x (n, r), r <= min(n, D)
    each strength, from strong to weak: k folds, each started from the strength before --> log-loss on the images held out
    the best strength, all images --> linear map (D) -> (C)

On the principal axes, images that are fewer than the features cost their own number and not D, and the curvature along each axis is
known in advance, which saves L-BFGS most of its steps.
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
STRENGTHS = tuple(
    10.0 ** (exponent / 3) for exponent in range(2, -16, -2)
)  # 4.6 down to 2e-5, each a fifth of the one before
DEFAULT_STRENGTH = 10.0**-2  # where some class cannot be cross-validated
RISES = 2  # of the held-out loss in a row, after which weaker strengths are not tried: they are the costly ones
TOLERANCE, ROUGH_TOLERANCE = (
    1e-10,
    1e-5,
)  # of the loss above its minimum: of the head itself, and while strengths are compared
SMALLEST_VARIANCE = 1e-13  # of an axis, over the largest: below is rounding
SMALL_STEP = 20_000_000  # multiplications, some 3 ms: below, a second thread is not worth waiting for


class PathPoint(Record):
    """What cross-validation says of one strength."""

    strength: float
    cv_loss: float  # mean log-loss of the images while they were held out
    cv_accuracy: float  # their share that was right
    spread: float  # standard deviation of the accuracy over the folds


@dataclass(frozen=True, eq=False)
class Fit:
    """A head, and what the same recipe answers for images that it was not shown."""

    head: Head
    strength: float
    path: tuple[PathPoint, ...]  # from strong to weak
    out_of_fold: Tensor  # float32 (n, C): each image's probabilities, from a head fitted without its group


@dataclass(frozen=True, eq=False)
class Validation:
    """A path of strengths, cross-validated."""

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
    """Features (n, D), class indices (n,) and groups (n,), of which none is torn apart by a fold -> the head D -> num_classes.

    Minimises the mean cross-entropy + strength / 2 * ||W||^2 in float64, over features that are centred and brought to a mean square
    of 1, so that the same strengths suit every backbone; the centring is folded into the bias. When `stop` says yes, the best of the
    strengths that have been tried is taken. Raises TrainingError.
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
    """The head at one strength, without cross-validation."""
    with threads_for(features.numel() * num_classes):
        problem = RegressionProblem.of(features, labels, num_classes, settings)
        return Head.of(problem.layer(problem.solve(strength)))


@contextmanager
def threads_for(multiplications: int) -> Iterator[None]:
    """One thread while the steps are small: on a busy machine they took ten times as long with two, which wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if multiplications < SMALL_STEP else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Axes(NamedTuple):
    """Where the features' coordinates come from: x = (features - mean) / scale @ rotation."""

    mean: Tensor  # (D,)
    scale: float
    rotation: Tensor  # (D, r), orthonormal columns

    @classmethod
    def turn(cls, features: Tensor) -> tuple["Axes", Tensor]:
        """Features (n, D) -> axes, and x (n, r) in float64; nothing that a linear map with a penalty on its norm could use is lost."""
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
    """A regression to be solved at any strength, for all images or some of them."""

    axes: Axes
    x: Tensor  # float64 (n, r + 1); the last column is 1, for the bias
    labels: Tensor  # int64 (n,)
    importance: Tensor  # float64 (n,): what an image counts
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
        """Weights (C, r + 1), the last column the bias, of the given rows, begun at `start`."""
        x, importance = self.x[rows], self.importance[rows]
        loss = _Loss(x, self.labels[rows], importance / importance.sum(), strength, self.settings.label_smoothing)
        stretch = loss.curvature(self.num_classes).rsqrt()  # of each axis, until its curvature is about 1

        def objective(stretched: Tensor) -> tuple[float, Tensor]:
            value, gradient = loss(stretched * stretch)
            return value, gradient * stretch

        begin = torch.zeros(self.num_classes, x.shape[1], dtype=torch.float64) if start is None else start
        return minimise(objective, begin / stretch, self.settings.epochs, tolerance, tick) * stretch

    def layer(self, weights: Tensor) -> nn.Linear:
        """Weights on the axes -> the layer for the features as they come, float32."""
        weight = weights[:, :-1] @ self.axes.rotation.T / self.axes.scale
        layer = nn.Linear(weight.shape[1], self.num_classes)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(weights[:, -1] - weight @ self.axes.mean)
        return layer


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """float32 (C,): what an image of each class counts so that every class counts the same, 1 on average over the images."""
    counts = labels.bincount(minlength=num_classes).clamp_min(1)
    return len(labels) / (int((labels.bincount() > 0).sum()) * counts)


# The loss


class _Loss(NamedTuple):
    """Mean cross-entropy with a penalty, and its gradient written out: autograd would keep four arrays of (n, C)."""

    x: Tensor  # (n, r + 1)
    labels: Tensor
    importance: Tensor  # (n,), sums to 1
    strength: float
    smoothing: float

    def __call__(self, weights: Tensor) -> tuple[float, Tensor]:
        """Weights (C, r + 1) -> loss, gradient (C, r + 1)."""
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
        """(r + 1,): the second derivative along each axis at equal probabilities: p (1 - p) times the mean square, + strength."""
        found = (classes - 1) / classes**2 * (self.importance @ self.x.square())
        found[:-1] += self.strength
        return found


# Cross-validation


def cross_validate(problem: RegressionProblem, groups: Tensor, progress: Progress, stop: Stop = never) -> Validation:
    """Try strengths from strong to weak, until the held-out loss has risen twice, or `stop` says yes."""
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
    """int64 (n,): each image's fold, 0..folds - 1. Groups stay whole; those of a class are dealt out evenly, the large ones first."""
    _, group, sizes = torch.unique(groups, return_inverse=True, return_counts=True)
    label = torch.zeros(len(sizes), dtype=torch.int64).scatter_reduce(0, group, labels, "amax")
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed))
    for key in (-sizes, label):
        order = order[key[order].argsort(stable=True)]
    fold = torch.empty_like(order)
    fold[order] = torch.arange(len(order)) % folds
    return fold[group]


def strengths_for(labels: Tensor, groups: Tensor, settings: ResolvedHyperparameters) -> Sequence[float]:
    """The given weight decay, or the path; a class whose images are all of one group would be unknown whenever it is held out."""
    if settings.weight_decay is not None:
        return (settings.weight_decay,)
    groups_of = torch.unique(torch.stack([labels, groups], dim=1), dim=0)[:, 0].bincount()
    return (DEFAULT_STRENGTH,) if (groups_of == 1).any() else STRENGTHS


def score(strength: float, log_probabilities: Tensor, labels: Tensor, importance: Tensor, folds: Tensor) -> PathPoint:
    """Held-out log-probabilities (n, C) of all images -> what they say."""
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
