"""Backbones on disk, once by hash: `backbones/<architecture>-<sha8>/{model.safetensors, config.json}`.

`config.json` is the BackboneRef of whoever put it first; a model version carries its own reference, preprocessing included.
"""

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from models import architectures, heatmaps
from models.architectures.timm_names import is_timm
from models.classifier import Backbone, BackboneRef, Tap
from models.errors import WeightsError
from models.files import atomic_files, weights_file
from models.files.records import CONFIG, read_record, to_sealed_json
from models.preprocessing import Preprocessing

WEIGHTS = "model.safetensors"
GRACE_S = 3600  # a backbone nobody stands on yet may belong to a publication under way


class BackboneStore:
    """The folder of all backbones. `lock` is the store's lock file; methods that say so are called by its holder."""

    def __init__(self, root: Path, lock: Path) -> None:
        self.root = root
        self.lock = lock

    def folder(self, ref: BackboneRef) -> Path:
        if not is_timm(ref.architecture) and not ref.architecture.replace("_", "").isalnum():
            raise WeightsError(f"{ref.architecture!r} is not an architecture's name")
        return self.root / ref.key

    def load(self, ref: BackboneRef) -> Backbone:
        """A network ready to use: hash verified, float32, eval mode, on the CPU, no gradients."""
        path = self.folder(ref) / WEIGHTS
        module = skeleton(ref.architecture, ref.preprocessing)
        weights_file.load(module, path, ref.sha256)
        _fill_buffers(module, ref)
        module = _tapped(module, ref).eval().requires_grad_(False)
        features, name = heatmaps.find_map(module, heatmaps.probe(ref.preprocessing, 1))
        weights_file.check_finite({"features": features}, str(path))
        return Backbone(ref, module, features.shape[1], name)

    def size(self, ref: BackboneRef) -> int:
        """Bytes on disk."""
        path = self.folder(ref) / WEIGHTS
        if not path.is_file():
            raise WeightsError(f"{path} is missing; pull, import or publish the weights again")
        return path.stat().st_size

    def is_sound(self, ref: BackboneRef) -> bool:
        """True where the weights are there and have their hash, and the record beside them is theirs; reads them all."""
        try:
            found = read_record(self.folder(ref) / CONFIG, BackboneRef)
        except WeightsError:
            return False
        same = (found.architecture, found.sha256) == (ref.architecture, ref.sha256)
        return same and weights_file.has_hash(self.folder(ref) / WEIGHTS, ref.sha256)

    def put(
        self, architecture: str, weights: nn.Module | Mapping[str, Tensor], preprocessing: Preprocessing, half: bool
    ) -> BackboneRef:
        """See ModelStore.put_backbone."""
        state = weights.state_dict() if isinstance(weights, nn.Module) else weights
        fitting = skeleton(architecture, preprocessing)
        weights_file.load_into(fitting, state, f"this state dict for {architecture}")
        data = weights_file.serialise(fitting.state_dict(), half)
        sha256 = hashlib.sha256(data).hexdigest()
        ref = BackboneRef(architecture=architecture, sha256=sha256, preprocessing=preprocessing)
        if not self._reserve(ref):
            self._write(ref, data)
        return ref

    def put_file(self, ref: BackboneRef, data: bytes) -> None:
        """Stores a weights file of another store as it is. Raises WeightsError where it has another hash, or does not fit."""
        path = self.folder(ref) / WEIGHTS
        if hashlib.sha256(data).hexdigest() != ref.sha256:
            raise WeightsError(f"the backbone {ref.key} is damaged: it does not have its hash")
        weights_file.load_into(
            skeleton(ref.architecture, ref.preprocessing), weights_file.parse(bytearray(data), path), ref.key
        )
        if not self._reserve(ref):
            self._write(ref, data)

    def _reserve(self, ref: BackboneRef) -> bool:
        """Whether this backbone is there, sound; then its hour of grace begins anew. Raises WeightsError for a namesake."""
        folder = self.folder(ref)
        with atomic_files.writing(self.root.parent), atomic_files.locked(self.lock):
            if not folder.exists():
                return False
            self._refuse_namesake(ref)
            os.utime(folder)
        return self.is_sound(ref)

    def _refuse_namesake(self, ref: BackboneRef) -> None:
        try:
            found = read_record(self.folder(ref) / CONFIG, BackboneRef)
        except WeightsError:
            return  # damaged: about to be replaced
        if found.sha256 != ref.sha256:
            raise WeightsError(
                f"{self.folder(ref)} holds another backbone whose hash begins alike; remove that one first"
            )

    def _write(self, ref: BackboneRef, data: bytes) -> None:
        folder = self.folder(ref)
        with atomic_files.writing(self.root.parent), atomic_files.staging(self.root, self.lock) as draft:
            atomic_files.write(draft / WEIGHTS, data)
            atomic_files.write(draft / CONFIG, to_sealed_json(ref))
            with atomic_files.locked(self.lock):
                if folder.exists():  # damaged, or put by another process a moment ago: the same content either way
                    atomic_files.discard(folder)
                atomic_files.move(draft, folder)

    def sweep(self, used: set[str], released: Mapping[str, int]) -> None:
        """Removes the backbones whose key is not in `used`. The caller holds the lock.

        `released`: the keys of versions just removed, with the time (ns) of their publication: such a backbone goes at once
        unless somebody put it again since; any other goes when its hour of grace is over.
        """
        atomic_files.sweep(self.root)
        grace_ends = time.time_ns() - GRACE_S * 10**9
        for folder in self.root.iterdir() if self.root.is_dir() else ():
            if folder.name not in used and folder.stat().st_mtime_ns <= released.get(folder.name, grace_ends):
                atomic_files.discard(folder)


def skeleton(architecture: str, preprocessing: Preprocessing) -> nn.Module:
    """The network on the meta device, without memory for its weights, in eval mode. Raises ArchitectureNotFound."""
    return architectures.create_backbone(architecture, preprocessing.channels).eval()


def _tapped(module: nn.Module, ref: BackboneRef) -> nn.Module:
    if ref.output is None:
        return module
    names = [name for name, _ in module.named_modules() if name]
    if ref.output not in names:
        raise WeightsError(f"{ref.architecture} has no module {ref.output!r}; it has {', '.join(names)[:2000]}")
    return Tap(module, ref.output)


def _fill_buffers(module: nn.Module, ref: BackboneRef) -> None:
    """Buffers that are no part of a state dict are still on the meta device: takes them from a freshly made network."""
    unfilled = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if not unfilled:
        return
    fresh = dict(architectures.unfilled(ref.architecture, ref.preprocessing.channels).named_buffers())
    for name in unfilled:
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, fresh[name])
