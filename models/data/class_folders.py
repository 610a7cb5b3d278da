"""One folder per class: `<class>/*`, or `train/<class>/* [+ val/<class>/*] [+ test/<class>/*]`."""

from models.archive import printable
from models.data.files import Files
from models.data.samples import Item, Source, by_path, make_source, part_of

# Roboflow puts these beside what it exports.
IGNORED = ("README.roboflow.txt", "README.dataset.txt")

Names = dict[tuple[str, ...], str]


def read_class_folders(files: Files) -> Source:
    """Raises TooFewClasses, DatasetError."""
    found: Names = {tuple(name.split("/")): file for name, file in files.names.items()}
    found, beside = _unwrap({parts: file for parts, file in found.items() if parts[-1] not in IGNORED})
    split = any(part_of(parts[0]) == "train" and len(parts) > 2 for parts in found)
    items, strays = [], [printable("/".join(parts)) for parts in beside]
    for parts, file in found.items():
        item = _item(parts, file, split)
        if item:
            items.append(item)
        elif parts[-1]:
            strays.append(printable("/".join(parts)))
    layout = "train/, val/, test/ with a folder per class" if split else "a folder per class"
    return make_source(layout, by_path(items), files.read, labelled=False, strays=sorted(strays))


def _unwrap(found: Names) -> tuple[Names, list[tuple[str, ...]]]:
    """Without the folders that wrap all others, and the files that lie in or beside those; such a file makes no class."""
    top: tuple[str, ...] = ()
    beside: list[tuple[str, ...]] = []
    while len(folders := {parts[0] for parts in found if len(parts) > 1}) == 1 and max(map(len, found)) > 2:
        beside += [top + parts for parts in found if len(parts) == 1]
        top += tuple(folders)
        found = {parts[1:]: file for parts, file in found.items() if len(parts) > 1}
    return found, beside


def _item(parts: tuple[str, ...], file: str, split: bool) -> Item | None:
    path = printable("/".join(parts))
    if not split:
        return Item(path, file, "train", printable(parts[0])) if len(parts) > 1 else None
    part = part_of(parts[0])
    return Item(path, file, part, printable(parts[1])) if part and len(parts) > 2 else None
