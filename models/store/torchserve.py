"""TorchServe's archives: a `.mar` is a zip with the weights, the class names, and code, of which nothing is executed."""

import json
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from models.errors import WeightsError
from models.files.class_names import parse_classes
from models.files.zip_file import Archive
from models.store.bundle import read_member
from models.store.checkpoints import Checkpoint, ClassList, read_bytes

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
    checkpoint = replace(read_bytes(data, f"{path.name}/{weights}"), lineage={"archive": _described(model)})
    if LABELS in names:
        text = read_member(archive, LABELS, MAX_TEXT, path).decode("utf-8-sig", "replace")
        names = parse_classes(text, f"{path.name}/{LABELS}")
        checkpoint = replace(checkpoint, classes=(ClassList(LABELS, names, is_sure=True), *checkpoint.classes))
    return checkpoint


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
