"""Finds the columns of a table with the path, the label and the part. The one place that knows their usual names.

Names are compared without case, blanks, `_`, `-` and `.`: `File Name`, `file_name` and `filename` are equal.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from models.data.files import is_image
from models.data.samples import Part, part_of
from models.data.tables.text import Row
from models.errors import DatasetError, NoSuchColumn
from models.files.zip_file import printable


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PATHS = _words(
    "path paths filepath filepaths filename filenames file files imagepath imagepaths imgpath imagefile imagefilename imgfile "
    "imgfilename imagename imagenames imageindex imgname imagefilepath fullpath relativepath relpath fname imagefname photopath"
)
IDS = _words("id ids image images img imgs imageid imgid idcode uuid name photo photoid picture pictureid fileid")
URLS = _words("url urls uri uris imageurl imageuri imgurl sourceref gcsuri gcsfilepath cocourl")
LABELS = _words(
    "label labels class classes category categories classname classnames labelname categoryname classlabel classlabels target targets "
    "targetname truelabel groundtruth gt y breed diagnosis species tag tags dx emotion variety annotation choice "
    "findinglabel findinglabels"
)
LABEL_IDS = _words("classid labelid categoryid targetid classidx classindex labelidx labelindex classnumber")
# In these columns, any value that is not a part is an error. Other columns without any part are about something else.
SPLITS = _words(
    "part split splits subset partition traintest traintestsplit trainortest trainval trainvalid trainvaltest splitname datasplit"
)
MAYBE_SPLITS = _words("set fold usage phase dataset stage group purpose")
FOLD_NUMBERS = re.compile(r"(fold[ _-]?)?\d+(\.0)?", re.IGNORECASE)
# Values of tables beside the names of `part_of`. fer2013 calls its parts Training, PublicTest and PrivateTest.
VALUES: dict[str, Part] = {"publictest": "val", "privatetest": "test", "heldout": "test"}
NO_NAME = re.compile(r"(unnamed:\d+)?")  # of the index that pandas writes
TRUE, FALSE = frozenset(("true", "t", "yes", "y", "1", "1.0")), frozenset(("false", "f", "no", "n", "0", "0.0", ""))
MARKS = TRUE | FALSE
PIXEL = re.compile(r"(pixel|px)\d+|\d+x\d+")  # columns of MNIST as CSV
BOX = (frozenset(("xmin", "ymin", "xmax", "ymax")), frozenset(("bbox",)), frozenset(("bboxx", "bboxy")))
NO_PART = frozenset(("", "unassigned"))  # values that name no part
FEW_ROWS = 20  # a table with fewer rows may have a different label in each
MAX_VALUES = 1000  # different values that are kept of a column
SHOWN = 5  # values or columns in a message


class Survey(NamedTuple):
    """A table before its columns are understood."""

    name: str
    columns: Row
    sample: tuple[Row, ...]  # the first rows
    values: tuple[frozenset[str] | None, ...]  # of each column; None: more than MAX_VALUES
    rows: int


class Columns(NamedTuple):
    """The indices of the columns in a row."""

    path: int
    label: int | None  # None: one-hot
    classes: tuple[int, ...]  # one-hot: a column per class
    split: int | None
    flags: dict[int, Part]  # columns of true and false, as `is_valid`
    is_label_named: bool  # and not the one column that is left
    notes: tuple[str, ...]

    def part(self, row: Row) -> Part | None:
        """Returns the part of a row; None if the row does not say."""
        if self.split is not None:
            return part_of_value(row[self.split])
        marked = [part for at, part in self.flags.items() if row[at].lower() in TRUE]
        if marked:
            return marked[0]
        return ("test" if set(self.flags.values()) == {"train"} else "train") if self.flags else None

    def described(self, columns: Row) -> str:
        parts = [self.split] if self.split is not None else [*self.flags]
        labels = (
            f"labels in {_named(columns[self.label])}"
            if self.label is not None
            else f"{len(self.classes)} columns of labels"
        )
        said = [f"images in {_named(columns[self.path])}", labels]
        return ", ".join(said + [f"parts in {' and '.join(_named(columns[at]) for at in parts)}" for _ in parts[:1]])


def understand(survey: Survey, locate: Callable[[str], str | None], headless: bool) -> Columns:
    """Finds the columns. `locate` returns the image beside the table that a cell means, if there is one. `headless`: there are no names,
    so that values decide.

    Raises NoSuchColumn; raises DatasetError for several candidates, or values that are not understood.
    """
    keys = [_key(column) for column in survey.columns]
    path = _path(survey, keys, locate)
    split, flags, notes = _split(survey, keys, path, headless)
    label, classes = _label(survey, keys, {path, split, *flags})
    used = {path, label, split, *classes, *flags}
    others = [column for at, column in enumerate(survey.columns) if at not in used and not NO_NAME.fullmatch(keys[at])]
    if others:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        notes.append(f"{printable(survey.name)}: ignored columns: {', '.join(map(_named, others[:SHOWN]))}{more}")
    is_label_named = label is None or keys[label] in LABELS | LABEL_IDS
    return Columns(path, label, classes, split, flags, is_label_named, tuple(notes))


def may_be_labelled(columns: Row, first: Row = ()) -> bool:
    """Whether a table with these column names and first cells may have labels, in a folder with tables of other kinds."""
    keys = {_key(column) for column in columns}
    return len(keys - {""}) > 1 and (bool(keys & (PATHS | IDS | URLS)) or any(map(is_image, (*columns, *first))))


def has_names(columns: Row) -> bool:
    """Whether the first row has column names, and not the first image."""
    known = PATHS | IDS | URLS | LABELS | LABEL_IDS | SPLITS
    return any(_key(column) in known for column in columns) and not any(map(is_image, columns))


def _key(column: str) -> str:
    return re.sub(r"[\s_.-]+", "", column).lower()


def _named(column: str) -> str:
    return column[:50] or "(no name)"


def _among(survey: Survey, places: Sequence[int]) -> str:
    return ", ".join(_named(survey.columns[at]) for at in places[:SHOWN])


def _path(survey: Survey, keys: list[str], locate: Callable[[str], str | None]) -> int:
    """Returns the column with a usual name whose cells are images beside the table; else any column with such cells."""
    tiers = [[at for at, key in enumerate(keys) if key in names] for names in (PATHS, IDS, URLS)]
    tiers.append([at for at, key in enumerate(keys) if key not in PATHS | IDS | URLS])
    name = printable(survey.name)
    for tier in tiers:
        files = {at: [locate(row[at]) if row[at] else None for row in survey.sample] for at in tier}
        there = [at for at in tier if any(files[at])]
        if there and all(files[at] == files[there[0]] for at in there):
            return there[0]
        if there:
            raise _ambiguous(name, survey, there, "path")
    named = tiers[0] or tiers[1] or tiers[2]
    if len(named) == 1:
        return named[0]
    if named:
        raise NoSuchColumn(str(_ambiguous(name, survey, named, "path")))
    if "pixels" in keys or sum(map(bool, map(PIXEL.fullmatch, keys))) > 3:
        raise NoSuchColumn(
            f"{name} holds pixels and no paths, which is not read; save the images as PNG, in a folder per class"
        )
    raise NoSuchColumn(
        f"{name} needs a first row with the columns path and label (and split, where the parts are given), or under their usual names; it "
        f"has {_among(survey, range(len(keys))) or 'none'}"
    )


def _ambiguous(name: str, survey: Survey, places: list[int], what: str) -> DatasetError:
    return DatasetError(
        f"{name}: the columns {_among(survey, places)} may all be the {what}; rename the right one to {what}, and the others to something "
        "else"
    )


def _label(survey: Survey, keys: list[str], taken: set[int | None]) -> tuple[int | None, tuple[int, ...]]:
    free = [at for at, key in enumerate(keys) if at not in taken and not NO_NAME.fullmatch(key)]
    found = [at for at in free if keys[at] in LABELS] or [at for at in free if keys[at] in LABEL_IDS]
    name = printable(survey.name)
    if len(found) > 1:
        raise _ambiguous(name, survey, found, "label")
    if found:
        return found[0], ()
    if len(free) == 1 and keys[free[0]] not in PATHS | IDS:
        _check_labels(survey, free[0])
        return free[0], ()
    marks = [at for at in free if (values := survey.values[at]) and values <= MARKS and values & TRUE]
    if len(marks) > 1 and marks == free:
        return None, tuple(marks)
    raise NoSuchColumn(
        f"{name} has no column of labels under a usual name (label, class, category ...); rename it to label. It has "
        f"{_among(survey, range(len(keys)))}"
    )


def _check_labels(survey: Survey, at: int) -> None:
    """Raises NoSuchColumn if a column without a usual name has too many values for labels: captions, sizes, boxes."""
    values = survey.values[at]
    if survey.rows >= FEW_ROWS and (values is None or len(values) > survey.rows / 2):
        different = f"more than {MAX_VALUES}" if values is None else len(values)
        raise NoSuchColumn(
            f"{printable(survey.name)}: the column {_named(survey.columns[at])} has {different} different values in {survey.rows} "
            "rows, too many for labels; if they are labels, rename it to label"
        )


def has_boxes(columns: Row) -> bool:
    """Whether each row describes a box in an image."""
    keys = {_key(column) for column in columns}
    return any(box <= keys for box in BOX)


# Parts


def part_of_value(value: str) -> Part | None:
    return part_of(value) or VALUES.get(_key(value))


def _flag(column: str) -> Part | None:
    """Returns the part that a column marks: `is_valid`, `test_flag`."""
    return part_of_value(re.sub(r"^(is|in)[\s_-]*|[\s_-]*(flag|mask|indicator)$", "", column, flags=re.IGNORECASE))


def _split(survey: Survey, keys: list[str], path: int, headless: bool) -> tuple[int | None, dict[int, Part], list[str]]:
    """Returns the column of parts, or the columns of true and false that mark one part each, and notes on others."""
    splits: list[int] = []
    flags: dict[int, Part] = {}
    notes: list[str] = []
    for at, key in enumerate(keys):
        values = (survey.values[at] or frozenset()) - {""}
        if at == path or (not values and (key not in SPLITS or survey.values[at] is not None)):
            continue
        parts = {part for value in values if (part := part_of_value(value))}
        if (flagged := _flag(survey.columns[at])) and {value.lower() for value in values} <= MARKS:
            flags[at] = flagged
            if flagged == "train":
                said = "the rows that are not marked are test images, unless another column says otherwise"
                notes.append(f"{printable(survey.name)}: {_named(survey.columns[at])} marks training images; {said}")
        elif key in SPLITS or (key in MAYBE_SPLITS and parts) or (flagged and key.startswith("is")):
            _check_values(survey, at, values)
            splits.append(at)
        elif all(map(FOLD_NUMBERS.fullmatch, values)) and "fold" in key:
            notes.append(
                f"{printable(survey.name)}: {_named(survey.columns[at])} has numbers of folds, which are no parts"
            )
        elif headless and all(part_of_value(value) or value.lower() in NO_PART for value in values):
            splits.append(at)
        elif len(parts) > 1 and key not in LABELS:
            if not headless:
                _refuse(survey, at, values)
            splits.append(at)
    if len(splits) + bool(flags) > 1:
        raise DatasetError(
            f"{printable(survey.name)}: the columns {_among(survey, [*splits, *flags])} may all give the part; leave one of them"
        )
    return splits[0] if splits else None, flags, notes


def _check_values(survey: Survey, at: int, values: frozenset[str]) -> None:
    strange = sorted(value for value in values if part_of_value(value) is None and value.lower() not in NO_PART)
    if strange or survey.values[at] is None:
        raise DatasetError(
            f"{printable(survey.name)}: the part is train, val or test (or empty), and the column {_named(survey.columns[at])} has "
            f"{', '.join(repr(value[:50]) for value in strange[:SHOWN]) or 'other values'}; correct the values, or rename the column"
        )


def _refuse(survey: Survey, at: int, values: frozenset[str]) -> None:
    listed = ", ".join(value[:50] for value in sorted(values)[:SHOWN])
    raise DatasetError(
        f"{printable(survey.name)}: the column {_named(survey.columns[at])} looks like the parts of the dataset ({listed}); rename it to "
        "split to use it, or remove it"
    )
