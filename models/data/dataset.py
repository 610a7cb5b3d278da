"""Loads a dataset into memory once per run, finds its duplicates, and splits it so that duplicates stay on one side.

sources.open_source --read--> bytes --images.decode, in a thread pool--> one uint8 array (N, H, W, C)
pixels --duplicates.search--> groups --split--> rows of train, val, test;   all of it --audit.make_audit--> Audit
"""

import hashlib
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from models.data import audit, split, split_checks
from models.data.audit import Audit, AuditedImages, BadFile
from models.data.duplicates import groups as duplicates
from models.data.duplicates.groups import Near
from models.data.files import reason
from models.data.formats.raw_pixels import PixelArray, allocate
from models.data.samples import (
    AS_IT_IS,
    MAX_EXAMPLES,
    MAX_NAMED,
    PARTS,
    UNREADABLE,
    DatasetSource,
    IgnoredFiles,
    NearDuplicates,
    Part,
    Read,
    Reading,
    advised,
    counted,
)
from models.data.sources import open_source
from models.errors import DatasetError, ImageError, TooFewImages, TooManyBadFiles
from models.images.cost import DEFAULT_LIMITS, Limits
from models.images.decoding import decode
from models.images.kinds import image_kind
from models.preprocessing import Preprocessing
from models.progress import Progress, silent

__all__ = ["PARTS", "Audit", "BadFile", "LoadedDataset", "Part", "load", "pixels"]

MAX_BAD_FRACTION = 0.2
MAX_HELD_OUT = 0.9  # share of the images in validation and test together
TICK_S = 0.25  # between two calls of `progress`
DECODING = 0.9  # share of the audit's time; the rest is the search for duplicates


@dataclass(frozen=True, eq=False)
class LoadedDataset:
    """The N usable images of a dataset; bad files have no row. `rows` index all fields that have N entries."""

    name: str
    sha256: str  # over the sorted (path, sha256 of the file's bytes), bad files included, and a CSV's labels
    classes: tuple[str, ...]  # sorted
    paths: tuple[str, ...]  # relative, in the source's order
    pixels: Tensor  # uint8 (N, C, H, W), channels_last memory
    labels: Tensor  # int64 (N,)
    digests: tuple[bytes, ...]  # 16 bytes each: the hash of the image's pixels
    files: tuple[bytes, ...]  # the first 16 bytes of the sha256 of each image's file
    groups: Tensor  # int64 (N,): duplicates share a number; near-duplicates too, unless the request says otherwise
    rows: dict[Part, Tensor]  # int64 (n,) each, ascending; a group is never divided by a split made here
    split: dict[str, Any]  # JSON: how images were assigned to parts, see `_rule`
    audit: Audit

    def warned(self, warnings: Sequence[str]) -> "LoadedDataset":
        """Returns a copy with more warnings in its audit."""
        more = self.audit.model_copy(update={"warnings": (*self.audit.warnings, *warnings)})
        return replace(self, audit=more)


class _Decoded(NamedTuple):
    """The usable images: their indices among the source's items, their pixels, and the digests of pixels and files. `hashes` covers all
    files."""

    places: list[int]
    pixels: Tensor  # uint8 (N, C, H, W), channels_last memory
    digests: tuple[bytes, ...]
    files: tuple[bytes, ...]
    hashes: list[str]  # sha256
    bad: list[BadFile]
    kinds: list[str]  # bit depth and channels of the usable images


def load(
    path: Path,
    preprocessing: Preprocessing,
    *,
    val_fraction: float,
    test_fraction: float = 0.0,
    seed: int,
    on_bad_file: Literal["skip", "fail"] = "skip",
    near_duplicates: NearDuplicates = "group",
    min_per_class: int = 2,
    reading: Reading = AS_IT_IS,
    progress: Progress = silent,
    limits: Limits = DEFAULT_LIMITS,
) -> LoadedDataset:
    """Reads, decodes, audits and splits a dataset. Its own val/ or test/ is kept; what is missing is held out of train by `seed`.

    Calls `progress` with 0..1 several times a second. Raises TooFewClasses; TooFewImages if a class has fewer than `min_per_class`
    training images; TooManyBadFiles for more than 20 % bad files, or any with `fail`; DatasetError if it is no dataset or its layout is
    in doubt; OSError if the pixels need a temporary file and the disk is full.
    """
    with open_source(path, reading) as source:
        decoded = _decode_all(source, preprocessing, limits, lambda done: progress(DECODING * done))
    with advised(lambda: source.advice):
        _check_bad(decoded.bad, len(source.items), on_bad_file)
        if not decoded.places:
            raise TooFewImages(
                f"none of the {len(source.classes)} class folders has an image in it; add at least 2 to each"
            )
        images = _images(
            source, decoded, near_duplicates, lambda done: progress(DECODING + (1 - DECODING) * min(done, 1.0))
        )
        given = [source.items[place].part for place in decoded.places]
        found = _split(
            images, decoded.files, given, SplitShares(val_fraction, test_fraction, seed), min_per_class, near_duplicates
        )
    remarks = [*_across(images.near, found.rows), *_remarks(found, source)]
    report = audit.make_audit(
        images,
        found.rows,
        found.left_out,
        len(source.items),
        decoded.bad,
        remarks,
        layout=source.layout,
        ignored=_ignored(source),
        image_kinds=decoded.kinds,
    )
    progress(1.0)
    return LoadedDataset(
        name=path.resolve().name,
        sha256=_sha256(source, decoded.hashes),
        classes=images.classes,
        paths=images.paths,
        pixels=decoded.pixels,
        labels=images.labels,
        digests=images.digests,
        files=decoded.files,
        groups=found.groups,
        rows=found.rows,
        split=found.rule,
        audit=report,
    )


