"""The report of a run, put together from its parts, and its summary in the model's record."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from models.data.dataset import Part
from models.files import atomic_files
from models.files.records import to_json
from models.training.candidates import BaseChoice
from models.training.context import TrainingContext
from models.training.evaluation.calibrate import Calibration
from models.training.evaluation.evaluate import Evaluation, LabelError, evaluate, label_errors
from models.training.evaluation.learning_curve import LearningCurve, learning_curve
from models.training.job.job_files import REPORT, REPORT_PAGE
from models.training.job.request import Event
from models.training.network.trainer import History
from models.training.outcome.comparison import Comparison
from models.training.outcome.lineage import lineage_of
from models.training.reports import AugmentedThumbnails, Epoch, Report, html, write_tensorboard
from models.training.train import TrainingResult

SUMMARY = {"images", "accuracy", "interval", "macro_f1", "nll", "ece"}  # of an evaluation, kept with the model


def make_report(
    job: TrainingContext,
    trained: TrainingResult,
    calibration: Calibration,
    choice: BaseChoice | None,
    compared: Comparison,
) -> Report:
    """Returns the report of a run, without the version and what publishing it gives."""
    history, fitted = trained.history, trained.fit
    return Report(
        name=job.request.name,
        mode=job.mode,
        request=job.request.model_dump(mode="json"),
        effective=job.settings.model_dump(),
        audit=job.data.audit,
        layers=trained.layers,
        fresh_stages=trained.fresh,
        history=_epochs(history) if history else (),
        best_epoch=history.kept_epoch if history else None,
        stop_reason=trained.stop_reason,
        stopping=history.trade if history else None,
        path=fitted.path if fitted else (),
        strength=fitted.strength if fitted else None,
        candidates=choice,
        calibration=calibration,
        val=_evaluated(job, trained, "val"),
        test=_evaluated(job, trained, "test") if len(job.data.rows["test"]) else None,
        label_errors=_label_errors(job, trained),
        labels_checked=_checked(job, trained),
        learning_curve=_learning_curve(job, trained),
        verdict=compared.verdict,
        lineage=lineage_of(job, trained.fresh),
    )


def _epochs(history: History) -> tuple[Epoch, ...]:
    fields = ("loss", "accuracy", "val_loss", "val_accuracy", "lr", "seconds")
    seconds = [round(value, 2) for value in history.seconds]
    train, val = (history.losses, history.train_accuracies), (history.val_losses, history.accuracies)
    series = zip(*train, *val, history.learning_rates, seconds, strict=True)
    return tuple(
        Epoch(epoch=number, **dict(zip(fields, values, strict=True))) for number, values in enumerate(series, start=1)
    )


def _evaluated(job: TrainingContext, trained: TrainingResult, part: Any) -> Evaluation:
    """Evaluates a part and sends the accuracy as an event."""
    rows, data = job.data.rows[part], job.data
    found = evaluate(
        trained.probabilities(rows), data.labels[rows], data.classes, [data.paths[row] for row in rows.tolist()]
    )
    job.progress(
        Event(
            "evaluate", 1.0, accuracy=found.accuracy, message=f"{part}: {found.accuracy:.2%} of {found.images} images"
        )
    )
    return found


def _checked(job: TrainingContext, trained: TrainingResult) -> tuple[Part, ...]:
    """Returns the parts whose labels can be checked: training images by the heads of the other folds. A whole network has memorised
    the training images, so it can check only the held-out ones."""
    if trained.fit is not None:
        return ("train",)
    return ("val", "test") if len(job.data.rows["test"]) else ("val",)


def _label_errors(job: TrainingContext, trained: TrainingResult) -> tuple[LabelError, ...]:
    parts = _checked(job, trained)
    rows = torch.cat([job.data.rows[part] for part in parts])
    if trained.fit is not None:
        probabilities = trained.fit.out_of_fold[: len(rows)]
    else:
        probabilities = torch.cat([trained.probabilities(job.data.rows[part]) for part in parts])
    paths = [job.data.paths[row] for row in rows.tolist()]
    return label_errors(probabilities, job.data.labels[rows], paths, job.data.classes)


def _learning_curve(job: TrainingContext, trained: TrainingResult) -> LearningCurve | None:
    if trained.fit is None or len(trained.backbones) > 1 or job.settings.copies:
        return None
    if trained.fit.strength is None:
        raise RuntimeError("a head on one backbone has one strength")
    train, val = job.data.rows["train"], job.data.rows["val"]
    [shown], [held] = trained.features(train), trained.features(val)
    labels = job.data.labels
    return learning_curve(
        shown, labels[train], len(job.data.classes), held, labels[val], trained.fit.strength, job.settings
    )


def metrics_of(report: Report) -> dict[str, Any]:
    """Returns the metrics in the model's config.json."""
    found: dict[str, Any] = {
        part: evaluation.model_dump(mode="json", include=SUMMARY)
        | {"per_class": {name: score.recall for name, score in evaluation.per_class.items()}}
        for part, evaluation in (("val", report.val), ("test", report.test))
        if evaluation
    }
    found["calibration"] = report.calibration.model_dump(exclude={"before", "after"})
    if report.history:
        found |= {"epochs": len(report.history), "best_epoch": report.best_epoch}
    return found


def write_report(report: Report, folder: Path, thumbnails: Mapping[str, bytes], batch: AugmentedThumbnails) -> None:
    """Writes report.json, report.html with thumbnails by path and of a batch, and tensorboard/."""
    atomic_files.replace(folder / REPORT, to_json(report))
    atomic_files.replace(folder / REPORT_PAGE, html(report, thumbnails, batch).encode())
    write_tensorboard(report, folder / "tensorboard")
