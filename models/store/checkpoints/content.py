"""The content of a checkpoint: which entries are tensors, class names, the name of the architecture."""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from models.errors import WeightsError
from models.files.class_names import names_of
from models.store.checkpoints.placeholders import (
    NameAt,
    NumpyArrayAt,
    StorageAt,
    TensorAt,
    Thing,
    Unordered,
    mapping_of,
    plain,
)
from models.store.checkpoints.torch_files import is_strided

MAX_DEPTH = 5  # of nested wrappers
MAX_ENTRIES = 200_000  # dictionaries that contain each other would have no end
MAX_LIST = 16  # of dictionaries
MAX_SHOWN = 12
MAX_KEY = 500  # characters; timm's longest has about 100
MAX_NAMES = 100_000  # as many classes as a model may have
# Not of the network: optimizers have tensors of the same shapes.
STATE_OF_TRAINING = re.compile(r"optim|sched|scaler|^amp$|^loops$|rng_|random_state", re.IGNORECASE)

# Keys of class names in checkpoints. CLASS_KEYS have no other meaning, WEAK_KEYS may have one.
CLASS_KEYS = (
    *("class_to_idx", "class_to_index", "idx_to_class", "index_to_class", "idx_to_classes", "idx2class", "class2idx"),
    *("id2label", "label2id", "idx2label", "idx_to_label", "label_to_idx", "classes", "CLASSES", "class_names"),
    *("classnames", "class_labels", "label_names", "class_list", "classes_"),
)
WEAK_KEYS = ("names", "labels", "categories", "label_map", "labels_map", "label_encoder", "vocab")
ARCHITECTURE_KEYS = [
    "arch",
    "architecture",
    "model_name",
    "model_type",
    "backbone",
    "backbone_name",
    "model",
    "network",
]


@dataclass(frozen=True)
class ClassList:
    """Class names under a key of the file. `is_sure`: the key has no other meaning."""

    key: str
    names: list[str]
    is_sure: bool


@dataclass
class Content:
    """Tensors by the keys of all dictionaries around them, joined by dots; `wrappers`: the keys of these dictionaries."""

    tensors: dict[str, Any] = field(default_factory=dict)
    wrappers: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)  # key -> why it is not a plain tensor
    others: dict[str, str] = field(default_factory=dict)  # other entries, with their classes
    model: tuple[str, str] | None = None  # the key of a pickled model, and its class
    entries: int = 0


def contents(value: Any) -> Content:
    """Collects the tensors of a checkpoint. Raises WeightsError for one with too many entries."""
    content = Content()
    _collect(value, (), content)
    return content


def _collect(value: Any, path: tuple[str, ...], content: Content) -> None:
    inside = value.pairs if isinstance(value, Thing) else value
    if isinstance(inside, dict) or (isinstance(inside, list | tuple) and len(inside) <= MAX_LIST):
        content.entries += len(inside)
    if content.entries > MAX_ENTRIES:
        raise WeightsError(f"it has more than {MAX_ENTRIES:,} entries: save the state dict alone")
    items = _items(value)
    if items is None:
        if is_model(value) and content.model is None:
            content.model = ".".join(path), value.name
        if path:
            content.others[".".join(path)] = kind_of(value)
        return
    wrapper = ".".join(path)
    for key, entry in items:
        name = f"{wrapper}.{key}" if path else key
        if len(name) > MAX_KEY:
            raise WeightsError(f"a name in it has more than {MAX_KEY} characters: save the state dict alone")
        if key.endswith(("_extra_state", "rng_state", "n_averaged")) or (
            not is_strided(entry) and STATE_OF_TRAINING.search(key)
        ):
            content.others[name] = kind_of(entry)
        elif is_strided(entry):
            content.tensors[name] = entry
            if wrapper and (not content.wrappers or content.wrappers[-1] != wrapper):
                content.wrappers.append(wrapper)
        elif isinstance(entry, TensorAt | StorageAt):
            content.broken[name] = (entry.problem if isinstance(entry, TensorAt) else None) or "no plain tensor"
        elif len(path) < MAX_DEPTH:
            before, count = content.others, len(content.tensors) + len(content.broken)
            content.others = {}
            _collect(entry, (*path, key), content)
            new = content.others
            if len(content.tensors) + len(content.broken) == count:
                # One name for all its entries, except those of unknown classes.
                new = {k: kind for k, kind in new.items() if kind} or {name: ""}
            before.update(new)
            content.others = before