def _images(source: DatasetSource, decoded: _Decoded, near: NearDuplicates, progress: Progress) -> AuditedImages:
    items = [source.items[place] for place in decoded.places]
    indices = {name: index for index, name in enumerate(source.classes)}
    found = duplicates.search(decoded.pixels, decoded.digests, near, progress)
    return AuditedImages(
        classes=source.classes,
        paths=tuple(item.path for item in items),
        labels=torch.tensor([indices[item.class_name] for item in items], dtype=torch.int64),
        digests=decoded.digests,
        groups=found.groups,
        near=found.near,
    )


def pixels(
    path: Path,
    data: LoadedDataset,
    preprocessing: Preprocessing,
    progress: Progress = silent,
    reading: Reading = AS_IT_IS,
    limits: Limits = DEFAULT_LIMITS,
) -> tuple[Tensor, tuple[bytes, ...]]:
    """Decodes the same rows with another preprocessing. Returns uint8 (N, C, H, W) and digests. Raises DatasetError if a file has
    changed."""
    with open_source(path, reading) as source:
        decoded = _decode_all(source, preprocessing, limits, progress)
    if _sha256(source, decoded.hashes) != data.sha256 or len(decoded.places) != len(data.paths):
        raise DatasetError(f"{data.name} has changed since the run began; leave it as it is, and start again")
    return decoded.pixels, decoded.digests


