"""Compares bases by the accuracy of cross-validated heads on their features, and by their latency."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from models.errors import TrainingError
from models.files.records import Record
from models.progress import Progress, Stop, never
from models.training.head.regression import RegressionProblem, cross_validate, part_of, threads_for
from models.training.job.hyperparameters import ResolvedHyperparameters


@dataclass(frozen=True, eq=False)
class BaseCandidate:
    """A base to choose from, with its features for the training images."""

    name: str
    features: Tensor  # float32 (n, D)
    latency_ms: float  # for one image, on this machine


class ScoredBase(Record):
    """A candidate's row in the table."""

    name: str
    accuracy: float  # of images while they were held out, at the best strength
    spread: float  # standard deviation over the folds
    latency_ms: float | None = None  # base auto: of one image
    seconds: float | None = None  # mode scratch: of training on one fold, the mean
    seconds_spread: float | None = None  # standard deviation over the folds


class BaseChoice(Record):
    """All candidates, the most accurate first, and the chosen one."""

    best: str
    max_latency_ms: float | None = None
    candidates: tuple[ScoredBase, ...]
    folds: int | None = None  # mode scratch, as are the epochs: of each fold's training
    epochs: int | None = None

    @property
    def seconds(self) -> float:
        """Return the seconds of training on all folds."""
        return (self.folds or 0) * sum(scored.seconds or 0.0 for scored in self.candidates)


def choose(
    candidates: Sequence[BaseCandidate],
    labels: Tensor,
    groups: Tensor,
    num_classes: int,
    settings: ResolvedHyperparameters,
    max_latency_ms: float | None,
    progress: Progress,
    stop: Stop = never,
) -> BaseChoice:
    """Choose the most accurate candidate that is fast enough; among equals the faster. Labels and groups (n,) are those of the features.

    When `stop` returns True, the remaining candidates are compared at the strongest penalty only. Raises TrainingError if none is fast
    enough.
    """
    fast = [c for c in candidates if max_latency_ms is None or c.latency_ms <= max_latency_ms]
    if not fast:
        nearest = min(candidates, key=lambda c: c.latency_ms)
        raise TrainingError(
            f"no base answers within max_latency_ms {max_latency_ms:g}: the fastest, {nearest.name}, takes {nearest.latency_ms:.1f} ms; "
            "allow more, or pull a smaller network"
        )
    scored = []
    for number, candidate in enumerate(candidates):
        with threads_for(candidate.features.numel() * num_classes):
            problem = RegressionProblem.of(candidate.features, labels, num_classes, settings)
            found = cross_validate(problem, groups, part_of(progress, number, len(candidates)), stop).best
        scored.append(_scored(candidate, found.cv_accuracy, found.spread))
    table, names = ranked(scored), {c.name for c in fast}
    best = next(s for s in table if s.name in names)
    return BaseChoice(best=best.name, max_latency_ms=max_latency_ms, candidates=table)


def ranked(scored: Sequence[ScoredBase]) -> tuple[ScoredBase, ...]:
    """Return the candidates sorted: the most accurate first, among equals the cheaper."""
    return tuple(sorted(scored, key=lambda s: (-s.accuracy, s.latency_ms or 0.0, s.seconds or 0.0)))


def _scored(candidate: BaseCandidate, accuracy: float, spread: float) -> ScoredBase:
    return ScoredBase(
        name=candidate.name,
        accuracy=round(accuracy, 6),
        spread=round(spread, 6),
        latency_ms=round(candidate.latency_ms, 3),
    )
