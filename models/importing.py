"""Anyone's weights -> a model version: a state dict, a folder of timm's, a TorchServe archive, or a version of another Imago.

read        file or folder -> Checkpoint, see `models.checkpoints`
fit         {key: tensor} -> the architecture cut in two, or one message with all that does not fit
publish     the backbone by its hash, shared where the store has it, and the last layer as the head
"""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from models import architectures, bundle, tensors, torchserve
from models.architectures import Network
from models.archive import open_archive
from models.checkpoints import Checkpoint, read_checkpoint, to_network
from models.class_names import complaint, read_classes
from models.classifier import Head, ModelConfig
from models.download import Progress
from models.errors import DatasetError, WeightsError
from models.store import ModelStore

__all__ = ["fit", "import_model", "import_weights", "read_classes", "read_state"]

STEPS = 3  # read, fit, store: of each the bytes are not known, and VGG takes seconds for each


def import_model(
    path: Path,
    store: ModelStore,
    name: str | None = None,
    architecture: str | None = None,
    classes: Sequence[str] | None = None,
    channels: int | None = None,
    progress: Progress | None = None,
) -> ModelConfig:
    """Publishes what lies at `path` as the next version of `name`. A version that another Imago exported names itself and its architecture.

    Raises WeightsError, ArchitectureNotFound, InvalidName.
    """
    if bundle.is_bundle(_members(path)):
        if architecture or classes or channels:
            raise WeightsError(f"{path} holds a whole version: its architecture and classes cannot be changed")
        return bundle.import_bundle(path, store, name, progress)
    if name is None:
        raise WeightsError(f"{path} names no model: give it one with --name")
    return import_weights(path, store, name, architecture, classes, channels, progress)


def import_weights(
    path: Path,
    store: ModelStore,
    name: str,
    architecture: str | None = None,
    classes: Sequence[str] | None = None,
    channels: int | None = None,
    progress: Progress | None = None,
) -> ModelConfig:
    """Publishes a state dict as the next version of model `name`, with the architecture's own preprocessing.

    The number of classes, and of channels unless given, is read off the weights; classes without names are `class_0`, `class_1` ...
    Raises WeightsError, ArchitectureNotFound, InvalidName.
    """
    report = progress or (lambda done, total: None)
    report(0, STEPS)
    checkpoint = read(path)
    if architecture is None:
        raise WeightsError(f"{path} names no architecture: give it one with --architecture")
    report(1, STEPS)
    network = fit(architecture, checkpoint.state, channels, str(path))
    head = Head.of(network.layer)
    names = classes if classes is not None else checkpoint.classes
    names = list(names) if names is not None else [f"class_{index}" for index in range(head.num_classes)]
    if len(names) != head.num_classes:
        raise WeightsError(
            f"{len(names)} class names were given, but the weights in {path} have {head.num_classes} classes"
        )
    if wrong := complaint(names):
        raise WeightsError(f"{path.name} is refused: {wrong}")
    report(2, STEPS)
    ref = store.put_backbone(architecture, network.backbone, network.preprocessing)
    report(3, STEPS)
    lineage = {"source": Path(path).name, "architecture": architecture} | checkpoint.lineage
    return store.publish(name, [ref], head, names, lineage=lineage)


def read(path: Path) -> Checkpoint:
    """The checkpoint in a file or an archive. Raises WeightsError that says why it is refused."""
    if torchserve.is_archive(_members(path)):
        with bundle.opened(path) as archive:
            return torchserve.read_archive(archive, path)
    return read_checkpoint(path)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict by the keys of the file. Raises WeightsError that says why a file is refused."""
    return read_checkpoint(path).state


def _members(path: Path) -> list[str]:
    """The names in a zip; none where it is no zip. Raises WeightsError for a damaged or hostile one."""
    try:
        with open_archive(path) as archive:
            return archive.names
    except DatasetError as error:
        if path.is_file() and (path.suffix == ".zip" or zipfile.is_zipfile(path)):
            raise WeightsError(str(error)) from error
        return []


def fit(architecture: str, state: Mapping[str, Tensor], channels: int | None, source: str) -> Network:
    """The architecture with these weights, cut in two. Raises WeightsError that lists all that does not fit."""
    state = to_network(state, architectures.outline(architecture).state_dict().keys())
    backbone, layer = architectures.split_state(architecture, state)
    weight = next((tensor for tensor in layer.values() if tensor.dim() > 1), None)
    num_classes = 1000 if weight is None else weight.shape[0]
    channels = channels or _channels(architecture, backbone)
    network = architectures.create(architecture, max(num_classes, 1), channels)
    expected = {**network.backbone.state_dict(), **_uncut(network, network.layer.state_dict())}
    found = {**_counters(expected), **backbone, **_uncut(network, layer)}
    if problems := tensors.mismatches(expected, found):
        raise WeightsError(f"{source} does not fit {architecture}: " + "; ".join(problems))
    tensors.load_into(network.backbone, backbone, source)
    tensors.load_into(network.layer, layer, source)
    return network


def _channels(architecture: str, backbone: Mapping[str, Tensor]) -> int:
    """Input channels as the first convolution has them; 3 where the weights do not say, so that `fit` tells what is wrong."""
    parameters = architectures.create_backbone(architecture).named_parameters()
    first = next((name for name, parameter in parameters if parameter.dim() == 4), None)
    kernel = backbone.get(first or "")
    return 1 if kernel is not None and kernel.dim() == 4 and kernel.shape[1] == 1 else 3


def _uncut(network: Network, layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The last layer's keys as the uncut network has them. Of networks that end in a convolution, ours (`fc`) are a ConvLayer
    themselves; in SqueezeNet the convolution stands alone."""
    inner = "" if network.layer_name == "fc" else "conv."
    return {f"{network.layer_name}.{key.removeprefix(inner)}": tensor for key, tensor in layer.items()}


def _counters(expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Batch norm's counters, which old files lack and nothing here needs."""
    return {key: tensor for key, tensor in expected.items() if key.endswith("num_batches_tracked")}