def _sha256(source: DatasetSource, hashes: Sequence[str]) -> str:
    """Returns the hash of the dataset. Items are sorted by path, so the order of a folder, zip or CSV does not matter."""
    lines = (
        f"{item.path}\0{file}" + (f"\0{item.part}\0{item.class_name}\n" if source.labelled else "\n")
        for item, file in zip(source.items, hashes, strict=True)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# The split


class SplitShares(NamedTuple):
    """Shares of the images to hold out where the dataset has no such part of its own."""

    val: float
    test: float
    seed: int


class _Found(NamedTuple):
    rows: dict[Part, Tensor]
    groups: Tensor
    left_out: Tensor
    broken: list[int]  # classes whose images are all equal
    rule: dict[str, Any]


def _split(
    images: AuditedImages,
    files: Sequence[bytes],
    given: Sequence[Part],
    shares: SplitShares,
    min_per_class: int,
    near: NearDuplicates,
) -> _Found:
    """Splits the images. `files`: the digest of each image's file. `given`: each image's own part; `train` if it has none."""
    labels, groups = images.labels, images.groups
    rows, left_out = split.given_rows(given, duplicates.equal(images.digests))
    split_checks.check_classes(labels[rows["train"]], labels[left_out], images.classes, min_per_class)
    rule = _rule(rows, shares)
    val = 0.0 if len(rows["val"]) else shares.val
    test = 0.0 if len(rows["test"]) else shares.test
    if not val and not test:
        return _Found(rows, groups, left_out, [], rule)
    if val + test > MAX_HELD_OUT:
        raise DatasetError(f"a validation share of {val:g} and a test share of {test:g} leave too little to train on")
    split_checks.check_apart(images, rows["train"], near)
    groups, broken = split.break_up(groups, labels, rows["train"])
    held = split.hold_out(rows["train"], labels, groups, files, val, test, shares.seed)
    rows = {part: held[part] if len(held[part]) else rows[part] for part in PARTS}
    return _Found(rows, groups, left_out, broken, rule)


def _rule(given: dict[Part, Tensor], shares: SplitShares) -> dict[str, Any]:
    """Returns how images are assigned to parts: {"by": "content", "seed"}, and for validation and test either "val": "given" if it is the
    dataset's own, or "val_fraction"."""
    rule: dict[str, Any] = {"by": "content", "seed": shares.seed}
    rule |= {"val": "given"} if len(given["val"]) else {"val_fraction": shares.val}
    return rule | ({"test": "given"} if len(given["test"]) else {"test_fraction": shares.test})


def _across(near: Sequence[Near], rows: dict[Part, Tensor]) -> list[str]:
    """Returns the near-duplicates whose parts were given, or not made by groups."""
    held_out = {*rows["val"].tolist(), *rows["test"].tolist()}
    train = set(rows["train"].tolist())
    count = sum(len(train.intersection(one.rows)) for one in near if held_out.intersection(one.rows))
    if not count:
        return []
    return [
        f"{counted(count, 'training image has', 'training images have')} near-duplicates in validation or test, where the dataset's own "
        "parts keep them: if they show the same objects, the accuracy looks better than it is; see near_duplicates in the audit"
    ]


def _remarks(found: _Found, source: DatasetSource) -> list[str]:
    remarks = []
    if found.broken:
        names = ", ".join(source.classes[label] for label in found.broken[:5])
        remarks.append(
            f"all images of {names} are the same picture, so they had to lie on both sides of the split: "
            "the accuracy of this class will look better than it is"
        )
    if source.strays:
        count = counted(len(source.strays), "file outside class folders is", "files outside class folders are")
        remarks.append(f"{count} ignored, the first {source.strays[0]}")
    return [*remarks, *source.notes, *([source.advice] if source.advice else [])]


def _ignored(source: DatasetSource) -> list[IgnoredFiles]:
    strays = [IgnoredFiles("outside class folders", len(source.strays), source.strays[:MAX_EXAMPLES])]
    return [*(strays if source.strays else []), *source.ignored]


# Pixels


class _Outcome(NamedTuple):
    sha256: str
    digest: bytes = b""
    reason: str = ""  # why the file is bad
    drawn: tuple[int, int, int] | None = None  # see audit.drawn_colours
    kind: str = ""  # see image_kinds


def _decode_all(source: DatasetSource, preprocessing: Preprocessing, limits: Limits, progress: Progress) -> _Decoded:
    items, limits = source.items, limits.of_training()
    array = allocate((len(items), preprocessing.height, preprocessing.width, preprocessing.channels))

    def one(place: int) -> _Outcome:
        return _decode_into(array[place], items[place].file, source.read, preprocessing, limits)

    outcomes = _in_parallel(one, len(items), progress)
    drawn = {place: outcome.drawn for place, outcome in enumerate(outcomes) if outcome.drawn}
    reasons = {place: outcome.reason for place, outcome in enumerate(outcomes) if outcome.reason}
    reasons |= audit.odd_drawings(items, drawn)
    good = [place for place in range(len(items)) if place not in reasons]
    return _Decoded(
        places=good,
        pixels=torch.from_numpy(_compact(array, good)).permute(0, 3, 1, 2),
        digests=tuple(outcomes[place].digest for place in good),
        files=tuple(bytes.fromhex(outcomes[place].sha256)[:16] for place in good),
        hashes=[outcome.sha256 for outcome in outcomes],
        bad=[BadFile(path=items[place].path, reason=reasons[place]) for place in sorted(reasons)],
        kinds=[outcomes[place].kind for place in good],
    )


def _in_parallel(one: Callable[[int], _Outcome], count: int, progress: Progress) -> list[_Outcome]:
    """Calls `one` with 0 to `count` - 1, in as many threads as torch uses, so that one setting limits both."""
    outcomes: list[_Outcome] = []
    told = time.monotonic()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for start in range(0, count, 1024):  # a pool keeps a record of all it was given: 1 KB each
            for outcome in pool.map(one, range(start, min(start + 1024, count))):
                outcomes.append(outcome)
                if time.monotonic() - told > TICK_S:
                    told = time.monotonic()
                    progress(len(outcomes) / count)
    return outcomes


def _decode_into(target: PixelArray, file: str, read: Read, preprocessing: Preprocessing, limits: Limits) -> _Outcome:
    """Fills one row (H, W, C)."""
    try:
        data = read(file)
    except UNREADABLE as error:
        return _Outcome("unreadable", reason=f"cannot be read: {reason(error)}")
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        target[:] = decode(data, preprocessing, limits).permute(1, 2, 0).numpy()
    except ImageError as error:
        return _Outcome(sha256, reason=audit.reason_of(error, data))
    if audit.is_animated(data):
        return _Outcome(sha256, reason="animated: more than one frame; save the frames that matter as images")
    digest = hashlib.blake2b(target.tobytes(), digest_size=16).digest()
    return _Outcome(sha256, digest, drawn=audit.drawn_colours(data), kind=image_kind(data))


def _check_bad(bad: Sequence[BadFile], total: int, on_bad_file: str) -> None:
    if not bad or (on_bad_file == "skip" and len(bad) <= MAX_BAD_FRACTION * total):
        return
    examples = "; ".join(f"{file.path}: {file.reason}" for file in bad[:MAX_NAMED])
    limit = f"at most {MAX_BAD_FRACTION:.0%} may be bad" if on_bad_file == "skip" else "remove them, or skip bad files"
    more = f"; and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
    cannot = f"{len(bad)} of {counted(total, 'file', 'files')} cannot be used as images"
    raise TooManyBadFiles(f"{cannot} ({limit}): {examples}{more}", "on_bad_file" if on_bad_file == "fail" else None)


def _compact(array: PixelArray, places: Sequence[int]) -> PixelArray:
    """Moves the rows `places` (ascending) to the front, in place: a copy could have gigabytes."""
    if len(places) < len(array):
        for start in itertools.count(0, 256):
            rows = places[
                start : start + 256
            ]  # each is at `start` or behind, so nothing is overwritten that is still to come
            if not rows:
                break
            array[start : start + len(rows)] = array[list(rows)]
    return array[: len(places)]
