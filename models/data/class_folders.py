"""Reads one folder per class: the one place that decides which folders are parts and which are classes.

    <class>/*                  train/<class>/* [+ val/<class>/*] [+ test/<class>/*]         <class>/train/* [+ <class>/test/*]

`parts` knows the names of parts. Folders that wrap all others are skipped, also within a part (`seg_train/seg_train/<class>`). A layout
that can be read in two ways is an error that names the field `layout`.
"""

import posixpath
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NoReturn

from models.data.files import Files, is_text
from models.data.other_formats import are_parts_of_images, labels_of
from models.data.parts import PARTS, Part, is_fold, is_unlabelled, part_of, parts_among
from models.data.samples import (
    DatasetItem,
    DatasetSource,
    Layout,
    by_path,
    counted,
    listed,
    make_source,
    refuse_alike,
    tallied,
)
from models.data.tables.text import JSON_LINES
from models.errors import DatasetError, TooFewClasses
from models.files.zip_file import printable

# Part of every Roboflow export.
IGNORED = ("README.roboflow.txt", "README.dataset.txt")
# Suffixes of annotations and documents, if their content is text.
SIDE_SUFFIXES = frozenset({
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".xml", ".md", ".rst", ".yaml", ".yml", ".toml",
    ".ini", ".cfg", ".conf", ".log", ".names", ".data", ".lst", ".pbtxt", ".html", ".htm", ".css", ".js",
    ".py", ".sh", ".bat", ".ipynb", ".dvc", ".sha256", ".md5", ".url", ".geojson", ".prj", ".tfw", ".jgw",
    ".pgw", ".pts", ".xmp", ".aae", ".pp3", ".dop",
})  # fmt: skip
SIDE_NAMES = frozenset({"readme", "license", "licence", "labels", "classes", "copying", "changelog", "notes"})
# Folders with these names side by side hold views of the same images, not classes.
GROUPS = frozenset({"images", "imgs", "masks", "labels", "annotations", "ground_truth", "jpegimages", "depth"})
# If class folders share so large a part of their subfolders, these group images by something else than class.
SHARED = 0.6

PathParts = tuple[str, ...]
# Folders and name of a file -> its name in `Files`. An empty folder ends in "".
NamesByParts = dict[PathParts, str]


def read_class_folders(files: Files, layout: Layout = "auto") -> DatasetSource:
    """Reads a dataset of class folders. Raises TooFewClasses; raises DatasetError if the layout is in doubt."""
    names: NamesByParts = {tuple(name.split("/")): file for name, file in files.names.items()}
    side = {parts for parts in names if _is_side(files, parts)}
    names, beside, top = _unwrap(
        {parts: file for parts, file in names.items() if parts not in side and parts[-1] not in IGNORED}
    )
    side_strays, texts = _sorted_side(side, top)
    found = _Found(names)
    if layout == "splits" or (layout == "auto" and _has_parts(found)):
        reading = _by_part(found, named=layout == "auto")
    elif layout == "auto" and _has_inner_parts(found):
        reading = _by_inner_part(found)
    else:
        if layout == "auto":
            _refuse_doubtful(found, files)
        reading = _by_class(found)
    if layout == "auto":
        classes = {item.class_name for item in reading.items}
        refuse_alike(classes)
        if are_parts_of_images(classes):
            _doubt(
                f"{_folders(sorted(classes))} are called like images and what belongs to them, such as masks or boxes, and Imago "
                f"classifies whole images{labels_of(files)}",
                f"`classes` takes {_quoted(sorted(classes))} as classes",
            )
    strays = sorted([*("/".join(parts) for parts in beside), *side_strays, *reading.strays])
    left = [*reading.ignored, *(("text beside the images, such as annotations", name) for name in texts)]
    return make_source(
        reading.layout,
        by_path(reading.items),
        files.read,
        labelled=False,
        strays=[printable(name) for name in strays],
        notes=reading.notes,
        ignored=tallied(left),
        hint=reading.hint,
        elsewhere=lambda: _table_hint(files) or labels_of(files),
    )


