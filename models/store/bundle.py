"""One model version as a zip, for another store to import.

    imago.json                      Manifest: the SHA-256 of every other file
    config.json                     ModelConfig
    head.safetensors
    reference-<hash>.safetensors    where the version has one
    backbones/<sha256>.safetensors  each once

Nothing is extracted to disk: members are read by these names, within the size that follows from the configuration, and their hash is
checked.
"""

import hashlib
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import Field, ValidationError

from models.classifier import BackboneRef, Head, ModelConfig
from models.errors import DatasetError, WeightsError
from models.files import weights_file
from models.files.records import CONFIG, Record, parse_record, to_json, to_sealed_json
from models.files.records import MAX_BYTES as MAX_RECORD
from models.files.zip_file import Archive, open_archive
from models.progress import DownloadProgress, silent
from models.store.backbones import WEIGHTS, skeleton
from models.store.store import HEAD, ModelStore
from models.uncertainty import MAX_BYTES as MAX_FEATURES
from models.uncertainty import Reference, read_reference, to_file

MANIFEST, KIND, FORMAT = "imago.json", "imago model", 1
BLOCK = 2**20
REFERENCE = re.compile(r"reference-[0-9a-f]{16}\.safetensors")
MAX_MEMBERS = 1000


class Manifest(Record):
    """The files of a bundle by name, with their SHA-256."""

    kind: str
    format: int
    files: dict[str, str] = Field(min_length=2)


# Writing


def write_bundle(store: ModelStore, config: ModelConfig, path: Path) -> None:
    """Writes the version to a new zip at `path`. Raises WeightsError where a file of it is damaged."""
    content = {CONFIG: to_sealed_json(config)}
    if (reference := store.load_reference(config)) is not None:
        name, content[name] = to_file(reference)
    sources = {HEAD: (store.head_file(config), config.head_sha256)}
    for ref in config.backbones:
        sources[_member_of(ref)] = (store.backbones.folder(ref) / WEIGHTS, ref.sha256)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    hashes |= {name: sha256 for name, (_, sha256) in sources.items()}
    content[MANIFEST] = to_json(Manifest(kind=KIND, format=FORMAT, files=hashes))
    with zipfile.ZipFile(path, "x") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
        for name, (file, sha256) in sources.items():
            _copy(archive, name, file, sha256)


def _member_of(ref: BackboneRef) -> str:
    return f"backbones/{ref.sha256}.safetensors"


