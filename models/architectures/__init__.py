"""Every network by name, cut into a backbone and its last layer.

    build(name)   the network as its authors wrote it: torchvision's classifiers (`resnet50`), timm's
                  (`timm/resnet50`), `classics` and `efficientnet_lite`
    create(name)  the same, cut: `layer(backbone(x))` is what the uncut network answers

The backbone keeps the network's own parameter names, so anyone's state dict fits; the last layer's place holds an `nn.Identity`.
torchvision and timm are imported when one of their networks is first asked for: they cost a start 2 s that the default model need
not pay.
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
    """An architecture, cut. float32 (N, channels, height, width), normalised --backbone--> (N, feature_dim) --layer--> (N, num_classes).

    `layer_name` is the last layer's name in the uncut network ("fc", "classifier.6"): what its keys begin with in anyone's state dict.
    """

    name: str
    backbone: nn.Module
    layer: Layer
    layer_name: str
    feature_dim: int
    preprocessing: Preprocessing


def names() -> tuple[str, ...]:
    """Every architecture but timm's: torchvision's classifiers, EfficientNet-Lite, and the small networks of `classics`."""
    models = _torchvision()
    return tuple(sorted([*models.list_models(module=models), *OWN]))


def create(name: str, num_classes: int = 1000, channels: int = 3, weights: bool = False, aux: bool = False) -> Network:
    """A network ready to train, in training mode: randomly initialised, or with torchvision's published weights.

    With published weights the last layer is theirs at 1000 classes and a fresh one otherwise; at one channel the first convolution's
    weights are summed, so that a gray image gives what its three-channel copy gave. `aux` keeps the auxiliary classifiers of
    Inception v3 and GoogLeNet, which answer in training mode; no other network has any.
    """
    if not weights:
        return cut(name, build(name, num_classes, channels, aux), channels)
    network = cut(name, _build_published(name, num_classes, channels, aux), channels)
    if num_classes != 1000:
        network.layer = make_layer(layer_config(network.layer), num_classes)
    return network


def create_backbone(name: str, channels: int = 3) -> nn.Module:
    """A backbone in eval mode, on the meta device, to load weights into with `load_state_dict(state, assign=True)`."""
    backbone = outline(name, channels=channels).eval()
    _take_layer(name, backbone)
    return backbone


def outline(name: str, num_classes: int = 1000, channels: int = 3) -> nn.Module:
    """The uncut network on the meta device: names and shapes, without memory or values, in milliseconds."""
    with torch.device("cpu"), _Hollow():
        network = build(name, num_classes, channels)
    return network.to("meta")


def unfilled(name: str, channels: int = 3) -> nn.Module:
    """The uncut network on the CPU, its random parameters left as the memory was: for the buffers that no state dict has."""
    with _Unfilled():
        return build(name, channels=channels)


def build(name: str, num_classes: int = 1000, channels: int = 3, aux: bool = False) -> nn.Module:
    """The uncut network, randomly initialised, in training mode."""
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
    """A state dict of the uncut network -> the backbone's and the last layer's own. Auxiliary classifiers are dropped."""
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
    """Names of the layers that answer scores, in the uncut network: one, and a few of timm's have several. Takes `outline` apart."""
    if is_timm(name):
        return timm_networks.classifiers(outline)
    layer_name, layer = _take_layer(name, outline)
    inner = ".conv" if isinstance(layer, ConvLayer) and layer_name != "classifier.1" else ""
    return (layer_name + inner,)


def preprocessing_of(name: str, channels: int = 3) -> Preprocessing:
    """The resize, crop and scale of an architecture's published weights; a classic's size, and the scale of CIFAR or MNIST."""
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
    """torchvision's enum member (`.url`, `.meta`, `.transforms()`) for these weights; None where torchvision publishes none.

    V1 transfers better than V2 as frozen features. `vit_h_14` and `regnet_y_128gf` have no plain V1: theirs is the one of 224 px
    whose features were left as they were pre-trained (`IMAGENET1K_SWAG_LINEAR_V1`).
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
    """Of torchvision's enum member: what it says, or else torchvision's own licence."""
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
    """Auxiliary classifiers with untrained last layers for `num_classes`."""
    for auxiliary in (getattr(network, name, None) for name in AUXILIARY):
        if auxiliary is not None:
            name, layer = _linear_layers(auxiliary)[-1]
            auxiliary.set_submodule(name, make_layer(layer_config(layer), num_classes))


def _adapt(name: str, network: Any, channels: int) -> None:
    """What torchvision's networks need to be built, loaded and stored like any other."""
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
    """Puts an identity in the place of the last layer, and returns its name and the layer."""
    if is_timm(architecture):
        return timm_networks.take_layer(network)
    layers = _linear_layers(network)
    if not layers:
        return "classifier.1", _take_conv_layer(network)
    name, layer = layers[-1]
    network.set_submodule(name, nn.Identity())
    return name, layer


def _take_conv_layer(squeezenet: nn.Module) -> ConvLayer:
    """SqueezeNet ends in dropout, 1x1 convolution, ReLU, mean: the last three are one `ConvLayer`."""
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
    """Length of the flattened map at the network's own input size: one black image is tried."""
    shape = (1, preprocessing.channels, preprocessing.height, preprocessing.width)
    features: Tensor = backbone(torch.zeros(shape, device=next(backbone.parameters()).device))
    return features.shape[1]


class _Hollow(TorchFunctionMode):
    """Parameters and running statistics are made on the meta device: nothing is allocated, and random initialisation costs nothing.

    `torch.device("meta")` would do, were it not for torchvision's RegNet, which computes its widths with `torch.arange`.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones) and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class _Unfilled(TorchFunctionMode):
    """Random initialisation does nothing: it takes seconds of a large network, whose memory is not touched without it."""

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
