"""What a run has found out, put together."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models import files
from models.records import to_json
from models.training.calibrate import Calibration
from models.training.comparison import Compared
from models.training.curve import LearningCurve, learning_curve
from models.training.evaluate import Evaluation, LabelError, evaluate, label_errors
from models.training.fitting import Trained
from models.training.handover import REPORT, REPORT_PAGE
from models.training.job import Job
from models.training.lineage import lineage_of
from models.training.network import History
from models.training.report import Epoch, Report, html, write_tensorboard
from models.training.request import Event
from models.training.select import Choice

SUMMARY = {"images", "accuracy", "interval", "macro_f1", "nll", "ece"}  # of an evaluation, kept with the model


def make_report(
    job: Job, trained: Trained, calibration: Calibration, choice: Choice | None, compared: Compared
) -> Report:
    history, fitted = trained.history, trained.fit
    return Report(
        name=job.request.name,
        mode=job.mode,
        request=job.request.model_dump(mode="json"),
        effective=asdict(job.settings),
        audit=job.data.audit,
        history=_epochs(history) if history else (),
        best_epoch=history.best_epoch if history else None,
        stop_reason=trained.stop_reason,
        stopping=history.trade if history else None,
        path=fitted.path if fitted else (),
        strength=fitted.strength if fitted else None,
        candidates=choice,
        calibration=calibration,
        val=_evaluated(job, trained, "val"),
        test=_evaluated(job, trained, "test") if len(job.data.rows["test"]) else None,
        label_errors=_label_errors(job, trained),
        learning_curve=_learning_curve(job, trained),
        verdict=compared.verdict,
        lineage=lineage_of(job),
    )


def _epochs(history: History) -> tuple[Epoch, ...]:
    series = (history.losses, history.val_losses, history.accuracies, history.learning_rates, history.seconds)
    return tuple(
        Epoch(epoch=number, loss=loss, val_loss=val_loss, val_accuracy=accuracy, lr=lr, seconds=round(seconds, 2))
        for number, (loss, val_loss, accuracy, lr, seconds) in enumerate(zip(*series, strict=True), start=1)
    )


def _evaluated(job: Job, trained: Trained, part: Any) -> Evaluation:
    """Validation chose epoch and temperature, and so flatters; test images, where there are such, are seen for the first time."""
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


def _label_errors(job: Job, trained: Trained) -> tuple[LabelError, ...]:
    """Of the training images, by heads that were not shown them; mode head alone has such."""
    if trained.fit is None:
        return ()
    rows = job.data.rows["train"]
    paths = [job.data.paths[row] for row in rows.tolist()]
    return label_errors(trained.fit.out_of_fold[: len(rows)], job.data.labels[rows], paths, job.data.classes)


def _learning_curve(job: Job, trained: Trained) -> LearningCurve | None:
    if trained.fit is None or len(trained.backbones) > 1 or job.settings.copies:
        return None
    train, val = job.data.rows["train"], job.data.rows["val"]
    [shown], [held] = trained.features(train), trained.features(val)
    labels = job.data.labels
    return learning_curve(
        shown, labels[train], len(job.data.classes), held, labels[val], trained.fit.strength, job.settings
    )


def metrics_of(report: Report) -> dict[str, Any]:
    """What stands in the model's config.json."""
    found: dict[str, Any] = {
        part: _summary(evaluation) for part, evaluation in (("val", report.val), ("test", report.test)) if evaluation
    }
    found["calibration"] = {
        "temperature": report.calibration.temperature,
        "ece_before": report.calibration.ece_before,
        "ece_after": report.calibration.ece_after,
    }
    if report.history:
        found |= {"epochs": len(report.history), "best_epoch": report.best_epoch}
    return found


def _summary(evaluation: Evaluation) -> dict[str, Any]:
    recalls = {name: score.recall for name, score in evaluation.per_class.items()}
    return evaluation.model_dump(mode="json", include=SUMMARY) | {"per_class": recalls}


def write_report(report: Report, folder: Path, thumbnails: Mapping[str, bytes]) -> None:
    """report.json, report.html with pictures by path, and tensorboard/ beside them."""
    files.replace(folder / REPORT, to_json(report))
    files.replace(folder / REPORT_PAGE, html(report, thumbnails).encode())
    write_tensorboard(report, folder / "tensorboard")
