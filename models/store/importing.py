"""Anyone's weights -> a model version: a state dict, a folder of timm's, a TorchServe archive, or a version of another Imago.

read        file or folder -> Checkpoint, see `models.store.checkpoints`
fit         {key: tensor} -> the architecture cut in two, see `models.store.checkpoint_fit`
publish     the backbone by its hash, shared where the store has it, and the last layer as the head
"""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from models import architectures
from models.architectures import Network
from models.classifier import MAX_CLASSES, Head, ModelConfig
from models.errors import ArchitectureNotFound, DatasetError, WeightsError
from models.files.class_names import complaint, read_classes
from models.files.weights_file import listed
from models.files.zip_file import open_archive
from models.progress import DownloadProgress, silent
from models.store import bundle, torchserve
from models.store import checkpoint_fit as fitting
from models.store.checkpoint_fit import Choices
from models.store.checkpoints import Checkpoint, heads, read_checkpoint
from models.store.checkpoints.content import CLASS_KEYS, described
from models.store.store import ModelStore

__all__ = ["Choices", "fit", "import_model", "read_classes", "read_state"]

STEPS = 3  # read, fit, store; VGG takes seconds for each
ONE_OUTPUT = ("no", "yes")


def import_model(
    path: Path,
    store: ModelStore,
    name: str | None = None,
    architecture: str | None = None,
    classes: Sequence[str] | None = None,
    channels: int | None = None,
    progress: DownloadProgress = silent,
    choices: Choices | None = None,
    notes: list[str] | None = None,
) -> ModelConfig:
    """Publishes the file at `path` as the next version of `name`.

    A version that another Imago exported contains its name, architecture and classes. Any other checkpoint gets the architecture's own
    preprocessing; the number of classes, and of channels unless given, is that of the weights, and classes without names are
    `class_0`, `class_1` ... `notes` gets a line for each thing that was recognised, assumed (`warning: ...`) or skipped.
    Raises WeightsError, ArchitectureNotFound, InvalidName.
    """
    members = _members(path)
    if bundle.is_bundle(members):
        if architecture or classes or channels or choices:
            raise WeightsError(f"{path} holds a whole version: its architecture and classes cannot be changed")
        return bundle.import_bundle(path, store, name, progress)
    if name is None:
        raise WeightsError(f"{path} names no model: give it one with --name")
    notes = [] if notes is None else notes
    progress(0, STEPS)
    checkpoint = _read(path, members)
    notes.append(f"format: {checkpoint.form}")
    architecture = architecture or _named(checkpoint, notes)
    progress(1, STEPS)
    count = len(classes) if classes is not None else next((len(c.names) for c in checkpoint.classes if c.is_sure), None)
    network = _fitted(architecture, checkpoint, channels, replace(choices or Choices(), count=count), notes)
    if checkpoint.others:
        notes.append(f"skipped, no tensors: {described(checkpoint.others)}")
    names = _classes(checkpoint, network, classes, notes)
    notes.append(_assumed(network, architecture, len(names)))
    progress(2, STEPS)
    ref = store.put_backbone(architecture, network.backbone, network.preprocessing)
    progress(3, STEPS)
    lineage = {"source": Path(path).name, "architecture": architecture} | checkpoint.lineage
    return store.publish(name, [ref], Head.of(network.layer), names, lineage=lineage)


def _fitted(
    architecture: str, checkpoint: Checkpoint, channels: int | None, choices: Choices, notes: list[str]
) -> Network:
    broken = [f"{key} ({problem})" for key, problem in checkpoint.broken.items()]
    try:
        network = fitting.fit(architecture, checkpoint, channels, choices, notes)
    except WeightsError as error:
        if not broken:
            raise
        raise WeightsError(
            f"{checkpoint.source} has tensors without plain values: {listed(broken)}; make them plain where it was trained "
            "(`tensor.to_dense().contiguous()`), and save it again"
        ) from error
    if broken:
        notes.append(f"skipped, no plain values: {listed(broken)}")
    return network


def _assumed(network: Network, architecture: str, count: int) -> str:
    """Returns a note of what a checkpoint does not contain: the preprocessing, and that its classes exclude each other."""
    shape = network.preprocessing
    mean, std = (", ".join(f"{value:.3g}" for value in values) for values in (shape.mean, shape.std))
    return (
        f"assumed: one of {count} classes per image (softmax); pixels as {architecture} takes them: resize {shape.resize}, "
        f"crop {shape.crop}, mean {mean}, deviation {std}"
    )


