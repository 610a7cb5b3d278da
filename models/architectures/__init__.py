"""Builds every network by name, and cuts it into a backbone and its last layer.

    build(name)   the network as its authors wrote it: torchvision's classifiers (`resnet50`), timm's
                  (`timm/resnet50`), `classics` and `efficientnet_lite`
    create(name)  the same, cut: `layer(backbone(x))` equals the uncut network

The backbone keeps the network's own parameter names, so that anyone's state dict fits; an `nn.Identity` stands in place of the last
layer. torchvision and timm are imported with the first of their networks: they take 2 s, which the default model does not need.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.architectures import timm_networks
from models.architectures.classics import NETWORKS, Classic
from models.architectures.efficientnet_lite import SIZES, Scaling
from models.architectures.timm_names import is_timm
from models.architectures.torchvision_keys import modern_key
from models.classifier import ConvLayer, Layer, layer_config, make_layer
from models.errors import ArchitectureNotFound, WeightsError
from models.preprocessing import Preprocessing

WITH_AUXILIARY = ("googlenet", "inception_v3")  # their auxiliary classifiers are of use in training only
AUXILIARY = ("AuxLogits", "aux1", "aux2")

OWN: dict[str, Classic | Scaling] = {
    **NETWORKS,
    **SIZES,
}  # written here, so that they need neither torchvision nor timm

# Mean and standard deviation per channel, of pixels in 0..1.
CIFAR_SCALE = ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262))
MNIST_SCALE = ((0.1307,), (0.3081,))


@dataclass(eq=False)
class Network:
    """A cut architecture. float32 (N, channels, height, width), normalised --backbone--> (N, feature_dim) --layer--> (N, num_classes).

    `layer_name` is the name of the last layer in the uncut network ("fc", "classifier.6"): the prefix of its keys in state dicts.
    """

    name: str
    backbone: nn.Module
    layer: Layer
    layer_name: str
    feature_dim: int
    preprocessing: Preprocessing


def names() -> tuple[str, ...]:
    """Returns every architecture except timm's: torchvision's classifiers, EfficientNet-Lite, and the small networks of `classics`."""
    models = _torchvision()
    return tuple(sorted([*models.list_models(module=models), *OWN]))


def create(name: str, num_classes: int = 1000, channels: int = 3, weights: bool = False, aux: bool = False) -> Network:
    """Returns a network in training mode: randomly initialised, or with torchvision's published weights.

    With published weights the last layer is the published one for 1000 classes, and a fresh one otherwise. For one channel the weights of
    the first convolution are summed, so that a gray image gives what its three-channel copy gave. `aux` keeps the auxiliary classifiers
    of Inception v3 and GoogLeNet, which work in training mode; no other network has any.
    """
    if not weights:
        return cut(name, build(name, num_classes, channels, aux), channels)
    network = cut(name, _build_published(name, num_classes, channels, aux), channels)
    if num_classes != 1000:
        network.layer = make_layer(layer_config(network.layer), num_classes)
    return network


def create_backbone(name: str, channels: int = 3) -> nn.Module:
    """Returns a backbone in eval mode on the meta device, for `load_state_dict(state, assign=True)`."""
    backbone = outline(name, channels=channels).eval()
    _take_layer(name, backbone)
    return backbone


def outline(name: str, num_classes: int = 1000, channels: int = 3) -> nn.Module:
    """Returns the uncut network on the meta device: names and shapes without memory or values, in milliseconds."""
    with torch.device("cpu"), _Hollow():
        network = build(name, num_classes, channels)
    return network.to("meta")


def unfilled(name: str, channels: int = 3) -> nn.Module:
    """Returns the uncut network on the CPU with uninitialised parameters: for the buffers that no state dict has."""
    with _Unfilled():
        return build(name, channels=channels)


def build(name: str, num_classes: int = 1000, channels: int = 3, aux: bool = False) -> nn.Module:
    """Returns the uncut network, randomly initialised, in training mode."""
    if name in OWN:
        return OWN[name].build(num_classes, channels)
    if is_timm(name):
        return timm_networks.build(name, num_classes, channels)
    _check_name(name)
    options: dict[str, Any] = {"aux_logits": aux, "init_weights": False} if name in WITH_AUXILIARY else {}
    network: nn.Module = _torchvision().get_model(name, weights=None, num_classes=num_classes, **options)
    _adapt(name, network, channels)
    return network


def cut(name: str, network: nn.Module, channels: int = 3) -> Network:
    """Takes the last layer off an uncut network, which becomes the backbone."""
    preprocessing = preprocessing_of(name, channels)
    layer_name, layer = _take_layer(name, network)
    feature_dim = layer.in_features if isinstance(layer, nn.Linear) else _map_size(network, preprocessing)
    return Network(name, network, layer, layer_name, feature_dim, preprocessing)


def split_state(name: str, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits a state dict of the uncut network into those of the backbone and the last layer. Drops auxiliary classifiers."""
    if is_timm(name):
        return timm_networks.split_state(outline(name), state)
    layer_name, layer = _take_layer(name, outline(name))
    inner = "conv." if isinstance(layer, ConvLayer) else ""
    backbone, own = {}, {}
    for key, value in state.items():
        if key.startswith(f"{layer_name}."):
            own[inner + key.removeprefix(f"{layer_name}.").removeprefix(inner)] = value
        elif key.split(".")[0] not in AUXILIARY:
            backbone[modern_key(key)] = value
    return backbone, own