# Files whose names are not those of images


def _is_side(files: Files, parts: PathParts) -> bool:
    stem, suffix = posixpath.splitext(parts[-1].lower())
    named = suffix in SIDE_SUFFIXES or not suffix
    if not named or not stem or parts[-1] in IGNORED:
        return False
    is_empty_allowed = bool(suffix) or stem in SIDE_NAMES
    return is_text(files, "/".join(parts), is_empty_allowed)


def _sorted_side(side: Collection[PathParts], top: PathParts) -> tuple[list[str], list[str]]:
    """Splits text files into those outside class folders and those inside."""
    strays: list[str] = []
    texts: list[str] = []
    for parts in side:
        inside = parts[: len(top)] == top
        rest = parts[len(top) :] if inside else parts
        (texts if inside and len(rest) > 1 else strays).append("/".join(rest))
    return strays, texts


def _table_hint(files: Files) -> str:
    tables = _tables(files)
    return f"; if the labels are in a table, give that as the dataset ({listed(tables)})" if tables else ""


def _tables(files: Files) -> list[str]:
    """Returns the names of tables that may have labels."""
    suffixes = (".csv", ".tsv", *JSON_LINES)
    return sorted(name for name in files.names if name.lower().endswith(suffixes) and "submission" not in name.lower())


# Folders


class _Found:
    """The folders at the top of a dataset, with their contents."""

    def __init__(self, names: NamesByParts) -> None:
        self.names = names
        self.below: dict[str, list[PathParts]] = {}  # by folder at the top
        for parts in names:
            if len(parts) > 1:
                self.below.setdefault(parts[0], []).append(parts)
        self.tops = sorted(self.below)
        self.folders = {top: {parts[1] for parts in below if len(parts) > 2} for top, below in self.below.items()}
        self.parts = parts_among(self.tops)

    def level(self, top: str, known: Collection[str] = ()) -> int:
        """Returns the number of folders above the classes of a part: `train/<class>` 1, `seg_train/seg_train/<class>` 2."""
        level, below = 1, self.below[top]
        while True:
            folders = {parts[level] for parts in below if len(parts) > level + 1}
            if len(folders) != 1 or folders & set(known):
                return level
            wraps = max(map(len, below)) > level + 2 or folders == {below[0][level - 1]} or _is_neutral(*folders)
            if not wraps:
                return level
            level += 1

    def classes(self, top: str, known: Collection[str] = ()) -> set[str]:
        level = self.level(top, known)
        return {parts[level] for parts in self.below[top] if len(parts) > level + 1}


@dataclass(frozen=True)
class _Read:
    layout: str
    items: list[DatasetItem]
    strays: list[str]
    ignored: list[tuple[str, str]]
    notes: list[str]
    hint: str = ""  # for the error on too few classes


def _unwrap(found: NamesByParts) -> tuple[NamesByParts, list[PathParts], PathParts]:
    """Skips the folders that wrap all others. Returns the remaining names, the files beside or in those folders, and these folders."""
    top: PathParts = ()
    beside: list[PathParts] = []
    while len(folders := {parts[0] for parts in found if len(parts) > 1}) == 1 and max(map(len, found)) > 2:
        beside += [top + parts for parts in found if len(parts) == 1]
        top += tuple(folders)
        found = {parts[1:]: file for parts, file in found.items() if len(parts) > 1}
    return found, beside, top


def _is_neutral(name: str) -> bool:
    """Whether the name of the only folder in a part says nothing about a class: `images`, `train`, `unlabeled`."""
    return part_of(name) is not None or part_of(f"train_{name}") is not None or is_unlabelled(name)


def _item(parts: PathParts, file: str, part: Part, level: int) -> DatasetItem:
    return DatasetItem(printable("/".join(parts)), file, part, printable(parts[level]))


# train/<class>/*