def _named(checkpoint: Checkpoint, notes: list[str]) -> str:
    """Returns the architecture that the file names. Raises WeightsError with the architectures that fit where it names no known one."""
    for name in checkpoint.architectures:
        try:
            architectures.preprocessing_of(name)
        except ArchitectureNotFound:
            continue
        notes.append(f"architecture: {name}, as the file says")
        return name
    like = fitting.alike(checkpoint)
    hint = f"; the names and shapes are those of {' or '.join(like)}" if like else ""
    raise WeightsError(f"{checkpoint.source} names no architecture: give it one with --architecture{hint}")


def _classes(checkpoint: Checkpoint, network: Network, given: Sequence[str] | None, notes: list[str]) -> list[str]:
    """Returns the class names that are given, those in the file, or numbers. A network of one output gets two. Raises WeightsError."""
    outputs = Head.of(network.layer).num_classes
    if outputs > MAX_CLASSES:
        raise WeightsError(
            f"{checkpoint.source} is refused: it has {outputs:,} classes, at most {MAX_CLASSES:,} are served"
        )
    count = max(outputs, 2)
    what = "one output, which is two classes" if outputs == 1 else f"{outputs} classes"
    if given is not None:
        if len(given) != count:
            raise WeightsError(
                f"{len(given)} class names were given, but the weights in {checkpoint.source} have {what}"
            )
        names, origin = list(given), "--classes"
    else:
        names, origin = _from_file(checkpoint, count, what)
    if outputs == 1:
        heads.two_classes(network.layer)
        names = names or list(ONE_OUTPUT)
        notes.append(
            f"warning: one output is read as two classes by the sigmoid: p({names[1]}) = sigmoid(output), {names[0]} is the rest; "
            "--classes names them, first the class of label 0; a regression (one output, MSELoss) has no classes and is not served"
        )
    notes.append(f"classes: {count}, from {origin}" if origin else f"classes: {count}, without names in the file")
    unread = [key for key in checkpoint.others if key.rpartition(".")[2] in CLASS_KEYS]
    if not names and unread:
        notes.append(
            f"warning: {listed(unread)} is not used: it does not give each class from 0 to {count - 1} a name; --classes names them"
        )
    names = names or [f"class_{index}" for index in range(count)]
    if wrong := complaint(names):
        raise WeightsError(f"{Path(checkpoint.source).name} is refused: {wrong}")
    return names


def _from_file(checkpoint: Checkpoint, count: int, what: str) -> tuple[list[str], str]:
    """Returns the class names in the file and their key, empty where it has none. Raises WeightsError for a wrong number of them."""
    for names in checkpoint.classes:
        if len(names.names) == count:
            return names.names, repr(names.key)
    for names in checkpoint.classes:
        if names.is_sure:
            raise WeightsError(
                f"{checkpoint.source} has {_counted(names.names)} in {names.key!r}, but its weights have {what}: "
                "give the names with --classes"
            )
    return [], ""


def _counted(names: Sequence[str]) -> str:
    return "1 class name" if len(names) == 1 else f"{len(names)} class names"


def fit(architecture: str, state: Mapping[str, Tensor], channels: int | None, source: str) -> Network:
    """Returns the architecture with these weights, cut in two. Raises WeightsError that lists everything that does not fit."""
    return fitting.fit(architecture, fitting.of_state(state, source), channels)


def _read(path: Path, members: list[str]) -> Checkpoint:
    """Returns the checkpoint in a file, or in an archive with these members. Raises WeightsError."""
    if torchserve.is_archive(members):
        with bundle.opened(path) as archive:
            return torchserve.read_archive(archive, path)
    return read_checkpoint(path)


def read_state(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a state dict by the keys of the file. Raises WeightsError."""
    return read_checkpoint(path).state


def _members(path: Path) -> list[str]:
    """Returns the names in a zip, none for another file. Raises WeightsError for a damaged or hostile zip."""
    try:
        with open_archive(path) as archive:
            return archive.names
    except DatasetError as error:
        if path.is_file() and (path.suffix == ".zip" or zipfile.is_zipfile(path)):
            raise WeightsError(str(error)) from error
        return []