def last_layers(name: str, outline: nn.Module) -> tuple[str, ...]:
    """Returns the names of the layers that give scores in the uncut network: one, or several in a few of timm's. Modifies `outline`."""
    if is_timm(name):
        return timm_networks.classifiers(outline)
    layer_name, layer = _take_layer(name, outline)
    inner = ".conv" if isinstance(layer, ConvLayer) and layer_name != "classifier.1" else ""
    return (layer_name + inner,)


def preprocessing_of(name: str, channels: int = 3) -> Preprocessing:
    """Returns resize, crop and scale of an architecture's published weights; for a classic its size, and the scale of CIFAR or MNIST."""
    if name in SIZES:
        return SIZES[name].preprocessing(channels)
    if is_timm(name):
        return timm_networks.preprocessing(name, channels)
    weights = published_weights(name)
    if weights is None:
        size = NETWORKS[name].size
        mean, std = MNIST_SCALE if channels == 1 else CIFAR_SCALE
        return Preprocessing.model_validate(
            {"resize": size, "crop": size, "channels": channels, "mean": mean, "std": std}
        )
    transforms = weights.transforms()
    mean, std = transforms.mean, transforms.std
    if name in WITH_AUXILIARY:
        mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # see `_adapt`
    if channels == 1:
        mean, std = (round(sum(mean) / 3, 4),), (round(sum(std) / 3, 4),)
    return Preprocessing.model_validate(
        {
            "resize": transforms.resize_size[0],
            "crop": transforms.crop_size[0],
            "channels": channels,
            "interpolation": transforms.interpolation.value,
            "mean": mean,
            "std": std,
        }
    )


def published_weights(name: str, which: str = "IMAGENET1K_V1") -> Any | None:
    """Returns torchvision's enum member (`.url`, `.meta`, `.transforms()`) for these weights; None if torchvision publishes none.

    V1 transfers better than V2 as frozen features. `vit_h_14` and `regnet_y_128gf` have no plain V1: theirs is the one of 224 px with the
    pre-trained features (`IMAGENET1K_SWAG_LINEAR_V1`).
    """
    if name in OWN or is_timm(name):
        return None
    _check_name(name)
    published = _torchvision().get_model_weights(name).__members__
    if which == "IMAGENET1K_V1" and which not in published:
        which = "IMAGENET1K_SWAG_LINEAR_V1"
    if which not in published:
        raise WeightsError(f"{name} has no published weights {which!r}; it has {', '.join(published)}")
    return published[which]


def licence_of(weights: Any) -> str:
    """Returns the licence of torchvision's enum member: its own, or else that of torchvision."""
    return str(weights.meta.get("license", "BSD-3-Clause"))


def _build_published(name: str, num_classes: int, channels: int, aux: bool) -> nn.Module:
    weights = published_weights(name)
    if weights is None:
        raise WeightsError(f"{name} has no published weights: create it without, and train it")
    options = {"aux_logits": True} if name in WITH_AUXILIARY else {}  # torchvision refuses False beside weights
    network: nn.Module = _torchvision().get_model(name, weights=weights, **options)
    if name in WITH_AUXILIARY and not aux:
        _drop_auxiliary(network)
    if num_classes != 1000:
        _renew_auxiliary(network, num_classes)
    _adapt(name, network, channels)
    return network


