"""Files of class names: one name per line, a JSON list, or a JSON object by index or by name."""

import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from models.errors import WeightsError
from models.files.text_encodings import decode_text

MAX_BYTES = 16 * 2**20
FORMS = '["ant", "bee"], {"0": "ant"}, {"ant": 0} or {"0": ["n02219486", "ant"]}'
# Configurations that hold them: Transformers', torchvision's ImageFolder, YOLO's and others
HOLDERS = ("id2label", "label2id", "class_to_idx", "idx_to_class", "names", "classes", "class_names", "labels")
MAX_NAME = 255  # characters
JOINERS = "\u200c\u200d"  # zero width, which Persian and emoji are written with


def complaint(names: Iterable[str]) -> str | None:
    """Returns an error text for the first class name that is empty, too long or not printable; None where all are good."""
    for name in names:
        if not 0 < len(name) <= MAX_NAME:
            shown = f"{escaped(name)[:50]!r}... has {len(name):,} characters" if name else "is empty"
            return f"the class name {shown}; a class name has 1 to {MAX_NAME}"
        if not all(char.isprintable() or char in JOINERS or unicodedata.category(char) == "Zs" for char in name):
            return f"the class name '{escaped(name)}' has characters that cannot be printed; rename the class"
    return None


def escaped(name: str) -> str:
    """Returns the name with its unprintable characters as escapes: `red\\x1b[31m`."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in name)


def read_classes(path: Path) -> list[str]:
    """Returns the class names in a file, in the order of their indices. Raises WeightsError."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise WeightsError(f"{path} is refused: larger than {MAX_BYTES} bytes")
        text = read_text(path.read_bytes(), str(path))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if path.suffix.lower() in (".yaml", ".yml"):
        raise WeightsError(f"{path} is YAML; give the class names as JSON, {FORMS}, or as text, one a line")
    return parse_classes(text, str(path))


def read_text(data: bytes, source: str) -> str:
    """Decodes the content of such a file. Raises WeightsError."""
    try:
        return decode_text(data)
    except UnicodeDecodeError as error:
        raise WeightsError(
            f"{source} cannot be read as text: class names are UTF-8, or UTF-16 with its mark"
        ) from error


def parse_classes(text: str, source: str) -> list[str]:
    """Returns the class names in the text of such a file. `source` is for messages. Raises WeightsError."""
    if not text.lstrip().startswith(("[", "{")):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        content = json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, source))
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            f"{source} begins like JSON but is not; class names are JSON such as {FORMS}, or text, one a line"
        ) from error
    return names_of(content, source)


def names_of(content: Any, source: str) -> list[str]:
    """Returns the class names in parsed JSON. Raises WeightsError."""
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return list(content)
    if isinstance(content, dict):
        for key in HOLDERS:
            if isinstance(content.get(key), dict | list):
                return names_of(content[key], source)
        if content and all(type(index) is int for index in content.values()):
            return _in_order(((index, name) for name, index in content.items()), source)
        if content and all(index.isdecimal() for index in content):
            # torchvision and Keras have ["n01440764", "tench"] for a class
            labels = (entry[-1] if isinstance(entry, list) and entry else entry for entry in content.values())
            return _in_order(zip(map(int, content), labels, strict=True), source)
        if content and all(isinstance(index, str) and index.isdecimal() for index in content.values()):
            return _in_order(((int(index), name) for name, index in content.items()), source)
    raise WeightsError(f"{source} must be a JSON list of class names, all of them text, or one of {FORMS}")


def _once(pairs: list[tuple[str, Any]], source: str) -> dict[str, Any]:
    """Returns a JSON object. Raises WeightsError for a repeated key, of which json would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise WeightsError(f"{source} has the key {twice[:50]!r} twice; give each index and each class once")
    return found


def _in_order(pairs: Iterable[tuple[int, Any]], source: str) -> list[str]:
    by_index: dict[int, Any] = {}
    for index, name in pairs:
        if index in by_index:
            raise WeightsError(f"{source} gives two class names the index {index}")
        by_index[index] = name
    missing = next((index for index in range(len(by_index)) if index not in by_index), None)
    if missing is not None:
        raise WeightsError(
            f"{source} has {len(by_index)} class names, but none with the index {missing}; indices run from 0 without a gap"
        )
    names = [by_index[index] for index in range(len(by_index))]
    if not all(isinstance(name, str) for name in names):
        raise WeightsError(f"{source} must give each index a class name that is text: {FORMS}")
    return names