def _items(value: Any) -> list[tuple[str, Any]] | None:
    if isinstance(value, Thing):
        value = value.pairs or None
    if isinstance(value, dict):
        return [(str(key), entry) for key, entry in value.items() if isinstance(key, str | int | bytes)]
    if isinstance(value, list | tuple) and len(value) <= MAX_LIST and any(isinstance(v, dict | Thing) for v in value):
        return [(str(index), entry) for index, entry in enumerate(value)]
    return None


def is_model(value: Any) -> bool:
    """Returns whether the value is a pickled nn.Module."""
    return isinstance(value, Thing) and isinstance(value.state, dict) and "_modules" in value.state


def attribute_with_model(value: Any) -> str | None:
    """Returns the attribute of an object, such as the Learner of fastai, that is a pickled nn.Module."""
    state = value.state if isinstance(value, Thing) and isinstance(value.state, dict) else {}
    return next((key for key, entry in state.items() if is_model(entry) and str(key).isidentifier()), None)


def kind_of(value: Any) -> str:
    """Returns the name of the class of a value; empty for numbers, text and containers."""
    if isinstance(value, Thing | NameAt):
        return value.name[:200]
    return "numpy.ndarray" if isinstance(value, NumpyArrayAt) else ""


# Metadata


def _mappings(value: Any) -> list[tuple[str, Mapping[Any, Any]]]:
    """Returns the first 1,000 dictionaries and records with their keys, outer ones first."""
    return list(itertools.islice(_walk(value), 1000))


def _walk(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    found = mapping_of(value)
    if found is None or is_model(value) or depth > MAX_DEPTH:
        return
    yield path, found
    for key, entry in itertools.islice(found.items(), 1000):
        if isinstance(key, str) and not STATE_OF_TRAINING.search(key) and mapping_of(entry):
            yield from _walk(entry, f"{path}.{key}" if path else key, depth + 1)


def class_lists(value: Any) -> list[ClassList]:
    """Returns the lists of class names, the sure ones first."""
    found = []
    places = _mappings(value)
    read: dict[int, list[str] | None] = {}  # one value may be under many keys
    for keys, is_sure in ((CLASS_KEYS, True), (WEAK_KEYS, False)):
        for key in keys:
            for path, mapping in places:
                entry = mapping.get(key)
                if id(entry) not in read:
                    read[id(entry)] = _names(entry)
                if names := read[id(entry)]:
                    found.append(ClassList(f"{path}.{key}" if path else key, names, is_sure))
    return found


def _names(value: Any) -> list[str] | None:
    if isinstance(value, Unordered):  # without the indices of the classes
        return None
    if isinstance(value, NumpyArrayAt) and len(value.data) > MAX_NAMES * 256:
        return None
    content = plain(value)
    if isinstance(content, Mapping | list | tuple) and len(content) > MAX_NAMES:
        return None
    if isinstance(content, Mapping) and isinstance(
        content.get("classes_"), NumpyArrayAt
    ):  # the LabelEncoder of scikit-learn
        content = plain(content["classes_"])
    if isinstance(content, list | tuple):
        content = [plain(entry) for entry in content]
        if content and all(isinstance(entry, Mapping) and "name" in entry for entry in content):  # as in COCO
            ordered = sorted(content, key=lambda entry: entry["id"] if isinstance(entry.get("id"), int) else 0)
            content = [entry["name"] for entry in ordered]
        if content and all(isinstance(entry, int | str) and not isinstance(entry, bool) for entry in content):
            content = [str(entry) for entry in content]
    elif isinstance(content, Mapping):
        content = {str(key): plain(entry) for key, entry in content.items() if isinstance(key, int | str)}
    else:
        return None
    try:
        return names_of(content, "the file")
    except (WeightsError, ValueError, TypeError, RecursionError):
        return None


def architecture_names(value: Any) -> list[str]:
    """Returns the texts under the keys that name an architecture."""
    mappings = _mappings(value)
    texts = [mapping.get(key) for key in ARCHITECTURE_KEYS for _, mapping in mappings]
    return list(dict.fromkeys(text for text in texts if isinstance(text, str) and 0 < len(text) <= 100))


def described(others: Mapping[str, str]) -> str:
    """Describes skipped entries: `args (argparse.Namespace), epoch`."""
    shown = [f"{key[:80]} ({kind})" if kind else key[:80] for key, kind in others.items()]
    rest = len(shown) - MAX_SHOWN
    return ", ".join(shown[:MAX_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
