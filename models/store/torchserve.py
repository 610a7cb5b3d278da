"""TorchServe archives: a `.mar` is a zip with weights, class names and code. The code is never executed."""

import json
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from models.errors import WeightsError
from models.files.class_names import escaped, parse_classes, read_text
from models.files.zip_file import Archive
from models.store.bundle import read_member
from models.store.checkpoints import Checkpoint, ClassList, foreign_files, read_bytes

MANIFEST, LABELS = "MAR-INF/MANIFEST.json", "index_to_name.json"
MAX_TEXT = 16 * 2**20
MAX_WEIGHTS = 16 * 2**30


def is_archive(names: list[str]) -> bool:
    """Returns whether these members are those of a TorchServe archive."""
    return any(name == MANIFEST or name.endswith(f"/{MANIFEST}") for name in names)


def read_archive(archive: Archive, path: Path) -> Checkpoint:
    """Reads the weights and class names of an open archive. Raises WeightsError, also for one that contains only code."""
    root = min((name for name in archive.names if is_archive([name])), key=len).removesuffix(MANIFEST)
    model = _model(archive, root, path)
    weights = _weights(archive.names, root, model, path)
    data = read_member(archive, weights, MAX_WEIGHTS, path)
    checkpoint = replace(read_bytes(data, f"{path.name}/{weights}"), lineage={"archive": _described(model)})
    if root + LABELS in archive.names:
        source = f"{path.name}/{LABELS}"
        names = parse_classes(read_text(read_member(archive, root + LABELS, MAX_TEXT, path), source), source)
        checkpoint = replace(checkpoint, classes=(ClassList(LABELS, names, is_sure=True), *checkpoint.classes))
    return checkpoint


def _weights(names: list[str], root: str, model: dict[str, Any], path: Path) -> str:
    """Returns the member with the weights, by its path in the manifest or by its name only, as torch-model-archiver packs it."""
    file = model.get("serializedFile")
    if isinstance(file, str):
        for name in (root + file, root + PurePosixPath(file).name):
            if name in names:
                return name
    handler = escaped(str(model.get("handler") or "a handler"))[:100]
    if others := [name for name in names if name.lower().endswith(foreign_files.WEIGHTS)]:
        raise WeightsError(
            f"{path.name} leaves it to its handler ({handler}) to load {others[0][:200]!r}: unpack that file, and import it"
        )
    raise WeightsError(
        f"{path.name} holds code only ({handler}) and no weights: import the state dict that its handler loads"
    )


def _model(archive: Archive, root: str, path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(read_member(archive, root + MANIFEST, MAX_TEXT, path))["model"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise WeightsError(f"{path.name} is damaged: its {MANIFEST} describes no model") from error


def _described(model: dict[str, Any]) -> dict[str, str]:
    return {key: model[key] for key in ("modelName", "modelVersion", "handler") if isinstance(model.get(key), str)}
