"""The report of a training run: a record (JSON), a page (HTML), and event files for TensorBoard."""

from models.training.reports.page import html
from models.training.reports.record import AugmentedThumbnails, Epoch, Parity, Report
from models.training.reports.tensorboard import write_tensorboard

__all__ = ["AugmentedThumbnails", "Epoch", "Parity", "Report", "html", "write_tensorboard"]
