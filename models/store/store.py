"""The model store: backbones once by hash, model versions beside them, and the record of which version is served.

    weights/backbones/<architecture>-<sha8>/   model.safetensors, config.json (BackboneRef)
    weights/models/<name>/<version>/           head.safetensors, config.json (ModelConfig), reference-<hash>.safetensors
    weights/serving.json                       Serving; before the first change of it, weights/shipped.json

Nothing that is published is ever modified: files are written in a temporary folder, and one rename publishes it. Writers, in
however many processes, take turns at `weights/.lock`; readers need no lock. A read-only folder can be served: every method that
writes raises ReadOnlyStore there.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn

from models.classifier import Backbone, BackboneRef, Classifier, Head, ModelConfig, ModelName, VersionNumber
from models.errors import InvalidName, ModelNotFound, NameConflict, WeightsError
from models.files import atomic_files, weights_file
from models.files.records import CONFIG, NAME_PATTERN, Record, fault_of, has_hash, read_record, to_sealed_json
from models.preprocessing import Preprocessing
from models.store.backbones import BackboneStore
from models.uncertainty import REFERENCES, Reference, read_reference, to_file

HEAD = "head.safetensors"
SERVING, SHIPPED = "serving.json", "shipped.json"


class Serving(Record):
    """Which version of which model is served, what it replaced, and which model answers when none is named."""

    default: ModelName | None = None
    models: dict[ModelName, VersionNumber] = Field(default_factory=dict)
    previous: dict[ModelName, VersionNumber] = Field(default_factory=dict)


class ModelStore:
    """The weights folder. Methods raise InvalidName for a name that NAME_PATTERN refuses, before it touches a path."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.models = self.root / "models"
        self.lock = self.root / ".lock"
        self.backbones = BackboneStore(self.root / "backbones", self.lock)

    # Reading

    def names(self) -> list[str]:
        """Every model with at least one version, damaged ones included: `config` says what ails them."""
        entries = sorted(entry.name for entry in self.models.iterdir()) if self.models.is_dir() else []
        return [name for name in entries if re.fullmatch(NAME_PATTERN, name) and self.versions(name)]

    def versions(self, name: str) -> list[int]:
        """Ascending; empty when there is no such model."""
        return [version for version in self._numbers(name) if (self._folder(name, version) / CONFIG).exists()]

    def newest_sound(self, name: str, is_wanted: Callable[[ModelConfig], bool]) -> ModelConfig | None:
        """Returns the latest wanted version whose record can be read, if its weights are sound too; reads them all."""
        for version in reversed(self.versions(name)):
            with suppress(WeightsError):
                config = self.config(name, version)
                if is_wanted(config):
                    return config if self.is_sound(config) else None
        return None

    def config(self, name: str, version: int | None = None) -> ModelConfig:
        """A version's configuration, the latest by default. Raises ModelNotFound, or WeightsError when this one is damaged."""
        version = self._find(name, version)
        path = self._folder(name, version) / CONFIG
        config = read_record(path, ModelConfig)
        if (config.name, config.version) != (name, version):
            raise WeightsError(f"{path} belongs to {config.name}@{config.version}; publish instead of copying folders")
        return config

    def has_hash(self, config: ModelConfig) -> bool:
        """Returns whether the version's record carries its hash, so that an edit of it is noticed."""
        return has_hash(self._folder(config.name, config.version) / CONFIG)

    def load_backbone(self, ref: BackboneRef) -> Backbone:
        """A network ready to use: hash verified, float32, eval mode, on the CPU, no gradients."""
        return self.backbones.load(ref)

    def load_head(self, config: ModelConfig) -> Head:
        """The version's head: hash verified, float32, eval mode, on the CPU, no gradients."""
        path = self.head_file(config)
        with torch.device("meta"):
            head = Head(config.head, len(config.classes))
        weights_file.load(head, path, config.head_sha256)
        return head.eval().requires_grad_(False)

    def load(self, name: str, version: int | None = None) -> Classifier:
        """A whole classifier. Raises ModelNotFound, or WeightsError that names the damaged file."""
        config = self.config(name, version)
        head = self.load_head(config)
        loaded = {ref: self.load_backbone(ref) for ref in config.backbones}
        return Classifier(config, tuple(loaded[ref] for ref in config.backbones), head)

    def load_reference(self, config: ModelConfig) -> Reference | None:
        """What the version keeps of its data; None where it keeps nothing. Raises WeightsError when the file is damaged."""
        found = [path for path in self._folder(config.name, config.version).glob(REFERENCES) if path.is_file()]
        return read_reference(max(found, key=lambda path: path.stat().st_mtime)) if found else None

    def head_file(self, config: ModelConfig) -> Path:
        """The weights of the version's head."""
        return self._folder(config.name, config.version) / HEAD

    def backbone_size(self, ref: BackboneRef) -> int:
        """Bytes on disk."""
        return self.backbones.size(ref)

    def is_sound(self, config: ModelConfig) -> bool:
        """Whether every file of this version is there and has the hash it should have; reads them all."""
        return self.head_is_sound(config) and all(map(self.backbones.is_sound, config.backbones))

    def head_is_sound(self, config: ModelConfig) -> bool:
        """The same of the version's own weights alone."""
        return weights_file.has_hash(self.head_file(config), config.head_sha256)

    # Publishing

    def put_backbone(
        self,
        architecture: str,
        weights: nn.Module | Mapping[str, Tensor],
        preprocessing: Preprocessing,
        half: bool = False,
    ) -> BackboneRef:
        """Stores a backbone under the hash of its weights; where it is already, nothing is written.

        `weights` is the module, or its state dict; it must fit the architecture (WeightsError). `half` stores matrices and
        kernels as float16. A backbone on which no version stands is swept by a later `remove`, so publish within the hour.
        """
        return self.backbones.put(architecture, weights, preprocessing, half)

    def publish(
        self,
        name: str,
        backbones: Sequence[BackboneRef],
        head: Head,
        classes: Sequence[str],
        metrics: Mapping[str, Any] | None = None,
        lineage: Mapping[str, Any] | None = None,
        reference: Reference | None = None,
    ) -> ModelConfig:
        """Publishes the next version of a model, atomically; it is served once it is activated.

        Whoever publishes at the same moment, in this process or another, gets a version of their own.
        """
        _check_name(name)
        if len(classes) != head.num_classes:
            raise WeightsError(f"{len(classes)} class names, but the head has {head.num_classes} classes")
        data = weights_file.serialise(head.state_dict())
        try:
            config = ModelConfig(
                name=name,
                version=1,  # until the lock is held
                classes=tuple(classes),
                backbones=tuple(backbones),
                head=head.config,
                head_sha256=hashlib.sha256(data).hexdigest(),
                metrics=dict(metrics or {}),
                lineage=dict(lineage or {}),
            )
        except ValidationError as error:
            raise WeightsError(f"{name} cannot be published: {fault_of(error)}") from error
        return self._publish(config, data, reference)

    def put_reference(self, config: ModelConfig, reference: Reference) -> None:
        """Gives a version that is published already another reference: the one thing in its folder that may be replaced."""
        folder = self._folder(config.name, config.version)
        name, data = to_file(reference)
        with self._locked():
            self.config(config.name, config.version)
            before = [path for path in folder.glob(REFERENCES) if path.name != name]
            atomic_files.replace(folder / name, data)
            for path in before:
                path.unlink(missing_ok=True)

    def _publish(self, draft: ModelConfig, head: bytes, reference: Reference | None) -> ModelConfig:
        with atomic_files.writing(self.root), atomic_files.staging(self.models, self.lock) as folder:
            atomic_files.write(folder / HEAD, head)
            if reference is not None:
                name, data = to_file(reference)
                atomic_files.write(folder / name, data)
            with self._locked():
                for ref in draft.backbones:
                    self.backbones.size(ref)  # raises where it is missing
                config = draft.model_copy(update={"version": max(self._numbers(draft.name), default=0) + 1})
                atomic_files.write(folder / CONFIG, to_sealed_json(config))
                target = self._folder(config.name, config.version)
                target.parent.mkdir(exist_ok=True)
                atomic_files.move(folder, target)
        return config

    # Serving

    def serving(self) -> Serving:
        """What is served: until anything is recorded, what the folder was shipped with; nothing in a new store. Raises WeightsError when
        the record is damaged."""
        for path in (self.root / SERVING, self.root / SHIPPED):
            if path.exists():
                return read_record(path, Serving)
        return Serving()

    def activate(self, name: str, version: int) -> Serving:
        """Serves this version from the next sync on, and remembers the one it replaces. Where none is served, it is the default."""
        with self._locked():
            self.config(name, version)
            serving = self.serving()
            replaced = serving.models.get(name, version)
            remembered = {name: replaced} if replaced != version else {}
            return self._record(
                default=serving.default if serving.models else name,
                models=serving.models | {name: version},
                previous=serving.previous | remembered,
            )

    def deactivate(self, name: str) -> Serving:
        """Stops serving a model; its versions stay. Raises NameConflict for the default while others are served."""
        with self._locked():
            return self._forget(name)

    def previous(self, name: str) -> int:
        """The version that was served before this one. Raises ModelNotFound, and NameConflict where there is none."""
        serving = self._require_served(name)
        if name not in serving.previous:
            raise NameConflict(f"model {name!r} has no previous version to roll back to; activate one by its number")
        return serving.previous[name]

    def rollback(self, name: str) -> Serving:
        """Serves again what was served before; a second rollback returns to what is served now."""
        with self._locked():
            previous = self.previous(name)
            self.config(name, previous)
            serving = self.serving()
            current = serving.models[name]
            return self._record(
                default=serving.default,
                models=serving.models | {name: previous},
                previous=serving.previous | {name: current},
            )

    def set_default(self, name: str) -> Serving:
        """The model that answers when a request names none. It must be served."""
        with self._locked():
            serving = self._require_served(name)
            return self._record(default=name, models=serving.models, previous=serving.previous)

    def _record(self, default: str | None, models: dict[str, int], previous: dict[str, int]) -> Serving:
        serving = Serving(default=default, models=models, previous=previous)
        atomic_files.sweep(self.root)
        atomic_files.replace(self.root / SERVING, to_sealed_json(serving))
        return serving

    def _require_served(self, name: str) -> Serving:
        _check_name(name)
        serving = self.serving()
        if name not in serving.models:
            raise ModelNotFound(f"model {name!r} is not served; activate a version of it first")
        return serving

    def _forget(self, name: str) -> Serving:
        serving = self._require_served(name)
        if serving.default == name and len(serving.models) > 1:
            raise NameConflict(
                f"{name!r} is the default model: requests that name none would get another model's classes; "
                f"`imago models default NAME` sets another one first"
            )
        return self._record(
            default=None if serving.default == name else serving.default,
            models=_without(serving.models, name),
            previous=_without(serving.previous, name),
        )

    # Removing

    def remove(self, name: str, version: int | None = None) -> None:
        """Removes a version, or the whole model, served or not; then the backbones that nothing stands on any more.

        Raises NameConflict for a version that is served, and for the default model while others are. A version's number is not given
        again while the model exists.
        """
        with self._locked():
            self._find(name, version)
            removed = self.versions(name) if version is None else [version]
            released = self._stood_on(name, removed)
            if version is None:
                with suppress(ModelNotFound):
                    self._forget(name)
                atomic_files.discard(self.models / name)
            else:
                self._remove_version(name, version)
            self._sweep(released)

    def sweep(self) -> None:
        """Removes what killed writers left behind, and backbones put over an hour ago on which no version stands."""
        with self._locked():
            atomic_files.sweep(self.root)
            atomic_files.sweep(self.models)
            self._sweep({})

    def _remove_version(self, name: str, version: int) -> None:
        serving = self.serving()
        if serving.models.get(name) == version:
            raise NameConflict(f"{name}@{version} is served; activate another version first, or remove the whole model")
        if serving.previous.get(name) == version:
            self._record(serving.default, serving.models, _without(serving.previous, name))
        folder = self._folder(name, version)
        atomic_files.discard(folder)
        folder.mkdir()  # keeps the number taken: whoever still holds this version in memory never meets a namesake

    def _stood_on(self, name: str, versions: Sequence[int]) -> dict[str, int]:
        """Keys of the backbones of these versions, with the time (ns) of the last publication among them."""
        released: dict[str, int] = {}
        for version in versions:
            with suppress(WeightsError):
                for ref in self.config(name, version).backbones:
                    published = self._folder(name, version).stat().st_mtime_ns
                    released[ref.key] = max(published, released.get(ref.key, 0))
        return released

    def _sweep(self, released: Mapping[str, int]) -> None:
        """Backbones may go only when every version's configuration can be read: a damaged one may stand on any of them."""
        try:
            configs = [self.config(name, version) for name in self.names() for version in self.versions(name)]
        except WeightsError:
            return
        self.backbones.sweep({ref.key for config in configs for ref in config.backbones}, released)

    # Paths

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with atomic_files.writing(self.root), atomic_files.locked(self.lock):
            yield

    def check_writable(self) -> None:
        """Tries to write. Raises ReadOnlyStore, so that nobody trains or loads for what could not be stored."""
        with self._locked():
            for folder in (self.root, self.models, self.backbones.root):
                if folder.is_dir():
                    atomic_files.try_write(folder)

    def _find(self, name: str, version: int | None) -> int:
        versions = self.versions(name)
        if not versions:
            raise ModelNotFound(f"no model {name!r} in the store; pull, import or train it first")
        if version is None:
            return versions[-1]
        if version not in versions:
            raise ModelNotFound(f"model {name!r} has no version {version}; it has {', '.join(map(str, versions))}")
        return version

    def _numbers(self, name: str) -> list[int]:
        """Every version number ever given, removed ones included, ascending."""
        _check_name(name)
        folder = self.models / name
        if not folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in folder.iterdir() if re.fullmatch(r"[1-9][0-9]{0,8}", entry.name))

    def _folder(self, name: str, version: int) -> Path:
        _check_name(name)
        return self.models / name / str(version)


def _check_name(name: str) -> None:
    if not re.fullmatch(NAME_PATTERN, name):
        raise InvalidName(
            f"{name[:80]!r} is not a model name; lower-case letters, digits, '.', '_' and '-', at most 64"
        )


def _without(entries: dict[str, int], name: str) -> dict[str, int]:
    return {key: value for key, value in entries.items() if key != name}
