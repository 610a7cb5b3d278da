"""Refuses datasets that cannot be split: classes that are too small, or whose images are all duplicates of each other."""

from collections.abc import Sequence

from torch import Tensor

from models.data import split
from models.data.audit import AuditedImages
from models.data.duplicates import groups
from models.data.samples import MAX_NAMED, NearDuplicates, counted
from models.errors import DatasetError, TooFewImages

MAX_SMALL = 100  # classes with too few images that an error names


def check_classes(train: Tensor, left_out: Tensor, classes: tuple[str, ...], least: int) -> None:
    counts = train.bincount(minlength=len(classes)).tolist()
    small = [
        (name, count, index) for index, (name, count) in enumerate(zip(classes, counts, strict=True)) if count < least
    ]
    if not small:
        return
    listed = "; ".join(
        f"class {name!r} has {counted(count, 'usable training image', 'usable training images')}"
        + _also(int((left_out == index).sum()))
        for name, count, index in small[:MAX_SMALL]
    )
    more = f"; and {len(small) - MAX_SMALL} more classes" if len(small) > MAX_SMALL else ""
    why = "to train and to validate on" if least == 2 else "by min_per_class (--min-per-class)"
    raise TooFewImages(
        f"{len(small)} of {len(classes)} classes {'is' if len(small) == 1 else 'are'} too small: {listed}{more}: at least {least} are "
        f"needed, {why}; add images, or remove the class",
        "min_per_class" if least > 2 else None,
    )


def _also(count: int) -> str:
    return f" ({counted(count, 'more is', 'more are')} identical to images of validation or test)" if count else ""


def check_apart(images: AuditedImages, train: Tensor, near: NearDuplicates) -> None:
    """Raises DatasetError for classes with nothing to hold out because all their images are duplicates. `near`: how to treat them."""
    if near != "group":
        return
    alone = split.lonely(images.groups, images.labels, train)
    if not alone:
        return
    identical = [label for label in split.lonely(groups.equal(images.digests), images.labels, train) if label in alone]
    alike = [label for label in alone if label not in identical]
    said = [f"all images of {_classes(images, identical)} are one picture, pixel by pixel"] if identical else []
    said += [f"all images of {_classes(images, alike)} are taken for near-duplicates"] if alike else []
    off = ", --near-duplicates off does not search" if alike else ""
    raise DatasetError(
        f"{', and '.join(said)}; duplicates stay on one side of the split, so none is left for the other: add different images, or "
        f"--near-duplicates report splits them like other images and lists them{off}",
        "near_duplicates",
    )


def _classes(images: AuditedImages, labels: Sequence[int]) -> str:
    names = ", ".join(repr(images.classes[label]) for label in labels[:MAX_NAMED])
    more = f" and {len(labels) - MAX_NAMED} more" if len(labels) > MAX_NAMED else ""
    return f"{'class' if len(labels) == 1 else 'classes'} {names}{more}"
