"""Chooses an architecture to train from scratch: each is trained for a few epochs on every fold of the training part.

training rows --fold_of--> folds
each architecture, each fold: train on the other folds --> accuracy on this fold, seconds --> selection.json in the job's folder

A finished fold is never trained again, and an unfinished one resumes from its checkpoint, so a killed run makes the same choice.
"""

import statistics
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from models import architectures
from models.data.samples import Part
from models.errors import TrainingError
from models.files import atomic_files
from models.files.records import Record, read_record, to_json
from models.training import train
from models.training.bases import Base
from models.training.candidates import BaseChoice, ScoredBase, ranked
from models.training.context import TrainingContext
from models.training.head.regression import fold_of
from models.training.job.request import Budget, EarlyStopping, Event
from models.training.network import checkpoint

RESULTS = "selection.json"
ALL_EPOCHS = EarlyStopping(criterion="none", keep="last")


class FoldResult(Record):
    """One architecture, trained without one fold and tested on it."""

    architecture: str
    fold: int  # from 0
    accuracy: float  # of the last epoch's weights on the fold's images
    seconds: float  # of training and validation


class FoldResults(Record):
    """The folds that are finished."""

    results: tuple[FoldResult, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> "FoldResults":
        path = folder / RESULTS
        return read_record(path, cls) if path.exists() else cls()

    def write(self, folder: Path) -> None:
        atomic_files.replace(folder / RESULTS, to_json(self))

    def of(self, architecture: str) -> list[FoldResult]:
        return [result for result in self.results if result.architecture == architecture]

    @property
    def seconds(self) -> float:
        return sum(result.seconds for result in self.results)


def choose_architecture(job: TrainingContext) -> BaseChoice:
    """Return the most accurate of `job.bases` over the folds; among equals the quickest to train.

    Raises TrainingError for fewer different images than folds, a loss that is no longer finite, and a run that ends before every fold is
    trained.
    """
    folds, held = job.request.selection_folds, folds_of(job)
    trials = [(base, fold) for base in job.bases for fold in range(folds)]
    finished = FoldResults.read(job.folder)
    with job.clock.phase("select"):
        for number, (base, fold) in enumerate(trials):
            if fold in (result.fold for result in finished.of(base.architecture)):
                continue
            one = _one_fold(job, base, held == fold, finished.seconds, (number, len(trials)))
            result = _train_fold(one, fold, job.folder / f"selection-{job.bases.index(base)}-{fold}.pt")
            finished = FoldResults(results=(*finished.results, result))
            finished.write(job.folder)
            said = f"{base.name}, fold {fold + 1} of {folds}: accuracy {result.accuracy:.2%} in {result.seconds:.1f} s"
            job.progress(Event("select", (number + 1) / len(trials), message=said))
    best, *rest = ranked([_scored(base, finished) for base in job.bases])
    said = f"{best.name} is trained in full: {best.accuracy:.2%} ± {best.spread:.2%} over {folds} folds"
    job.progress(Event("select", 1.0, message=said))
    return BaseChoice(best=best.name, candidates=(best, *rest), folds=folds, epochs=epochs_of(job))


def epochs_of(job: TrainingContext) -> int:
    """Return the epochs on each fold, never more than those of the full training."""
    return min(job.request.fold_epochs, job.settings.epochs)


def folds_of(job: TrainingContext) -> Tensor:
    """Return the fold of each training image, int64 (n,); classes are spread evenly, and duplicates share a fold."""
    rows, folds = job.data.rows["train"], job.request.selection_folds
    groups = job.data.groups[rows]
    different = len(torch.unique(groups))
    if different < folds:
        raise TrainingError(
            f"{folds} folds need as many different training images, and there are {different}: ask for fewer folds"
        )
    return fold_of(job.data.labels[rows], groups, job.settings.seed, folds)


def discard(folder: Path) -> None:
    """Remove the results after the choice is recorded, so that the next run in this folder makes its own."""
    (folder / RESULTS).unlink(missing_ok=True)


# One fold


def _one_fold(job: TrainingContext, base: Base, held: Tensor, spent: float, place: tuple[int, int]) -> TrainingContext:
    """Return the job of training `base` on the training part without the images `held` (n,); `spent` seconds of the budget are used."""
    number, of = place
    pixels, digests = job.pixels(base.preprocessing)
    rows = job.data.rows["train"]
    parts: dict[Part, Tensor] = {"train": rows[~held], "val": rows[held], "test": rows[:0]}
    limit = job.request.budget.max_seconds
    if limit is not None and spent >= limit:
        raise _ended("budget")
    budget = Budget(max_seconds=None if limit is None else limit - spent)
    batch_size = min(job.settings.batch_size, max(len(parts["train"]), 2))
    return replace(
        job,
        request=job.request.model_copy(update={"early_stopping": ALL_EPOCHS, "budget": budget}),
        progress=lambda event: job.progress(Event("select", (number + event.progress) / of, message=event.message)),
        data=replace(job.data, pixels=pixels, digests=digests, rows=parts),
        bases=(base,),
        settings=job.settings.model_copy(update={"epochs": epochs_of(job), "batch_size": batch_size}),
        _pixels={},
    )


def _train_fold(job: TrainingContext, fold: int, path: Path) -> FoldResult:
    """Train one fold. Every architecture starts it from the same seed, and gets its images in the same order."""
    [base] = job.bases
    torch.manual_seed(job.settings.seed + fold)
    network = architectures.create(base.architecture, len(job.data.classes), base.preprocessing.channels)
    try:
        history = train.fit_network(job, nn.Sequential(network.backbone, network.layer).to(job.device), path)
    except TrainingError as error:
        raise TrainingError(f"{base.name}, fold {fold + 1}: {error}") from None
    if history.stop_reason:
        raise _ended(history.stop_reason)
    checkpoint.remove(path)
    return FoldResult(
        architecture=base.architecture,
        fold=fold,
        accuracy=history.accuracies[-1],
        seconds=round(sum(history.seconds), 3),
    )


def _ended(reason: str) -> TrainingError:
    why = "was stopped" if reason == "stopped" else "has used up budget.max_seconds"
    return TrainingError(
        f"the run {why} before an architecture was chosen, so there is no model to keep; finished folds are kept, "
        "and the same request goes on from there"
    )


def _scored(base: Base, finished: FoldResults) -> ScoredBase:
    """Return the means and standard deviations over the folds."""
    accuracies = [result.accuracy for result in finished.of(base.architecture)]
    seconds = [result.seconds for result in finished.of(base.architecture)]
    return ScoredBase(
        name=base.name,
        accuracy=round(statistics.fmean(accuracies), 6),
        spread=round(statistics.pstdev(accuracies), 6),
        seconds=round(statistics.fmean(seconds), 3),
        seconds_spread=round(statistics.pstdev(seconds), 3),
    )
