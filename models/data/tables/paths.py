"""Finds the file that a cell of a table means: a path, a path of another machine, or an id without a suffix."""

import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from urllib.parse import unquote

from models.data.files import Files, is_image
from models.data.samples import Part, counted, part_of
from models.errors import DatasetError
from models.files.zip_file import printable

MAX_PATH = 4096  # characters, as Linux has it


REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # `gs://bucket/cat.jpg`


class Finder:
    """Finds files by their names in a table of `folder`, and counts the names that are not paths. `part`: of rows that do not say, by the
    name of the table."""

    def __init__(self, files: Files, folder: str, part: Part | None = None) -> None:
        self._files, self._folder, self._part = files, folder, part
        self._elsewhere: dict[str, str] = {}  # files found by the end of a path of another machine -> that path
        self._examples: dict[str, tuple[str, str]] = {}  # kind of match -> the first of them
        self._counts: dict[str, int] = defaultdict(int)

    def find(self, cell: str, place: str, part: Part | None = None) -> str:
        """Returns the file's relative name, or the name in the cell if there is none. `part`: of the row, which decides between files of
        one name in train/ and test/. Raises DatasetError for several files, or a path that leads elsewhere."""
        path = self._path(cell, place)
        is_foreign = leads_outside(path)
        name = posixpath.normpath(posixpath.join(self._folder, path))
        if not leads_outside(name) and not is_foreign and self._files.has(name):
            return name
        kind, found = self._search(path.split("/"), is_foreign)
        part = part or self._part
        if len(found) > 1:
            found = [name for name in found if part and part in map(part_of, name.split("/")[:-1])] or found
        if len(found) > 1:
            listed = ", ".join(map(printable, sorted(found)[:3]))
            remote = "nothing is fetched: " if REMOTE.match(cell) else ""
            raise DatasetError(
                f"{place}: {cell[:200]!r} may be {listed}; {remote}give the path relative to the table's folder"
            )
        if found:
            self._count(kind, cell, found[0], place)
            return found[0]
        if REMOTE.match(cell):
            raise DatasetError(_not_fetched(cell, place))
        if is_foreign or leads_outside(name):
            raise DatasetError(
                f"{place}: {cell[:200]!r} is refused; a path is relative to the table's folder and stays in it, and no file beside "
                "the table ends like it"
            )
        return name

    def locate(self, cell: str) -> str | None:
        """Returns the one file that this cell means; None if there is none, or several."""
        try:
            name = self.find(cell, "")
        except DatasetError:
            return None
        return name if self._files.has(name) else None

    def notes(self) -> list[str]:
        """Returns sentences on the files that the table names by something else than their paths."""
        return [
            f"{counted(self._counts[kind], 'image is', 'images are')} found by {kind}, for example {cell[:200]!r} is {printable(name)}"
            for kind, (cell, name) in self._examples.items()
        ]

    def _path(self, cell: str, place: str) -> str:
        if not cell or "\0" in cell:
            raise DatasetError(f"{place}: the row has no path")
        if len(cell) > MAX_PATH:
            raise DatasetError(f"{place}: the path has {len(cell):,} characters, and at most {MAX_PATH:,} are read")
        if match := REMOTE.match(cell):  # the image may lie beside the table, by the end of its path
            cell = posixpath.join("/", unquote(re.split(r"[?#]", cell[match.end() :])[0]))
        if ":" in cell and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", cell):
            raise DatasetError(_not_fetched(cell, place))
        return posixpath.normpath(cell.replace("\\", "/"))

    def _count(self, kind: str, cell: str, name: str, place: str) -> None:
        if not place:
            return
        if kind == ENDING and self._elsewhere.setdefault(name, cell) != cell:
            raise DatasetError(
                f"{place}: {cell[:200]!r} and {self._elsewhere[name][:200]!r} both end like {printable(name)}; give paths relative to "
                "the table's folder"
            )
        self._counts[kind] += 1
        self._examples.setdefault(kind, (cell, name))

    def _search(self, wanted: list[str], is_foreign: bool) -> tuple[str, list[str]]:
        """Returns the kind of match, and the files that match best."""
        wanted = [_key(folder) for folder in wanted if folder not in ("", "..")]
        stem = posixpath.splitext(wanted[-1])[0]
        candidates = self._by_stem.get(wanted[-1], []) + (self._by_stem.get(stem, []) if stem != wanted[-1] else [])
        exact = [name for name in candidates if _key(posixpath.basename(name)) == wanted[-1]]
        same = exact or [name for name in candidates if _stem(name) == wanted[-1]]
        kind = ENDING if exact else STEM
        matches: dict[int, list[str]] = defaultdict(list)
        for name in dict.fromkeys(same):
            ours = [_key(folder) for folder in self._relative(name).split("/")]
            ours[-1] = wanted[-1]
            common = _common(wanted, ours)
            if common == len(wanted) or common == len(ours) or is_foreign:
                matches[common].append(name)
        return kind, matches[max(matches)] if matches else []

    def _relative(self, name: str) -> str:
        """Returns the path relative to the table's folder, if the file lies in it."""
        return name.removeprefix(f"{self._folder}/") if self._folder else name

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        """Maps names without folder and suffix to images; also whole names without a usual suffix."""
        found: dict[str, list[str]] = defaultdict(list)
        for name in self._files.names:
            if is_image(name):
                found[_stem(name)].append(name)
        return found


def _not_fetched(cell: str, place: str) -> str:
    return (
        f"{place}: {cell[:200]!r} is refused; nothing is fetched: put the images beside the table, and give their paths"
    )


ENDING, STEM = "the end of their paths", "their names without a suffix"


def leads_outside(name: str) -> bool:
    return (
        name.startswith("/")
        or ".." in name.split("/")
        or (":" in name and bool(re.match(r"[A-Za-z][A-Za-z+.-]*:", name)))
    )


def parts_of_folders(names: Iterable[str]) -> dict[str, Part]:
    """Returns the part of each file by the first folder of its path that is named like a part; empty if the folders do not separate
    training images from others."""
    parts: dict[str, Part] = {}
    for name in names:
        part = next((part for folder in name.split("/")[:-1] if (part := part_of(folder))), None)
        if part is None:
            return {}
        parts[name] = part
    return parts if "train" in parts.values() and len(set(parts.values())) > 1 else {}


def _key(name: str) -> str:
    """Normalises a name: Windows and macOS change its case and its Unicode form."""
    return unicodedata.normalize("NFC", name).casefold()


def _stem(name: str) -> str:
    return _key(posixpath.splitext(posixpath.basename(name))[0])


def _common(a: list[str], b: list[str]) -> int:
    """Returns how many of the last entries are equal."""
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return count
