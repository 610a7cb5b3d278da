"""Backbones on disk by hash: `backbones/<architecture>-<sha8>/{model.safetensors, config.json}`.

`config.json` is the BackboneRef of the first version that stored it; every model version has its own, with its preprocessing.
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
GRACE_S = 3600  # an unused backbone may belong to a publication in progress


class BackboneStore:
    """The folder of all backbones. `lock` is the lock file of the store; some methods need the caller to hold it."""

    def __init__(self, root: Path, lock: Path) -> None:
        self.root = root
        self.lock = lock

    def folder(self, ref: BackboneRef) -> Path:
        """Returns the folder of a backbone. Raises WeightsError for a name that could leave the store."""
        if not is_timm(ref.architecture) and not ref.architecture.replace("_", "").isalnum():
            raise WeightsError(f"{ref.architecture!r} is not an architecture's name")
        return self.root / ref.key

    def load(self, ref: BackboneRef) -> Backbone:
        """See ModelStore.load_backbone."""
        path = self.folder(ref) / WEIGHTS
        module = skeleton(ref.architecture, ref.preprocessing)
        weights_file.load(module, path, ref.sha256)
        _fill_buffers(module, ref)
        module = _tapped(module, ref).eval().requires_grad_(False)
        features, name = heatmaps.find_map(module, heatmaps.probe(ref.preprocessing, 1))
        weights_file.check_finite({"features": features}, str(path))
        return Backbone(ref, module, features.shape[1], name)

    def size(self, ref: BackboneRef) -> int:
        """See ModelStore.backbone_size."""
        path = self.folder(ref) / WEIGHTS
        if not path.is_file():
            raise WeightsError(f"{path} is missing; pull, import or publish the weights again")
        return path.stat().st_size

    def is_sound(self, ref: BackboneRef) -> bool:
        """Returns whether the weights have their hash and the record beside them is theirs; reads them all."""
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
        """Stores a weights file of another store unchanged. Raises WeightsError where it has another hash, or does not fit."""
        path = self.folder(ref) / WEIGHTS
        if hashlib.sha256(data).hexdigest() != ref.sha256:
            raise WeightsError(f"the backbone {ref.key} is damaged: it does not have its hash")
        weights_file.load_into(
            skeleton(ref.architecture, ref.preprocessing), weights_file.parse(bytearray(data), path), ref.key
        )
        if not self._reserve(ref):
            self._write(ref, data)

    def _reserve(self, ref: BackboneRef) -> bool:
        """Returns whether this backbone is there and sound, and restarts its hour of grace.

        Raises WeightsError for another backbone of the same key.
        """
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
                f"{self.folder(ref)} contains another backbone whose hash begins with the same digits; remove that one first"
            )

    def _write(self, ref: BackboneRef, data: bytes) -> None:
        folder = self.folder(ref)
        with atomic_files.writing(self.root.parent), atomic_files.staging(self.root, self.lock) as draft:
            atomic_files.write(draft / WEIGHTS, data)
            atomic_files.write(draft / CONFIG, to_sealed_json(ref))
            with atomic_files.locked(self.lock):
                if folder.exists():  # damaged, or just stored by another process with the same content
                    atomic_files.discard(folder)
                atomic_files.move(draft, folder)

    def sweep(self, used: set[str], released: Mapping[str, int]) -> None:
        """Deletes the backbones whose key is not in `used`. The caller holds the lock.

        `released`: the keys of removed versions with the time (ns) of their publication. Such a backbone is deleted at once unless it
        was stored again since; others when their hour of grace is over.
        """
        atomic_files.sweep(self.root)
        grace_ends = time.time_ns() - GRACE_S * 10**9
        for folder in self.root.iterdir() if self.root.is_dir() else ():
            if folder.name not in used and folder.stat().st_mtime_ns <= released.get(folder.name, grace_ends):
                atomic_files.discard(folder)


def skeleton(architecture: str, preprocessing: Preprocessing) -> nn.Module:
    """Returns the network in eval mode on the meta device, which needs no memory. Raises ArchitectureNotFound."""
    return architectures.create_backbone(architecture, preprocessing.channels).eval()


def _tapped(module: nn.Module, ref: BackboneRef) -> nn.Module:
    if ref.output is None:
        return module
    names = [name for name, _ in module.named_modules() if name]
    if ref.output not in names:
        raise WeightsError(f"{ref.architecture} has no module {ref.output!r}; it has {', '.join(names)[:2000]}")
    return Tap(module, ref.output)


def _fill_buffers(module: nn.Module, ref: BackboneRef) -> None:
    """Fills buffers that are not in the state dict, and so still on the meta device, from a new network."""
    unfilled = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if not unfilled:
        return
    fresh = dict(architectures.unfilled(ref.architecture, ref.preprocessing.channels).named_buffers())
    for name in unfilled:
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, fresh[name])
