"""Writes the files of an export: all of them or none, without overwriting files unless that is forced."""

import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from models.architectures import licences
from models.classifier import ModelConfig
from models.errors import ExportError
from models.store.bundle import write_bundle
from models.store.export.details import details
from models.store.export.graph import graph_inputs
from models.store.export.onnx_file import check_onnx, write_onnx
from models.store.export.openvino_file import check_openvino, write_openvino
from models.store.store import ModelStore

ExportFormat = Literal["onnx", "openvino", "store"]
FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
SUFFIXES: dict[ExportFormat, tuple[str, ...]] = {
    "onnx": (".onnx", ".zip"),
    "openvino": (".xml", ".zip"),
    "store": (".zip",),
}
SCRIPT = Path(__file__).with_name("predict.py")


@dataclass(frozen=True)
class Exported:
    """The written files, and warnings about the licence."""

    config: ModelConfig
    files: tuple[Path, ...]
    warnings: tuple[str, ...]


def export(
    store: ModelStore, config: ModelConfig, file_format: ExportFormat, out: Path, force: bool = False
) -> Exported:
    """Write a version to `out`, with its other files beside it, or all in one if it ends in `.zip`. `force` overwrites.

    Raises ExportError, and WeightsError if the stored weights are damaged.
    """
    _check(file_format, out)
    if not force:
        _check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".export-", dir=out.parent))
    try:
        made = _packed(_write(store, config, file_format, draft, out), draft / out.name)
        targets = [out.parent / file.name for file in made]
        for file, target in zip(made, targets, strict=True):
            if not force and not _same(file, target):
                _check_free(target)
        for file, target in zip(made, targets, strict=True):
            os.replace(file, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Exported(config, tuple(targets), tuple(licences.warnings_of(config.lineage)))


def _check(file_format: ExportFormat, out: Path) -> None:
    suffixes = SUFFIXES[file_format]
    if out.suffix not in suffixes:
        raise ExportError(f"{out.name!r} must end in {' or '.join(suffixes)} for --format {file_format}")
    if file_format == "onnx":
        check_onnx()
    if file_format == "openvino":
        check_openvino()


def _check_free(target: Path) -> None:
    if target.exists():
        raise ExportError(f"{target} exists already: name another file, or overwrite it with --force")


def _write(
    store: ModelStore, config: ModelConfig, file_format: ExportFormat, folder: Path, out: Path
) -> Sequence[Path]:
    """Write the files of a format into `folder`, named after `out`."""
    if file_format == "store":
        write_bundle(store, config, folder / out.name)
        return [folder / out.name]
    inputs = graph_inputs(config)
    about = details(config, inputs, licences.licences_of(config.lineage))
    classifier = store.load(config.name, config.version)
    if file_format == "openvino":
        return write_openvino(classifier, inputs, about, folder / f"{out.stem}.xml")
    script = Path(shutil.copyfile(SCRIPT, folder / SCRIPT.name))
    return [*write_onnx(classifier, inputs, about, folder / f"{out.stem}.onnx"), script]


def _packed(made: Sequence[Path], out: Path) -> Sequence[Path]:
    """Return the files, or the zip that contains them if `out` is one; it is not compressed, because weights hardly compress."""
    if out.suffix != ".zip" or out in made:
        return made
    with zipfile.ZipFile(out, "x") as archive:
        for file in made:
            archive.write(file, file.name)
            file.unlink()
    return [out]


def _same(file: Path, target: Path) -> bool:
    """Return whether an earlier export wrote the same script."""
    return file.name == SCRIPT.name and target.is_file() and target.read_bytes() == file.read_bytes()
