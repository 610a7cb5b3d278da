"""Thumbnails for the audit and the report: of the images that they name, and of augmented training images."""

from contextlib import suppress
from io import BytesIO

from PIL import Image
from torch import Tensor

from models.data.samples import UNREADABLE
from models.data.sources import open_source
from models.errors import ImageError
from models.images.decoding import decode
from models.training.context import TrainingContext
from models.training.network.batches import AugmentedImages
from models.training.reports import AugmentedThumbnails, Report

THUMBNAIL = 96  # pixels
MOST_SHOWN = 50  # of bad files, and of duplicates


def odd_ones(job: TrainingContext) -> dict[str, bytes]:
    """Returns thumbnails by path of the first duplicates, and of the first bad files that can be decoded."""
    audit, shape = job.data.audit, job.bases[0].preprocessing
    groups = (*audit.conflicts, *audit.duplicates, *audit.near_duplicates)
    twice = dict.fromkeys([path for group in groups for path in group][:MOST_SHOWN])
    shown = {path: jpeg(job.data.pixels[row]) for row, path in enumerate(job.data.paths) if path in twice}
    if not (bad := {file.path for file in audit.bad[:MOST_SHOWN]}):
        return shown
    with open_source(job.request.dataset, job.reading) as source:
        for item in source.items:
            if item.path in bad:
                with suppress(ImageError, *UNREADABLE):
                    shown[item.path] = jpeg(decode(source.read(item.file), shape, job.limits.of_training()))
    return shown


def thumbnails(job: TrainingContext, report: Report) -> dict[str, bytes]:
    """Returns thumbnails by path of the mistakes and of the labels that are probably wrong."""
    evaluated = [part for part in (report.test, report.val) if part]
    wanted = {mistake.path for part in evaluated for mistake in part.mistakes}
    wanted |= {error.path for error in report.label_errors}
    places = {path: row for row, path in enumerate(job.data.paths) if path in wanted}
    return {path: jpeg(job.data.pixels[row]) for path, row in places.items()}


def training_batch(sample: AugmentedImages, classes: tuple[str, ...]) -> AugmentedThumbnails:
    """Returns thumbnails of a training batch, each with its label or label shares."""
    captions = (caption(label, classes) for label in sample.labels)
    return AugmentedThumbnails(sample.said, tuple(zip(captions, map(jpeg, sample.pixels), strict=True)))


def caption(label: Tensor, classes: tuple[str, ...]) -> str:
    """Returns the name of a label (), or of its shares (classes,) after mixup: `cat`, `70% cat, 30% dog`."""
    if label.ndim == 0:
        return classes[int(label)]
    shares = [(float(share), name) for share, name in zip(label, classes, strict=True) if share > 0]
    return ", ".join(f"{share:.0%} {name}" for share, name in sorted(shares, reverse=True))


def jpeg(pixels: Tensor) -> bytes:
    """Encodes uint8 (C, H, W) as a square JPEG."""
    rows = pixels.permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(rows if rows.shape[2] == 3 else rows[:, :, 0])
    buffer = BytesIO()
    image.resize((THUMBNAIL, THUMBNAIL)).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
