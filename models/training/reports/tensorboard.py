"""The curves of a run as TensorBoard event files. `pip install imago[tensorboard]`."""

import logging
from pathlib import Path

from models.training.reports.record import Report

log = logging.getLogger(__name__)


def write_tensorboard(report: Report, folder: Path) -> None:
    """Writes scalars by epoch, or by the strength of the head's penalty; then the metrics on validation and test images.

    Without tensorboardX it writes nothing but a line in the log. Raises OSError.
    """
    try:
        from tensorboardX import SummaryWriter  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        log.warning("no TensorBoard event files are written: pip install 'imago[tensorboard]'")
        return
    with SummaryWriter(str(folder)) as writer:
        for tag, step, value in scalars(report):
            writer.add_scalar(tag, value, step)


def scalars(report: Report) -> list[tuple[str, int, float]]:
    """Returns (tag, step, value) in the order in which they are written."""
    found: list[tuple[str, int, float | None]] = []
    for epoch in report.history:
        found += [("loss/train", epoch.epoch, epoch.loss), ("loss/val", epoch.epoch, epoch.val_loss)]
        found += [("accuracy/train", epoch.epoch, epoch.accuracy), ("accuracy/val", epoch.epoch, epoch.val_accuracy)]
        found.append(("lr", epoch.epoch, epoch.lr))
    for number, point in enumerate(report.path):
        found += [("head/strength", number, point.strength), ("head/cv_loss", number, point.cv_loss)]
        found.append(("head/cv_accuracy", number, point.cv_accuracy))
    for part, evaluation in (("val", report.val), ("test", report.test)):
        if evaluation:
            found += [(f"final/{part}_accuracy", 0, evaluation.accuracy), (f"final/{part}_nll", 0, evaluation.nll)]
    return [(tag, step, value) for tag, step, value in found if value is not None]
