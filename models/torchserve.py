"""TorchServe's archives: a `.mar` is a zip with the weights, the class names, and code, of which nothing is executed."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from models.archive import Archive
from models.bundle import read_member
from models.checkpoints import Checkpoint, in_memory, read_tensors
from models.class_names import parse_classes
from models.errors import WeightsError

MANIFEST, LABELS = "MAR-INF/MANIFEST.json", "index_to_name.json"
MAX_TEXT = 16 * 2**20
MAX_WEIGHTS = 16 * 2**30


def is_archive(names: list[str]) -> bool:
    """True for the members of a TorchServe archive."""
    return MANIFEST in names


def read_archive(archive: Archive, path: Path) -> Checkpoint:
    """The weights and class names of an open archive. Raises WeightsError, also for one that holds code only."""
    model = _model(archive, path)
    names = archive.names
    weights = model.get("serializedFile")
    if not isinstance(weights, str) or PurePosixPath(weights).name not in names:
        raise WeightsError(
            f"{path.name} holds code only ({model.get('handler') or 'a handler'}) and no weights: "
            "import the state dict that its handler loads"
        )
    weights = PurePosixPath(weights).name
    data = read_member(archive, weights, MAX_WEIGHTS, path)
    state = read_tensors(in_memory(data), f"{path.name}/{weights}")
    classes = None
    if LABELS in names:
        text = read_member(archive, LABELS, MAX_TEXT, path).decode("utf-8-sig", "replace")
        classes = parse_classes(text, f"{path.name}/{LABELS}")
    return Checkpoint(state, classes=classes, lineage={"archive": _described(model)})


def _model(archive: Archive, path: Path) -> dict[str, Any]:
    try:
        model = json.loads(read_member(archive, MANIFEST, MAX_TEXT, path))["model"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise WeightsError(f"{path.name} is damaged: its {MANIFEST} describes no model") from error
    if not isinstance(model, dict):
        raise WeightsError(f"{path.name} is damaged: its {MANIFEST} describes no model")
    return model


def _described(model: dict[str, Any]) -> dict[str, str]:
    return {key: model[key] for key in ("modelName", "modelVersion", "handler") if isinstance(model.get(key), str)}