def _drop_auxiliary(network: Any) -> None:
    network.aux_logits = False
    for name in AUXILIARY:
        if hasattr(network, name):
            setattr(network, name, None)


def _renew_auxiliary(network: nn.Module, num_classes: int) -> None:
    """Replaces the last layers of auxiliary classifiers by untrained ones for `num_classes`."""
    for auxiliary in (getattr(network, name, None) for name in AUXILIARY):
        if auxiliary is not None:
            name, layer = _linear_layers(auxiliary)[-1]
            auxiliary.set_submodule(name, make_layer(layer_config(layer), num_classes))


def _adapt(name: str, network: Any, channels: int) -> None:
    """Changes torchvision's networks so that they can be built, loaded and stored like any other."""
    if name in WITH_AUXILIARY:
        # With published weights torchvision turns ImageNet's mean and std into 0.5 and 0.5 inside the network. That is preprocessing,
        # so it stands in `preprocessing_of`: it then travels with the weights, costs nothing, and works for one channel.
        network.transform_input = False
    if name.startswith("mnasnet"):
        from models.architectures.mnasnet import UnversionedMNASNet

        network.__class__ = UnversionedMNASNet
    if channels == 1:
        _take_gray(network)


def _take_gray(network: nn.Module) -> None:
    """Makes the first convolution give for x, of one channel, what it gave for (x, x, x)."""
    conv = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    conv.weight = nn.Parameter(conv.weight.detach().sum(dim=1, keepdim=True))
    conv.in_channels = 1


def _linear_layers(network: nn.Module) -> list[tuple[str, nn.Linear | ConvLayer]]:
    return [(name, m) for name, m in network.named_modules() if isinstance(m, (nn.Linear, ConvLayer))]


def _take_layer(architecture: str, network: nn.Module) -> tuple[str, nn.Linear | ConvLayer]:
    """Puts an identity in place of the last layer, and returns its name and the layer."""
    if is_timm(architecture):
        return timm_networks.take_layer(network)
    layers = _linear_layers(network)
    if not layers:
        return "classifier.1", _take_conv_layer(network)
    name, layer = layers[-1]
    network.set_submodule(name, nn.Identity())
    return name, layer


def _take_conv_layer(squeezenet: nn.Module) -> ConvLayer:
    """Takes SqueezeNet's last layers: of dropout, 1x1 convolution, ReLU and mean, the last three become one `ConvLayer`."""
    classifier = squeezenet.get_submodule("classifier")
    conv = classifier.get_submodule("1")
    if not isinstance(conv, nn.Conv2d):
        raise TypeError("SqueezeNet's last layer is a convolution")
    layer = ConvLayer(conv.in_channels, conv.out_channels)
    layer.conv = conv
    for name in ("1", "2", "3"):
        classifier.set_submodule(name, nn.Identity())
    return layer


def _map_size(backbone: nn.Module, preprocessing: Preprocessing) -> int:
    """Returns the length of the flattened map at the network's input size, measured with one black image."""
    shape = (1, preprocessing.channels, preprocessing.height, preprocessing.width)
    features: Tensor = backbone(torch.zeros(shape, device=next(backbone.parameters()).device))
    return features.shape[1]


class _Hollow(TorchFunctionMode):
    """Creates parameters and running statistics on the meta device: nothing is allocated, and random initialisation costs nothing.

    `torch.device("meta")` does not suffice: torchvision's RegNet computes its widths with `torch.arange`.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones) and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class _Unfilled(TorchFunctionMode):
    """Skips random initialisation, which takes seconds for a large network, and touches its memory."""

    RANDOM = (Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.random_)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.RANDOM:
            return args[0]
        return func(*args, **(kwargs or {}))


def _check_name(name: str) -> None:
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0)
        raise ArchitectureNotFound(f"no architecture {name!r} among {len(known)}; the nearest are {', '.join(near)}")


def _torchvision() -> ModuleType:
    from torchvision import models

    torchvision_models: ModuleType = models
    return torchvision_models
