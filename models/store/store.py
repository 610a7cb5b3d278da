"""The model store: backbones by hash, model versions, and the record of which version is served.

    weights/backbones/<architecture>-<sha8>/   model.safetensors, config.json (BackboneRef)
    weights/models/<name>/<version>/           head.safetensors, config.json (ModelConfig), reference-<hash>.safetensors
    weights/serving.json                       Serving; before the first change of it, weights/shipped.json

Published files are never modified: they are written to a temporary folder, and one rename publishes it. Writers of all processes
share the lock `weights/.lock`; readers need no lock. A read-only folder can be served: methods that write raise ReadOnlyStore.
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
    """The served version of each model, the version before it, and the default model of requests that name none."""

    default: ModelName | None = None
    models: dict[ModelName, VersionNumber] = Field(default_factory=dict)
    previous: dict[ModelName, VersionNumber] = Field(default_factory=dict)


class ModelStore:
    """The weights folder. Methods raise InvalidName for a name that does not match NAME_PATTERN, before they use it in a path."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.models = self.root / "models"
        self.lock = self.root / ".lock"
        self.backbones = BackboneStore(self.root / "backbones", self.lock)

    # Reading

    def names(self) -> list[str]:
        """Returns every model with at least one version, also damaged ones, for which `config` raises."""
        entries = sorted(entry.name for entry in self.models.iterdir()) if self.models.is_dir() else []
        return [name for name in entries if re.fullmatch(NAME_PATTERN, name) and self.versions(name)]

    def versions(self, name: str) -> list[int]:
        """Returns the versions in ascending order, none for an unknown model."""
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
        """Returns the configuration of a version, by default of the latest. Raises ModelNotFound, and WeightsError when it is damaged."""
        version = self._find(name, version)
        path = self._folder(name, version) / CONFIG
        config = read_record(path, ModelConfig)
        if (config.name, config.version) != (name, version):
            raise WeightsError(f"{path} belongs to {config.name}@{config.version}; publish instead of copying folders")
        return config

    def has_hash(self, config: ModelConfig) -> bool:
        """Returns whether the record of the version contains its hash, so that an edit is detected."""
        return has_hash(self._folder(config.name, config.version) / CONFIG)

    def load_backbone(self, ref: BackboneRef) -> Backbone:
        """Loads a backbone: hash verified, float32, eval mode, on the CPU, no gradients. Raises WeightsError."""
        return self.backbones.load(ref)

    def load_head(self, config: ModelConfig) -> Head:
        """Loads the head of a version: hash verified, float32, eval mode, on the CPU, no gradients. Raises WeightsError."""
        path = self.head_file(config)
        with torch.device("meta"):
            head = Head(config.head, len(config.classes))
        weights_file.load(head, path, config.head_sha256)
        return head.eval().requires_grad_(False)

    def load(self, name: str, version: int | None = None) -> Classifier:
        """Loads a classifier. Raises ModelNotFound, and WeightsError that names the damaged file."""
        config = self.config(name, version)
        head = self.load_head(config)
        loaded = {ref: self.load_backbone(ref) for ref in config.backbones}
        return Classifier(config, tuple(loaded[ref] for ref in config.backbones), head)

    def load_reference(self, config: ModelConfig) -> Reference | None:
        """Loads the reference data of a version; None where it has none. Raises WeightsError when the file is damaged."""
        found = [path for path in self._folder(config.name, config.version).glob(REFERENCES) if path.is_file()]
        return read_reference(max(found, key=lambda path: path.stat().st_mtime)) if found else None

    def head_file(self, config: ModelConfig) -> Path:
        """Returns the path of the weights of the version's head."""
        return self._folder(config.name, config.version) / HEAD

    def backbone_size(self, ref: BackboneRef) -> int:
        """Returns the bytes on disk. Raises WeightsError where the file is missing."""
        return self.backbones.size(ref)

    def is_sound(self, config: ModelConfig) -> bool:
        """Returns whether every file of the version is there and has its hash; reads them all."""
        return self.head_is_sound(config) and all(map(self.backbones.is_sound, config.backbones))

    def head_is_sound(self, config: ModelConfig) -> bool:
        """Returns whether the head of the version is there and has its hash."""
        return weights_file.has_hash(self.head_file(config), config.head_sha256)

    # Publishing

    def put_backbone(
        self,
        architecture: str,
        weights: nn.Module | Mapping[str, Tensor],
        preprocessing: Preprocessing,
        half: bool = False,
    ) -> BackboneRef:
        """Stores a backbone by the hash of its weights, unless it is there already.

        `weights`: the module or its state dict. `half` stores matrices and kernels as float16. `remove` deletes backbones that no
        version has used for an hour. Raises WeightsError where the weights do not fit the architecture.
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
        """Publishes the next version of a model atomically. `activate` serves it. Raises InvalidName, WeightsError.

        Concurrent publications, also in other processes, get different versions.
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
        """Replaces the reference data of a published version, the only file of it that may change."""
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
        """Returns the serving record, at first that of the shipped folder; empty in a new store. Raises WeightsError when it is damaged."""
        for path in (self.root / SERVING, self.root / SHIPPED):
            if path.exists():
                return read_record(path, Serving)
        return Serving()

    def activate(self, name: str, version: int) -> Serving:
        """Serves this version from the next sync on, and records the one before it. The first served model becomes the default."""
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
        """Stops serving a model and keeps its versions. Raises NameConflict for the default while others are served."""
        with self._locked():
            return self._forget(name)

    def previous(self, name: str) -> int:
        """Returns the version that was served before this one. Raises ModelNotFound, and NameConflict where there is none."""
        serving = self._require_served(name)
        if name not in serving.previous:
            raise NameConflict(f"model {name!r} has no previous version to roll back to; activate one by its number")
        return serving.previous[name]

    def rollback(self, name: str) -> Serving:
        """Serves the previous version again; a second rollback undoes the first."""
        with self._locked():
            previous = self.previous(name)
            self.config(name, previous)
            serving = self.serving()
            current = serving.models[name]
            return self._record(serving.default, serving.models | {name: previous}, serving.previous | {name: current})

    def set_default(self, name: str) -> Serving:
        """Sets the model of requests that name none. Raises ModelNotFound where it is not served."""
        with self._locked():
            serving = self._require_served(name)
            return self._record(name, serving.models, serving.previous)

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
                f"{name!r} is the default model: requests that name none would get the classes of another model; "
                f"`imago models default NAME` sets another one first"
            )
        default = None if serving.default == name else serving.default
        return self._record(default, _without(serving.models, name), _without(serving.previous, name))

    # Removing

    def remove(self, name: str, version: int | None = None) -> None:
        """Removes a version, or a whole model even if it is served; then the backbones that no version uses any more.

        Raises NameConflict for a served version, and for the default model while others are served. The number of a version is not
        reused while the model exists.
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
        """Deletes the leftovers of killed writers, and backbones that no version uses and that were stored over an hour ago."""
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
        folder.mkdir()  # reserves the number: a process that has this version in memory must not find another under it

    def _stood_on(self, name: str, versions: Sequence[int]) -> dict[str, int]:
        """Returns the keys of the backbones of these versions, with the time (ns) of the last publication among them."""
        released: dict[str, int] = {}
        for version in versions:
            with suppress(WeightsError):
                for ref in self.config(name, version).backbones:
                    published = self._folder(name, version).stat().st_mtime_ns
                    released[ref.key] = max(published, released.get(ref.key, 0))
        return released

    def _sweep(self, released: Mapping[str, int]) -> None:
        """Deletes unused backbones if every configuration can be read: a version with a damaged one may use any of them."""
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
        """Tries to write before long work whose result must be stored. Raises ReadOnlyStore."""
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
        """Returns every version number that was ever used, also of removed versions, in ascending order."""
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
