"""What a dataset is like, file by file, before anything is trained on it: bad files, duplicates, conflicts, sizes.

A file is bad where `images.decode` refuses it, and where it would mislead: an animation, of which only one frame would be seen, and
the odd drawing among photographs, which is a placeholder ("image not found") more often than not.
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
MAX_LISTED = 1000  # entries of each list; `totals` counts all
MAX_GROUP = 100  # paths of one group
TINY = 10  # training images of a class, below which it is worth a warning
MAX_IMBALANCE = 10.0

# An odd drawing: few colours in a picture large enough to have many, in a file that keeps them exact
DRAWN_COLOURS = 64
DRAWN_PIXELS = 64 * 64
DRAWN_BYTES = 0.25  # a pixel: a photograph as PNG takes 1.5 and more, and is not counted
MAX_DRAWN = 0.05  # of the dataset and of the class: where there are more, they are what the dataset is about


class BadFile(Record):
    """A file that is left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class AuditedImages:
    """N good images."""

    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: Tensor  # int64 (N,)
    digests: tuple[bytes, ...]  # of their pixels
    groups: Tensor  # int64 (N,): images that a split keeps on one side share a number
    near: tuple[Near, ...] = ()  # groups of near-duplicates


class Audit(Record):
    """What was found. Paths are relative to the dataset; lists end at 1,000 entries, groups at 100 paths, `totals` counts all."""

    layout: str  # what the dataset was recognised as
    files: int
    images: int  # that are good
    bad: tuple[BadFile, ...]
    duplicates: tuple[tuple[str, ...], ...]  # paths with equal pixels
    near_duplicates: tuple[tuple[str, ...], ...]  # paths of one photograph in several versions
    near_rules: tuple[str, ...] = ()  # that found each group of `near_duplicates`
    conflicts: tuple[tuple[str, ...], ...]  # paths with equal pixels under more than one label
    left_out: tuple[str, ...]  # training (or validation) images whose equals are in validation or test
    totals: dict[str, int]  # of each list above, by its name
    parts: dict[Part, int]  # images
    class_counts: dict[Part, dict[str, int]]
    imbalance: float  # largest over smallest class of the training part
    warnings: tuple[str, ...]
    # Neither good nor bad: what systems leave, text, files outside class folders.
    ignored: tuple[IgnoredFiles, ...] = ()
    # Good images by bit depth and channels, the most frequent first.
    image_kinds: dict[str, int] = Field(default_factory=dict)


# One file


def reason_of(error: ImageError, data: bytes) -> str:
    """Why these bytes, which decode refused, are no usable image."""
    if isinstance(error, EmptyImage):
        return "zero bytes"
    if not isinstance(error, UnsupportedImage):
        return str(error)
    what, _, remedy = formats.described(data).partition("; ")
    return f"not an image: {what}" + (f"; {remedy}" if remedy and "send" not in remedy else "")  # nothing is sent here


def is_animated(data: bytes) -> bool:
    """More than one frame, of a GIF, PNG or WebP that decodes. (A JPEG with a preview or a depth map behind it is still one photograph.)"""
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
    """Colours, width and height of a GIF or PNG with fewer colours than any photograph; None for others. Decode has accepted the bytes."""
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
    """Of the drawings by place in `items`, those that stand out among photographs, and what is said of them."""
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
    """`rows` of each part, `left_out` rows of none, the number of all `files`; `remarks` are further warnings; `image_kinds` of each
    good image."""
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
    """Rows that share a number with another, in order of first appearance."""
    sizes = numbers.bincount()
    found: dict[int, list[int]] = {}
    for row in (sizes[numbers] > 1).nonzero()[:, 0].tolist():
        found.setdefault(int(numbers[row]), []).append(row)
    return list(found.values())


def _named(groups: Sequence[Sequence[int]], paths: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(paths[row] for row in group[:MAX_GROUP]) for group in groups[:MAX_LISTED])


def _warnings(audit: Audit) -> list[str]:
    """Sentences for people, the gravest first."""
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