def _has_parts(found: _Found) -> bool:
    """Whether the folders at the top are parts with class folders. Raises DatasetError if only one of several folders is."""
    training = [top for top, part in found.parts.items() if part == "train" and found.classes(top)]
    others = [top for top in found.tops if top not in found.parts and not is_unlabelled(top) and not is_fold(top)]
    if training and others and len(set(found.parts.values())) == 1:
        _doubt(
            f"{_folders(training)} is called like a part and has folders in it, and beside it lies {_folders(others)}",
            f"`classes` takes {_quoted(found.tops)} as classes, `splits` the folders in {_folders(training)}",
        )
    return bool(training)


def _by_part(found: _Found, named: bool) -> _Read:
    """Reads `train/<class>/*`. `named`: only folders named like parts count. Otherwise, if no training part has class folders, every
    folder that is not a part is for training."""
    parts = dict(found.parts)
    if not named and not any(part == "train" and found.classes(top) for top, part in parts.items()):
        parts = {top: found.parts.get(top, "train") for top in found.tops}
    trained = {name for top, part in parts.items() if part == "train" for name in found.classes(top)}
    if not trained:
        raise TooFewClasses(
            f"layout splits needs a folder for training with class folders in it, and there is {_folders(found.tops)}; make it "
            "train/<class>/*, or leave layout out",
            "layout",
        )
    items: list[DatasetItem] = []
    strays, ignored, notes = ["/".join(parts) for parts in found.names if len(parts) == 1], [], []
    for top in found.tops:
        level, part = found.level(top, trained), parts.get(top)
        below = [each for each in found.below[top] if each[-1] or len(each) > level + 1]
        if part is None or not found.classes(top, trained):
            why = _not_used(top) if part is None else _no_classes([top])
            ignored += [(why, "/".join(each)) for each in below]
            notes += [f"{counted(len(below), 'file is', 'files are')} ignored: {why}"] if below else []
            continue
        items += [_item(each, found.names[each], part, level) for each in below if len(each) > level + 1]
        strays += ["/".join(each) for each in below if len(each) <= level + 1]
    with_items = {item.path.partition("/")[0] for item in items}
    used = {top: part for top, part in parts.items() if printable(top) in with_items}
    hint = f"; if {_quoted(found.tops)} are the classes, set layout to `classes` (--layout classes)"
    return _Read(f"{_described(used)} with a folder per class", items, strays, ignored, notes, hint)


def _described(parts: dict[str, Part]) -> str:
    """Returns `train/, test/`; with the part after other names: `Training/ as train`."""
    ordered = sorted(parts.items(), key=lambda pair: (PARTS.index(pair[1]), pair[0]))
    return ", ".join(f"{printable(top)}/" + ("" if top == part else f" as {part}") for top, part in ordered[:10])


# <class>/train/*


def _has_inner_parts(found: _Found) -> bool:
    """Whether every class folder has its own parts. Raises DatasetError if only some have."""
    if found.parts or len(found.tops) < 2:
        return False
    inner = {top: parts_among(folders) for top, folders in found.folders.items()}
    with_parts = [top for top, parts in inner.items() if "train" in parts.values() or len(set(parts.values())) > 1]
    if not with_parts:
        return False
    loose = any(len(parts) == 2 and parts[1] for parts in found.names)
    clean = all(set(inner[top]) == found.folders[top] and found.folders[top] for top in found.tops)
    deeper = any(len(parts) > 3 for parts in found.names)
    neutral = {top.lower() for top in found.tops} & GROUPS
    if loose or not clean or deeper or neutral or not any("train" in parts.values() for parts in inner.values()):
        shown = sorted({name for parts in inner.values() for name in parts})
        _doubt(
            f"some or all of {_folders(found.tops)} have folders called like parts in them ({_folders(shown)}), and other files too",
            f"`classes` takes {_quoted(found.tops)} as classes and all images in them alike; otherwise make it "
            "train/<class>/* and test/<class>/*",
        )
    return True