def _copy(archive: zipfile.ZipFile, name: str, file: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    try:
        with file.open("rb") as source, archive.open(name, "w", force_zip64=True) as member:
            while block := source.read(BLOCK):
                digest.update(block)
                member.write(block)
    except FileNotFoundError as error:
        raise WeightsError(f"{file} is missing; pull, import or publish the weights again") from error
    if digest.hexdigest() != sha256:
        raise WeightsError(f"{file} is damaged; pull, import or publish the weights again")


# Reading


def is_bundle(names: list[str]) -> bool:
    """Returns whether these members are those of a bundle."""
    return MANIFEST in names


def import_bundle(
    path: Path, store: ModelStore, name: str | None = None, progress: DownloadProgress = silent
) -> ModelConfig:
    """Publishes the version in a bundle as the next version of `name`, by default of its own name. Existing backbones are shared.

    Raises WeightsError for a damaged or unknown file, ArchitectureNotFound, InvalidName. Nothing is published then.
    """
    with opened(path) as archive:
        manifest = _manifest(archive, path)
        config = _config(archive, manifest, path)
        refs = {ref.sha256: ref for ref in config.backbones}
        steps = len(refs) + 2
        head = _head(archive, manifest, config, path)
        reference = _reference(archive, manifest, path)
        for done, ref in enumerate(refs.values(), 1):
            progress(done, steps)
            limit = _size_of(skeleton(ref.architecture, ref.preprocessing)) + weights_file.MAX_HEADER
            store.backbones.put_file(ref, _read(archive, manifest, _member_of(ref), limit, path))
    _check_widths(store, config, path)
    progress(steps, steps)
    return store.publish(
        name or config.name, config.backbones, head, config.classes, config.metrics, config.lineage, reference
    )


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """Opens a zip and checks its table of contents. Raises WeightsError for another file, and for a zip bomb."""
    try:
        with open_archive(path) as archive:
            if len(set(archive.names)) != len(archive.names):
                raise WeightsError(f"{path.name} is refused: two of its members have the same name")
            yield archive
    except DatasetError as error:
        raise WeightsError(str(error)) from error


def _manifest(archive: Archive, path: Path) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(read_member(archive, MANIFEST, MAX_RECORD, path))
    except ValidationError as error:
        raise WeightsError(f"{path.name} is refused: its {MANIFEST} is not that of an exported model") from error
    if (manifest.kind, manifest.format) != (KIND, FORMAT):
        raise WeightsError(f"{path.name} is refused: it is of another version of Imago; export it again with this one")
    members = {*archive.names} - {MANIFEST}
    if strangers := members ^ manifest.files.keys():
        listed = weights_file.listed(sorted(json.dumps(name) for name in strangers))
        raise WeightsError(f"{path.name} is damaged: its files are not those it names: {listed}; export it again")
    return manifest


def _config(archive: Archive, manifest: Manifest, path: Path) -> ModelConfig:
    data = _read(archive, manifest, CONFIG, MAX_RECORD, path)
    config = parse_record(data, ModelConfig, f"{CONFIG} of {path.name}")
    expected = {CONFIG, HEAD, *(_member_of(ref) for ref in config.backbones)}
    others = [name for name in manifest.files if name not in expected]
    if expected - manifest.files.keys() or len(others) > 1 or not all(map(REFERENCE.fullmatch, others)):
        raise WeightsError(f"{path.name} is refused: its files are not those of {config.name}@{config.version}")
    return config


def _head(archive: Archive, manifest: Manifest, config: ModelConfig, path: Path) -> Head:
    with torch.device("meta"):
        head = Head(config.head, len(config.classes))
    data = _read(archive, manifest, HEAD, _size_of(head) + weights_file.MAX_HEADER, path)
    if manifest.files[HEAD] != config.head_sha256:
        raise WeightsError(f"{path.name} is damaged: its {HEAD} is not that of its {CONFIG}")
    weights_file.load_into(head, weights_file.parse(bytearray(data), path), f"{HEAD} in {path.name}")
    return head.eval().requires_grad_(False)


def _reference(archive: Archive, manifest: Manifest, path: Path) -> Reference | None:
    name = next(filter(REFERENCE.fullmatch, manifest.files), None)
    if name is None:
        return None
    data = _read(archive, manifest, name, 2 * MAX_FEATURES + weights_file.MAX_HEADER, path)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(data)
        try:
            return read_reference(file)
        except WeightsError as error:
            raise WeightsError(f"{path.name} is damaged: {name} cannot be read; export it again") from error


def _size_of(module: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def _read(archive: Archive, manifest: Manifest, name: str, limit: int, path: Path) -> bytes:
    """Reads a member and checks its hash. Raises WeightsError."""
    data = read_member(archive, name, limit, path)
    if hashlib.sha256(data).hexdigest() != manifest.files.get(name):
        raise WeightsError(f"{path.name} is damaged: {name} does not have its hash; export or copy it again")
    return data


def read_member(archive: Archive, name: str, limit: int, path: Path) -> bytes:
    """Reads a member of at most `limit` bytes. Raises WeightsError."""
    try:
        member = archive.member(name)
        if member.size > limit:
            raise WeightsError(f"{path.name} is refused: {name} has {member.size:,} bytes, expected at most {limit:,}")
        with archive.open(member) as content:
            return content.read()
    except KeyError as error:
        raise WeightsError(f"{path.name} is refused: it has no {name}") from error
    except WeightsError:
        raise
    except Exception as error:  # BadZipFile, zlib.error, EOFError, RuntimeError of an encrypted one ...
        raise WeightsError(f"{path.name} is damaged: {name} cannot be read; export or copy it again") from error


def _check_widths(store: ModelStore, config: ModelConfig, path: Path) -> None:
    """Raises WeightsError unless each backbone runs and has as many features as its layer of the head."""
    for ref, layer in zip(config.backbones, config.head.layers, strict=True):
        width = store.load_backbone(ref).feature_dim
        fits = width % layer.in_features == 0 if layer.kind == "conv" else width == layer.in_features
        if not fits:
            raise WeightsError(
                f"{path.name} is refused: {ref.key} has {width} features, its head wants {layer.in_features}"
            )
