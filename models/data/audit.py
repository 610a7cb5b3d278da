"""The audit of a dataset before training: bad files, duplicates, conflicting labels, sizes of the classes.

A file is bad if it cannot be decoded, or if it would mislead: an animation, of which only one frame would be used, and a single
drawing among photographs, which is usually a placeholder ("image not found").
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

from PIL import Image
from pydantic import Field
from torch import Tensor

from models.data.duplicates.groups import Near, equal
from models.data.samples import PARTS, DatasetItem, IgnoredFiles, Part, counted
from models.errors import EmptyImage, ImageError, UnsupportedImage
from models.files.records import Record
from models.images import formats

LISTS = ("bad", "duplicates", "near_duplicates", "conflicts", "left_out")
MAX_LISTED = 1000  # entries of each list; `totals` has the full counts
MAX_GROUP = 100  # paths of one group
TINY = 10  # a class with fewer training images gets a warning
MAX_IMBALANCE = 10.0

# A drawing has few colours in a picture large enough for many, in a lossless file
DRAWN_COLOURS = 64
DRAWN_PIXELS = 64 * 64
DRAWN_BYTES = 0.25  # per pixel, at most: a photograph as PNG takes 1.5 and more
MAX_DRAWN = 0.05  # share of the dataset and of the class: if there are more, the dataset is about drawings


class BadFile(Record):
    """A file that is left out, with the reason."""

    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class AuditedImages:
    """The N usable images."""

    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: Tensor  # int64 (N,)
    digests: tuple[bytes, ...]  # of their pixels
    groups: Tensor  # int64 (N,): images that a split keeps on one side share a number
    near: tuple[Near, ...] = ()  # groups of near-duplicates


class Audit(Record):
    """The findings. Paths are relative to the dataset. Lists end at 1,000 entries and groups at 100 paths; `totals` has the full counts."""

    layout: str  # the recognised layout, in words
    files: int
    images: int  # usable ones
    bad: tuple[BadFile, ...]
    duplicates: tuple[tuple[str, ...], ...]  # paths with equal pixels
    near_duplicates: tuple[tuple[str, ...], ...]  # paths of one photograph in several versions
    near_rules: tuple[str, ...] = ()  # the rule that found each group of `near_duplicates`
    conflicts: tuple[tuple[str, ...], ...]  # paths with equal pixels under more than one label
    left_out: tuple[str, ...]  # training (or validation) images whose equals are in validation or test
    totals: dict[str, int]  # of each list above, by its name
    parts: dict[Part, int]  # images
    class_counts: dict[Part, dict[str, int]]
    imbalance: float  # size of the largest training class over that of the smallest
    warnings: tuple[str, ...]
    # Neither good nor bad: files left by operating systems, text files, files outside class folders.
    ignored: tuple[IgnoredFiles, ...] = ()
    # Number of usable images by bit depth and channels, the most frequent first.
    image_kinds: dict[str, int] = Field(default_factory=dict)


# One file


def reason_of(error: ImageError, data: bytes) -> str:
    """Returns why these bytes, which could not be decoded, are not a usable image."""
    if isinstance(error, EmptyImage):
        return "zero bytes"
    if not isinstance(error, UnsupportedImage):
        return str(error)
    what, _, remedy = formats.described(data).partition("; ")
    return f"not an image: {what}" + (f"; {remedy}" if remedy and "send" not in remedy else "")  # nothing is sent here


def is_animated(data: bytes) -> bool:
    """Whether a GIF, PNG or WebP that decodes has more than one frame. (A JPEG with a preview or depth map is one photograph.)"""
    if data.startswith(b"\x89PNG"):
        control = data.find(b"acTL", 0, data.find(b"IDAT"))
        return control > 0 and int.from_bytes(data[control + 4 : control + 8], "big") > 1
    if data.startswith(b"RIFF"):
        return data[12:16] == b"VP8X" and bool(data[20] & 2) and data.count(b"ANMF") > 1
    if not data.startswith(b"GIF8"):
        return False
    with Image.open(BytesIO(data), formats=("GIF",)) as image:
        try:
            image.seek(1)  # reads no further than the second frame
        except Exception:  # EOFError, or whatever Pillow makes of a damaged second frame, which nobody will look at
            return False
    return True


def drawn_colours(data: bytes) -> tuple[int, int, int] | None:
    """Returns the number of colours, width and height of a decodable GIF or PNG with fewer colours than any photograph; else None."""
    if data.startswith(b"\x89PNG"):
        width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    elif data.startswith(b"GIF8"):
        width, height = int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")
    else:
        return None
    if width * height < DRAWN_PIXELS or len(data) > DRAWN_BYTES * width * height:
        return None
    with Image.open(BytesIO(data), formats=("GIF", "PNG")) as image:
        colours = image.getcolors(DRAWN_COLOURS)
    return (len(colours), width, height) if colours else None


def odd_drawings(items: Sequence[DatasetItem], drawn: dict[int, tuple[int, int, int]]) -> dict[int, str]:
    """Returns the drawings that stand out among photographs, by index in `items`, with the reason. `drawn`: all drawings by index."""
    if not 0 < len(drawn) <= MAX_DRAWN * len(items):
        return {}
    sizes = Counter(item.class_name for item in items)
    found = Counter(items[place].class_name for place in drawn)
    few = {name for name, count in found.items() if count <= max(1, MAX_DRAWN * sizes[name])}
    return {
        place: f"no photograph, unlike the other files: {colours} colours in {width} x {height} pixels"
        for place, (colours, width, height) in drawn.items()
        if items[place].class_name in few
    }


# All of them


def make_audit(
    images: AuditedImages,
    rows: dict[Part, Tensor],
    left_out: Tensor,
    files: int,
    bad: Sequence[BadFile] = (),
    remarks: Sequence[str] = (),
    *,
    layout: str,
    ignored: Sequence[IgnoredFiles] = (),
    image_kinds: Sequence[str] = (),
) -> Audit:
    """Builds the audit. `rows`: int64 (n,) of each part; `left_out`: the rows of no part; `files`: the number of all files; `remarks`:
    further warnings; `image_kinds`: the kind of each usable image."""
    paths, labels, classes = images.paths, images.labels, images.classes
    duplicates = _groups(equal(images.digests))
    near = [near.rows for near in images.near]
    conflicts = [group for group in duplicates if len(set(labels[group].tolist())) > 1]
    sizes = [len(bad), len(duplicates), len(near), len(conflicts), len(left_out)]
    counts = {part: labels[rows[part]].bincount(minlength=len(classes)).tolist() for part in PARTS}
    audit = Audit(
        layout=layout,
        files=files,
        images=len(paths),
        bad=tuple(bad[:MAX_LISTED]),
        duplicates=_named(duplicates, paths),
        near_duplicates=_named(near, paths),
        near_rules=tuple(near.rule for near in images.near[:MAX_LISTED]),
        conflicts=_named(conflicts, paths),
        left_out=tuple(paths[row] for row in left_out[:MAX_LISTED].tolist()),
        totals=dict(zip(LISTS, sizes, strict=True)),
        parts={part: len(rows[part]) for part in PARTS},
        class_counts={part: dict(zip(classes, counts[part], strict=True)) for part in PARTS},
        imbalance=round(max(counts["train"]) / max(1, min(counts["train"])), 2),
        warnings=(),
        ignored=tuple(ignored),
        image_kinds=dict(Counter(image_kinds).most_common()),
    )
    return audit.model_copy(update={"warnings": (*_warnings(audit), *remarks)})


def _groups(numbers: Tensor) -> list[list[int]]:
    """Returns the groups of rows that share a number, in order of first appearance. `numbers`: int64 (N,)."""
    sizes = numbers.bincount()
    found: dict[int, list[int]] = {}
    for row in (sizes[numbers] > 1).nonzero()[:, 0].tolist():
        found.setdefault(int(numbers[row]), []).append(row)
    return list(found.values())


def _named(groups: Sequence[Sequence[int]], paths: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(paths[row] for row in group[:MAX_GROUP]) for group in groups[:MAX_LISTED])


def _warnings(audit: Audit) -> list[str]:
    """Returns warnings as sentences, the most serious first."""
    found, totals = [], audit.totals
    if audit.bad:
        first = audit.bad[0]
        found.append(
            f"{totals['bad']} of {counted(audit.files, 'file', 'files')} {'is' if totals['bad'] == 1 else 'are'} bad and left out, "
            f"the first {first.path}: {first.reason}"
        )
    if audit.conflicts:
        found.append(
            f"{counted(totals['conflicts'], 'identical picture has', 'identical pictures have')} more than one label, the first "
            f"{_some(audit.conflicts[0])}: remove the wrong ones"
        )
    if audit.left_out:
        found.append(
            f"{counted(totals['left_out'], 'image is', 'images are')} left out of training (or validation), identical to one of "
            f"validation or test, pixel by pixel, which would flatter the figures: {_some(audit.left_out)}"
        )
    return found + _class_warnings(audit)


def _class_warnings(audit: Audit) -> list[str]:
    found, train = [], audit.class_counts["train"]
    if tiny := [f"{name} ({count})" for name, count in train.items() if count < TINY]:
        found.append(f"fewer than {TINY} training images in {_some(tiny)}: expect low accuracy there")
    if audit.imbalance > MAX_IMBALANCE:
        found.append(
            f"the largest class has {audit.imbalance:g} times the training images of the smallest: "
            'consider class_weight "balanced", and look at the accuracy of each class'
        )
    for part in ("val", "test"):
        missing = [name for name, count in audit.class_counts[part].items() if not count]
        if audit.parts[part] and missing:
            found.append(f"no image in {part} of {_some(missing)}: the accuracy there is not measured")
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
