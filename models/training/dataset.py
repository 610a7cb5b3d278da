"""A folder or zip of images -> pixels in memory, once for the whole run.

    <class>/*   or   train/<class>/* [+ val/<class>/*] [+ test/<class>/*]
    files --read--> bytes --images.decode, in a thread pool--> one uint8 array (N, H, W, C)

A zip is read member by member in place and never extracted.
"""

import hashlib
import math
import os
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from models.classifier import Preprocessing
from models.errors import DatasetError, ImageError
from models.images import Limits, decode

Part = Literal["train", "val", "test"]
Read = Callable[[str], bytes]

PARTS: tuple[Part, ...] = ("train", "val", "test")
MAX_BAD_FRACTION = 0.2
# RuntimeError: encrypted, or an unknown zip method
UNREADABLE = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
MAX_BYTES_IN_MEMORY = 2 * 2**30  # past this the pixels lie in a temporary file


@dataclass(frozen=True)
class Item:
    """One file that claims to be an image; `path` is relative to the dataset, `/` between its parts, wrapping folders left out."""

    path: str
    file: str  # its name for `Read`
    part: Part
    class_name: str


@dataclass(frozen=True)
class BadFile:
    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class Dataset:
    """Decoded images. `rows` gives each part's places in `pixels` and `labels`; a bad file is in no part."""

    name: str
    sha256: str  # over the sorted (path, sha256 of the file's bytes)
    classes: tuple[str, ...]  # sorted
    pixels: Tensor  # uint8 (N, C, H, W), channels_last memory
    labels: Tensor  # int64 (N,)
    rows: dict[Part, Tensor]  # int64 (n,) each
    bad: tuple[BadFile, ...]


def load(
    path: Path,
    preprocessing: Preprocessing,
    *,
    val_fraction: float,
    seed: int,
    on_bad_file: Literal["skip", "fail"] = "skip",
    progress: Callable[[float], None] = lambda fraction: None,
) -> Dataset:
    """Read, decode and split. Without a val/ part, a stratified `val_fraction` of train is held out by `seed`.

    Raises DatasetError: not a dataset, a class with fewer than two training images, more than 20 % bad files, or any with `fail`.
    """
    with _open(path) as (names, read):
        items = _items(names)
        classes = tuple(sorted({item.class_name for item in items if item.part == "train"}))
        _check_classes(items, classes)
        pixels, digests, bad = _decode_all(items, read, preprocessing, on_bad_file, progress)
    indices = {name: index for index, name in enumerate(classes)}
    labels = torch.tensor([indices[item.class_name] for item in items])
    rows = _good_rows(items, bad)
    if not len(rows["val"]):
        rows["train"], rows["val"] = stratified_split(rows["train"], labels, classes, val_fraction, seed)
    return Dataset(path.resolve().name, _digest(items, digests), classes, pixels, labels, rows, bad)


def stratified_split(
    rows: Tensor, labels: Tensor, classes: tuple[str, ...], fraction: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Rows (n,) -> train and validation rows, ascending; of each class `fraction` to validation, and at least one to either side."""
    generator = torch.Generator().manual_seed(seed)
    train, val = [], []
    for label, name in enumerate(classes):
        own = rows[labels[rows] == label]
        if len(own) < 2:
            raise DatasetError(
                f"class {name!r} has {len(own)} usable training images; at least 2 are needed, to train and to validate on"
            )
        shuffled = own[torch.randperm(len(own), generator=generator)]
        cut = min(max(1, round(len(own) * fraction)), len(own) - 1)
        val.append(shuffled[:cut])
        train.append(shuffled[cut:])
    return torch.cat(train).sort().values, torch.cat(val).sort().values


# Files


@contextmanager
def _open(path: Path) -> Iterator[tuple[list[str], Read]]:
    """The names of a dataset's files and a way to read them, which several threads may use at once."""
    if path.is_dir():
        files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
        yield list(files), lambda name: _read_file(files[name])
    elif path.is_file() and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield [m.filename for m in archive.infolist() if not m.is_dir()], lambda name: _read_member(archive, name)
    else:
        raise DatasetError(
            f"{path} is neither a folder nor a zip file; a dataset is a folder of class folders, or a zip of one"
        )


# Both read at most one byte more than decode allows, so that a huge or bomb-like file costs no memory.
_READ_LIMIT = Limits().max_bytes + 1


def _read_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_READ_LIMIT)


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as member:
        return member.read(_READ_LIMIT)


