"""Finds what a run starts from: backbones of the store, or an architecture without weights."""

from models import architectures
from models.classifier import BackboneRef
from models.errors import ModelNotFound, TrainingError
from models.files.records import Record
from models.preprocessing import Preprocessing
from models.store import packaged
from models.store.store import ModelStore
from models.training.job.request import MAX_BASES, FinetuneRequest


class Base(Record):
    """One backbone to start from. `ref` is None if training starts from scratch."""

    name: str  # of its model, or of the architecture
    version: int | None
    ref: BackboneRef | None
    architecture: str
    preprocessing: Preprocessing

    @property
    def stored(self) -> BackboneRef:
        if self.ref is None:
            raise RuntimeError("training from scratch has no stored backbone")
        return self.ref


def bases_of(request: FinetuneRequest, store: ModelStore) -> tuple[Base, ...]:
    """Return the bases that the request names, or all that it chooses from. Raises ModelNotFound, ArchitectureNotFound, TrainingError."""
    if request.mode == "scratch":
        architectures_named = (request.base,) if isinstance(request.base, str) else request.base or ()
        return tuple(_untrained(name, request.channels) for name in architectures_named)
    if request.base == "auto":
        return candidates(store, request.hyperparameters.features_from)
    names = (request.base or _default(store),) if not isinstance(request.base, tuple) else request.base
    found = tuple(base for name in names for base in _members(name, store, request.hyperparameters.features_from))
    if len(found) > 1 and request.mode not in ("head", "auto"):
        raise TrainingError(
            f"{names[0]!r} is an ensemble of {len(found)} backbones, and mode {request.mode} trains one: name a member"
        )
    if len(found) > MAX_BASES or len({base.ref for base in found}) < len(found):
        raise TrainingError(f"the bases have {len(found)} backbones; at most {MAX_BASES} different ones can be joined")
    return found


def _untrained(architecture: str, channels: int) -> Base:
    preprocessing = architectures.preprocessing_of(architecture, channels)
    return Base(name=architecture, version=None, ref=None, architecture=architecture, preprocessing=preprocessing)


def candidates(store: ModelStore, output: str | None = None) -> tuple[Base, ...]:
    """Return each backbone of the store once, by the first model that uses it alone; with the packaged ones."""
    packaged.provide(store, tuple(packaged.PACKAGES))
    found: dict[BackboneRef, Base] = {}
    for name in store.names():
        members = _members(name, store, output)
        if len(members) == 1 and not _is_offspring(name, store):
            found.setdefault(members[0].stored, members[0])
    return tuple(found.values())


def _is_offspring(name: str, store: ModelStore) -> bool:
    """Return whether only the head is the model's own, and its base, by which the backbone is found, still exists."""
    lineage = store.config(name).lineage
    return lineage.get("mode") == "head" and lineage.get("base") in store.names()


def _default(store: ModelStore) -> str:
    """Return the store's default model, or the packaged one if it has none."""
    return store.serving().default or packaged.DEFAULT


def _members(name: str, store: ModelStore, output: str | None) -> tuple[Base, ...]:
    packaged.provide(store, [name])
    if name not in store.names():
        here = ", ".join(store.names()) or "none"
        raise ModelNotFound(
            f"the store has no model {name!r} to start from (it has: {here}): "
            f"run `imago models pull {name}`, name another base, or train with mode scratch"
        )
    config = store.config(name, store.serving().models.get(name))
    refs = [ref.model_copy(update={"output": output}) if output else ref for ref in config.backbones]
    return tuple(
        Base(name=name, version=config.version, ref=ref, architecture=ref.architecture, preprocessing=ref.preprocessing)
        for ref in refs
    )