def _by_inner_part(found: _Found) -> _Read:
    items, strays = [], []
    for parts, file in found.names.items():
        part = parts_among(found.folders[parts[0]]).get(parts[1]) if len(parts) > 2 else None
        if part:
            items.append(_item(parts, file, part, 0))
        elif parts[-1]:
            strays.append("/".join(parts))
    parts_used = {name: part for folders in found.folders.values() for name, part in parts_among(folders).items()}
    return _Read(f"a folder per class, with {_described(parts_used)} in each", items, strays, [], [])


# <class>/*


def _refuse_doubtful(found: _Found, files: Files) -> None:
    """Raises DatasetError or TooFewClasses if the folders may be something else than classes."""
    tops, tables = found.tops, _tables(files)
    if tops and len(found.parts) == len(tops):
        if any(found.classes(top) for top in tops):
            _doubt(
                f"{_folders(tops)} are called like parts, and none is for training", "`classes` takes them as classes"
            )
        table = f"a table of them ({listed(tables)})" if tables else "a CSV with the columns path and label"
        raise TooFewClasses(
            f"{_no_classes(tops)}; make it train/<class>/*, or give {table}{labels_of(files)}; if {_quoted(tops)} are the classes, set "
            "layout to `classes` (--layout classes)",
            "layout",
        )
    if found.parts:
        others = [top for top in tops if top not in found.parts]
        _doubt(
            f"{_folders(found.parts)} {_is(found.parts)} named like a part of the dataset (train, val, test), and "
            f"{_folders(others)} beside it {_is(others)} not",
            f"`classes` takes {_quoted(tops)} as classes; otherwise make it train/<class>/*",
        )
    if len(tops) > 1 and all(map(is_fold, tops)):
        _doubt(
            f"{_folders(tops)} are called like folds",
            "`classes` takes them as classes, `splits` the folders in them, all for training",
        )
    inner = {top: found.classes(top) for top in tops}
    names = {name for folders in inner.values() for name in folders}
    if len(tops) > 1 and len(names) > 1 and sum(map(len, inner.values())) >= SHARED * len(tops) * len(names):
        _doubt(
            f"all of {_folders(tops)} have the same folders in them ({_folders(sorted(names))})",
            f"`classes` takes {_quoted(tops)} as classes, `splits` {_quoted(sorted(names))}, all for training; if they hold versions "
            "of the same images, give one of them as the dataset",
        )
    for top in tops:
        repeated = sorted(inner[top].intersection(tops) - {top})
        if len(repeated) > 1 and len(repeated) >= SHARED * (len(tops) - 1):
            _doubt(
                f"{_folders([top])} has folders in it called like those beside it ({_folders(repeated)})",
                f"`classes` takes {_quoted(tops)} as classes; if {_folders([top])} holds copies or versions of the images beside it, "
                "remove it",
            )


def _by_class(found: _Found) -> _Read:
    items = [_item(parts, file, "train", 0) for parts, file in found.names.items() if len(parts) > 1]
    strays = ["/".join(parts) for parts in found.names if len(parts) == 1]
    return _Read("a folder per class", items, strays, [], [])


# Messages


def _doubt(what: str, choice: str) -> NoReturn:
    raise DatasetError(f"the layout is in doubt: {what}; set layout (--layout on the command line): {choice}", "layout")


def _no_classes(tops: Iterable[str]) -> str:
    tops = list(tops)
    return f"{_folders(tops)} {'has' if len(tops) == 1 else 'have'} no class folders, so the images have no labels"


def _not_used(top: str) -> str:
    no_labels = (
        "holds images without labels, by its name" if is_unlabelled(top) else "is not a part (train, val or test)"
    )
    return f"{_folders([top])} {no_labels}"


def _is(names: Collection[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _folders(names: Iterable[str]) -> str:
    return listed(f"{name}/" for name in names)


def _quoted(names: Iterable[str]) -> str:
    return listed(names)
