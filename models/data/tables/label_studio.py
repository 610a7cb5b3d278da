"""Label Studio's exports for image classification, CSV and JSON-MIN, with the images beside them.

    {"image": "/data/upload/1/3f2a9c1e-bee.jpg", "choice": "bee", ...}

`image` is a path in Label Studio's own storage. The image beside the export is the one with the same end of its path: for
`upload/1/x.jpg` this is the longest that exists of `upload/1/x.jpg`, `1/x.jpg` and `x.jpg`. Of an upload, the name without Label Studio's
prefix counts too.
"""

import json
import posixpath
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from models.data.files import Files, opened
from models.data.other_formats import LIST, json_kind
from models.data.samples import UNREADABLE, DatasetItem, DatasetSource, by_path, counted, make_source
from models.errors import DatasetError
from models.files.zip_file import check_count, printable

KEYS = ("image", "choice")
PEEKED = 2**16  # bytes of a file that tell whether it is an export
ENDINGS = 8  # folders of a path that are compared
UPLOAD = re.compile(r"[0-9a-f]{8}-(?=.)")  # before the name of an uploaded file


class Task(NamedTuple):
    """One line of an export, unchanged."""

    place: str  # for messages
    image: Any
    choice: Any


def is_export(files: Files, name: str) -> bool:
    """Whether a JSON file begins like an export of Label Studio."""
    if not name.lower().endswith(".json"):
        return False
    try:
        with files.open(files.names[name]) as content:
            start = content.read(PEEKED).removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    except UNREADABLE:
        return False
    return start.lstrip().startswith("[") and all(f'"{key}"' in start for key in KEYS)


def read_json(files: Files, name: str) -> DatasetSource:
    """Reads a JSON export. Raises TooFewClasses, DatasetError."""
    try:
        found = json.loads(files.text(name))
    except (ValueError, RecursionError):
        raise DatasetError(f"{printable(name)} is not valid JSON; export it again") from None
    if not isinstance(found, list) or not all(isinstance(task, dict) for task in found):
        with opened(files, name) as content:
            kind = json_kind(content.read(PEEKED))
        remedy = kind or f"no list of tasks; export JSON-MIN or CSV from Label Studio, or {LIST}"
        raise DatasetError(f"{printable(name)} is {remedy}")
    return source(files, name, _tasks(name, found))


def _tasks(name: str, found: list[dict[str, Any]]) -> Iterator[Task]:
    for number, task in enumerate(found, 1):
        place = f"{printable(name)}, task {number}"
        if "image" not in task:
            full, azure = "annotations" in task, "regions" in task
            remedy = (
                "this is the full JSON: export JSON-MIN or CSV"
                if full
                else f"name the image `image` in Label Studio; if the file is of another tool, {LIST}"
            )
            remedy = f"this is an export of Azure Custom Vision: {LIST}" if azure else remedy
            raise DatasetError(f"{place} has no `image`; {remedy}")
        yield Task(place, task["image"], task.get("choice"))


def source(files: Files, name: str, tasks: Iterable[Task]) -> DatasetSource:
    """Builds the dataset. Tasks without a choice are left out, and counted in a note."""
    beside, folder = FilesByPathEnd(files.names), posixpath.dirname(name)
    items: set[DatasetItem] = set()
    unlabelled = 0
    for task in tasks:
        label = _label(task)
        if label is None:
            unlabelled += 1
            continue
        wanted = _path(task)
        path = beside.find(posixpath.join(folder, wanted), task.place)
        items.add(DatasetItem(printable(path), files.names.get(path, path), "train", label))
        check_count(len(items))
    notes = []
    if unlabelled:
        without = counted(unlabelled, "task has no choice and is", "tasks have no choice and are")
        notes = [f"{printable(name)}: {without} left out"]
    return make_source("Label Studio's export", by_path(items), files.read, labelled=True, notes=notes)


def _label(task: Task) -> str | None:
    """Returns the choice: a string, or `{"choices": [...]}`, which a CSV has as text."""
    choice = task.choice
    if isinstance(choice, str) and choice.lstrip().startswith("{"):
        try:
            choice = json.loads(choice)
        except (ValueError, RecursionError):
            raise DatasetError(f"{task.place}: the choice is not valid JSON; export it again") from None
    choices = choice.get("choices", []) if isinstance(choice, dict) else choice
    choices = choices if isinstance(choices, list) else [choices]
    names = [name.strip() if isinstance(name, str) else name for name in choices if name not in (None, "")]
    if not all(isinstance(name, str) for name in names):
        raise DatasetError(f"{task.place}: the choice is no text; export the results of a Choices control")
    if len(names) > 1:
        raise DatasetError(
            f"{task.place} has {len(names)} choices ({', '.join(names[:3])}); an image has one label: keep one, or remove the task"
        )
    return names[0] if names and names[0] else None


def _path(task: Task) -> str:
    """Returns `image` as a relative path."""
    image = task.image.strip() if isinstance(task.image, str) else ""
    if not image or "\0" in image:
        raise DatasetError(f"{task.place}: `image` is no path")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", image):
        raise DatasetError(
            f"{task.place}: {image[:200]!r} lies on another server or drive, and nothing is fetched; put the images beside the export and "
            "give their names in `image`"
        )
    try:
        url = urlsplit(image)
        if url.path.rstrip("/") == "/data/local-files":
            path = (parse_qs(url.query).get("d") or [""])[0]
        else:
            path = unquote(image.removeprefix("/data/")) if image.startswith("/data/") else image
    except ValueError:
        path = ""
    path = posixpath.normpath(path.replace("\\", "/"))
    if path in ("", ".") or path.startswith("/") or ".." in path.split("/"):
        raise DatasetError(
            f"{task.place}: {image[:200]!r} is refused; a path is relative to the export and stays beside it"
        )
    return path


class FilesByPathEnd:
    """The files beside an export, by the ends of their paths."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_ending: dict[str, str | None] = {}  # None: several files end so
        self._whole = set(names)
        for name in self._whole:
            for ending in _endings(name):
                self._by_ending[ending] = None if ending in self._by_ending else name

    def find(self, wanted: str, place: str) -> str:
        """Returns the file whose path has the longest end in common with `wanted`; `wanted` itself if there is none. Raises DatasetError
        for two such files."""
        if wanted in self._whole:
            return wanted
        folder, _, name = wanted.rpartition("/")
        for path in (wanted, posixpath.join(folder, UPLOAD.sub("", name, count=1))):
            for ending in _endings(path):
                if ending in self._by_ending:
                    found = self._by_ending[ending]
                    if found is None:
                        raise DatasetError(
                            f"{place}: several files are named {printable(ending)}; give `image` as a path relative to the export"
                        )
                    return found
        return wanted


def _endings(path: str) -> list[str]:
    """Yields the ends of `a/b/c`: `a/b/c`, `b/c`, `c`, the longest first."""
    parts = path.split("/")[-ENDINGS:]
    return ["/".join(parts[start:]) for start in range(len(parts))]
