"""Anyone's weights -> a model version: a state dict in a `.safetensors` file, or in a `.pth` that torch saved.

read_state    file -> {key: tensor}, wrappers and prefixes taken off; nothing in the file is ever executed
fit           {key: tensor} -> the architecture cut in two, or one message with all that does not fit
publish       the backbone by its hash, shared where the store has it, and the last layer as the head
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import architectures, tensors
from models.architectures import Network
from models.classifier import Head, ModelConfig
from models.download import Progress
from models.errors import WeightsError
from models.store import ModelStore

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # keys under which training scripts keep the state dict
PREFIXES = ("module.", "_orig_mod.")  # DataParallel's and torch.compile's
STEPS = 3  # read, fit, store: of each the bytes are not known, and VGG takes seconds for each
PICKLED = (".pth", ".pt", ".bin", ".ckpt")


def import_weights(
    path: Path,
    store: ModelStore,
    name: str,
    architecture: str,
    classes: Sequence[str] | None = None,
    channels: int | None = None,
    progress: Progress | None = None,
) -> ModelConfig:
    """Publishes a state dict as the next version of model `name`, with the architecture's own preprocessing.

    The number of classes, and of channels unless given, is read off the weights; classes without names are `class_0`, `class_1` ...
    Raises WeightsError, ArchitectureNotFound, InvalidName.
    """
    told = progress or (lambda done, total: None)
    told(0, STEPS)
    state = read_state(path)
    told(1, STEPS)
    network = fit(architecture, state, channels, str(path))
    head = Head.of(network.layer)
    names = list(classes) if classes is not None else [f"class_{index}" for index in range(head.num_classes)]
    if len(names) != head.num_classes:
        raise WeightsError(
            f"{len(names)} class names were given, but the weights in {path} have {head.num_classes} classes"
        )
    told(2, STEPS)
    ref = store.put_backbone(architecture, network.backbone, network.preprocessing)
    told(3, STEPS)
    return store.publish(name, [ref], head, names, lineage={"source": Path(path).name, "architecture": architecture})


def read_classes(path: Path) -> list[str]:
    """Class names from a file: a JSON list, or one name a line."""
    text = Path(path).read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        names = json.loads(text)
    except ValueError as error:
        raise WeightsError(f"{path} begins like a JSON list of class names but is not one: {error}") from error
    if not all(isinstance(name, str) for name in names):
        raise WeightsError(f"{path} must be a JSON list of class names, all of them text")
    return list(names)


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict by their keys in the uncut network. Raises WeightsError that says why a file is refused."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return _without_prefixes(tensors.read(path))
    if path.suffix not in PICKLED:
        raise WeightsError(f"{path} is refused: weights are read from .safetensors, {', '.join(PICKLED)} files")
    return _without_prefixes(_unwrap(_load_pickled(path), path))


def _load_pickled(path: Path) -> Any:
    if not path.is_file():
        raise WeightsError(f"{path} is missing, or not a file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, KeyError ...: whatever the bytes provoke
        raise WeightsError(f"{path} is refused: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """torch's own text advises `weights_only=False`, which runs whatever the file says."""
    if wanted := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"besides tensors it wants {wanted[1]}, and a file that may run code is never loaded; "
            "save it again with torch.save(model.state_dict(), path), or as safetensors"
        )
    if "TorchScript" in str(error):
        return "it is a TorchScript archive; save its state_dict() instead"
    return f"it is damaged, truncated, or not a file of torch.save ({type(error).__name__})"


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict")
    foreign = [str(key) for key, value in content.items() if not _is_plain(value)]
    if foreign or not content:
        raise WeightsError(
            f"{path} is not a state dict: {len(foreign)} entries are no plain tensors: {tensors.listed(foreign)}"
        )
    return {str(key): value for key, value in content.items()}


def _is_plain(value: Any) -> bool:
    """A dense tensor that has its values: an expanded one could claim a shape of terabytes."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def _without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {key: tensor for key, tensor in state.items() if key != "n_averaged"}  # AveragedModel's counter
    while prefix := next((p for p in PREFIXES if state and all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def fit(architecture: str, state: Mapping[str, Tensor], channels: int | None, source: str) -> Network:
    """The architecture with these weights, cut in two. Raises WeightsError that lists all that does not fit."""
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