def _items(names: list[str]) -> list[Item]:
    """File names -> items, sorted by path. Hidden files, `__MACOSX`, files outside a class folder and one wrapping folder are left out."""
    found = {PurePosixPath(name.lstrip("/")).parts: name for name in names}
    found = {p: name for p, name in found.items() if not any(part.startswith(".") or part == "__MACOSX" for part in p)}
    while found and len({parts[0] for parts in found}) == 1 and min(map(len, found)) > 2:
        found = {parts[1:]: name for parts, name in found.items()}
    split = any(parts[0] == "train" and len(parts) > 2 for parts in found)
    items = (_item(parts, name, split) for parts, name in sorted(found.items()))
    return [item for item in items if item]


def _item(parts: tuple[str, ...], name: str, split: bool) -> Item | None:
    if not split:
        return Item("/".join(parts), name, "train", parts[0]) if len(parts) > 1 else None
    part = next((part for part in PARTS if part == parts[0]), None)
    return Item("/".join(parts), name, part, parts[1]) if part and len(parts) > 2 else None


def _check_classes(items: list[Item], classes: tuple[str, ...]) -> None:
    if len(classes) < 2:
        raise DatasetError(
            f"the dataset has {len(classes)} classes; it needs at least two folders, one per class, with images in them"
        )
    strange = sorted({f"{item.part}/{item.class_name}" for item in items if item.class_name not in classes})
    if strange:
        raise DatasetError(f"{', '.join(strange)}: no such class in train/, which has {', '.join(classes[:10])}")


def _digest(items: list[Item], digests: list[str]) -> str:
    """`items` are sorted by path, so neither the order of a folder nor that of a zip matters."""
    lines = (f"{item.path}\0{digest}\n" for item, digest in zip(items, digests, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# Pixels


def _decode_all(
    items: list[Item], read: Read, preprocessing: Preprocessing, on_bad_file: str, progress: Callable[[float], None]
) -> tuple[Tensor, list[str], tuple[BadFile, ...]]:
    """-> pixels uint8 (N, C, H, W), the sha256 of each file, and the files that are no images."""
    array = _allocate((len(items), preprocessing.crop, preprocessing.crop, preprocessing.channels))

    def decode_one(row: int) -> tuple[str, str | None]:
        return _decode_into(array[row], items[row].file, read, preprocessing)

    digests: list[str] = []
    bad: list[BadFile] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for row, (digest, reason) in enumerate(pool.map(decode_one, range(len(items)))):
            digests.append(digest)
            if reason:
                bad.append(BadFile(items[row].path, reason))
            if row % 500 == 0:
                progress(row / len(items))
    _check_bad(bad, len(items), on_bad_file)
    return torch.from_numpy(array).permute(0, 3, 1, 2), digests, tuple(bad)


def _decode_into(target: np.ndarray, file: str, read: Read, preprocessing: Preprocessing) -> tuple[str, str | None]:
    """Fill one (H, W, C) row; -> the file's sha256, and what is wrong with it, if anything."""
    try:
        data = read(file)
    except UNREADABLE as error:
        return "unreadable", f"cannot be read: {error}"
    digest = hashlib.sha256(data).hexdigest()
    try:
        target[:] = decode(data, preprocessing).permute(1, 2, 0).numpy()
    except ImageError as error:
        return digest, str(error)
    return digest, None


def _check_bad(bad: list[BadFile], total: int, on_bad_file: str) -> None:
    if not bad or (on_bad_file == "skip" and len(bad) <= MAX_BAD_FRACTION * total):
        return
    examples = "; ".join(f"{file.path}: {file.reason}" for file in bad[:5])
    limit = f"at most {MAX_BAD_FRACTION:.0%} may be bad" if on_bad_file == "skip" else "remove them, or skip bad files"
    raise DatasetError(f"{len(bad)} of {total} files are no usable images ({limit}): {examples}")


def _good_rows(items: list[Item], bad: tuple[BadFile, ...]) -> dict[Part, Tensor]:
    broken = {file.path for file in bad}
    good = [(row, item.part) for row, item in enumerate(items) if item.path not in broken]
    counts = Counter(part for _, part in good)
    if not counts["train"]:
        raise DatasetError("no usable training images")
    return {part: torch.tensor([row for row, own in good if own == part], dtype=torch.int64) for part in PARTS}


def _allocate(shape: tuple[int, int, int, int]) -> np.ndarray:
    """uint8, in memory or, when large, in a temporary file that vanishes with the array."""
    if math.prod(shape) <= MAX_BYTES_IN_MEMORY:
        return np.zeros(shape, dtype=np.uint8)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)
