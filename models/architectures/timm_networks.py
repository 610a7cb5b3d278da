"""timm's networks by name (see `timm_names`), cut like any other. timm is imported when one of them is first asked for.

    images --network with Identity in the classifier's place--> features (N, D) --Linear--> scores

timm itself names the classifier; it is not always the last linear layer. A distilled network has two, whose scores it averages in eval
mode, and some networks have four: then the features are all their inputs side by side, see `ScaledIdentity`.
"""

import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from models.architectures.timm_names import PREFIX, TimmName, parse
from models.classifier import pooled
from models.errors import ArchitectureNotFound, WeightsError
from models.preprocessing import Preprocessing

# Further classifiers that are left out. VOLO's gives scores for each token, and adds half of the largest to those of the class token: no
# layer on features can do that.
AUXILIARY = ("aux_head", "AuxLogits")

# Paths of the modules that answer scores: one, or several whose weighted sum is the answer.
Classifiers = tuple[str, ...]


@cache
def networks() -> tuple[str, ...]:
    """Returns the name of every network of timm, without tag or prefix, in timm's order."""
    import timm

    return tuple(timm.list_models())


def names() -> tuple[str, ...]:
    return tuple(PREFIX + name for name in networks())


def published_names() -> tuple[str, ...]:
    """Returns every `timm/<network>.<tag>` with published weights."""
    import timm

    return tuple(PREFIX + name for name in timm.list_pretrained())


def tags(network: str) -> tuple[str, ...]:
    """Returns the tags of the published weights of a network, the default first."""
    from timm.models import get_arch_pretrained_cfgs

    return tuple(name.partition(".")[2] for name, cfg in get_arch_pretrained_cfgs(network).items() if cfg.has_weights)


def find(architecture: str) -> TimmName:
    """Returns the name if timm has it. Raises ArchitectureNotFound with the nearest names, or with the existing tags."""
    name = parse(architecture)
    if name.network not in networks():
        near = [PREFIX + n for n in difflib.get_close_matches(name.network, networks(), n=5)]
        remedy = f"the nearest are {', '.join(near)}" if near else "`imago models search` lists them"
        raise ArchitectureNotFound(f"timm has no network {name.network!r} among {len(networks())}; {remedy}")
    if name.tag is not None and config(name) is None:
        there = ", ".join(tags(name.network)) or "none"
        raise ArchitectureNotFound(f"timm knows no weights {name.tag!r} of {name.network}; it knows {there}")
    return name


def config(name: TimmName) -> dict[str, Any] | None:
    """Returns timm's record of these weights, or of the default ones; None for an unknown tag."""
    from timm.models import get_pretrained_cfg

    try:
        found = get_pretrained_cfg(name.tagged)
    except RuntimeError:
        return None
    return None if found is None else dict(found.to_dict())


def build(architecture: str, num_classes: int, channels: int) -> nn.Module:
    """Returns the uncut network, randomly initialised, in training mode."""
    import timm

    name = find(architecture)
    try:
        network: nn.Module = timm.create_model(
            name.tagged, pretrained=False, num_classes=num_classes, in_chans=channels, **name.options
        )
    except Exception as error:  # constructors of timm raise exceptions of any kind
        cause = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise ArchitectureNotFound(
            f"timm cannot build {architecture} for {channels}-channel images: {cause}"
        ) from error
    if getattr(network, "aux_head", None) is not None:
        setattr(network, "aux_head", None)  # noqa: B010
    if not callable(getattr(network, "get_classifier", None)):
        return Encoder(network, num_classes)
    return network


class Encoder(nn.Module):
    """A vision encoder of a language model, which returns tokens (N, T, D) and has no classifier: their mean, with a new classifier."""

    pretrained_cfg: Mapping[str, Any] = {"classifier": "classifier"}

    def __init__(self, encoder: Any, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.head_hidden_size, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classifier(pooled(self.encoder(images)))
        return scores


def renamed(state: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor] | None:
    """Returns the state dict with the network's keys: timm's own filter renames those of other libraries and older versions. None if it
    has nothing to rename, or expects another layout."""
    from timm.models import model_entrypoint

    with torch.device("meta"):
        network = build(architecture, 1000, 3)
    module = model_entrypoint(find(architecture).network).__module__
    rename = getattr(sys.modules[module], "checkpoint_filter_fn", None)
    if rename is None or state.keys() <= network.state_dict().keys():
        return None
    try:
        with torch.no_grad():
            found = rename(dict(state), network)
    except Exception:  # filters of timm raise exceptions of any kind
        return None
    return found if isinstance(found, dict) and all(isinstance(value, Tensor) for value in found.values()) else None


def preprocessing(architecture: str, channels: int) -> Preprocessing:
    """Returns the preprocessing of the weights that the name gives, or of the default ones."""
    name = find(architecture)
    return preprocessing_from((config(name) or {}) | size_option(name), channels, architecture)


def size_option(name: TimmName) -> dict[str, Any]:
    """Returns the input size that the option `img_size` sets, as in `pretrained_cfg`."""
    if (size := name.options.get("img_size")) is None:
        return {}
    sides = (size, size) if isinstance(size, int) else size
    if not is_size(sides, 2):
        raise ArchitectureNotFound(f"the option 'img_size' of {name} must be a number of pixels, or [height, width]")
    return {"input_size": (3, *sides)}


def is_size(values: Any, count: int) -> bool:
    """Whether the value is `count` positive whole numbers."""
    return (
        isinstance(values, list | tuple)
        and len(values) == count
        and all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in values)
    )


def preprocessing_from(config: Mapping[str, Any], channels: int, source: str) -> Preprocessing:
    """Returns the evaluation preprocessing that `timm.data.create_transform` makes from a `pretrained_cfg`. Raises WeightsError if it is
    impossible."""
    if not is_size(config.get("input_size") or (3, 224, 224), 3):
        raise WeightsError(
            f"{source}: its input_size must be [channels, height, width], not {config['input_size']!r}"[:300]
        )
    _, height, width = config.get("input_size") or (3, 224, 224)
    share = config.get("crop_pct") or 0.875
    if not isinstance(share, int | float) or not 0.05 <= share <= 2:
        raise WeightsError(f"{source}: its crop_pct must be a share of the image, such as 0.875, not {share!r}"[:300])
    mean, std = config.get("mean") or (0.485, 0.456, 0.406), config.get("std") or (0.229, 0.224, 0.225)
    if channels == 1 and len(mean) != 1:
        mean, std = ([round(sum(values) / len(values), 4)] for values in (mean, std))
    try:
        return Preprocessing.model_validate(
            {
                "resize": (math.floor(height / share), math.floor(width / share)),
                "crop": (height, width),
                "channels": channels,
                "interpolation": config.get("interpolation") or "bicubic",
                "mean": mean,
                "std": std,
                "crop_mode": config.get("crop_mode") or "center",
            }
        )
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"][:1])) or "preprocessing"
        raise WeightsError(f"{source}: its {where} is not supported: {fault['msg']}") from error


# The cut


def take_layer(network: nn.Module) -> tuple[str, nn.Linear]:
    """Takes the classifier off an uncut network; returns the name of its place and the layer."""
    places = classifiers(network)
    weights = [_weight_and_bias(network.get_submodule(place)) for place in places]
    if len(places) == 1:
        network.set_submodule(places[0], nn.Identity())
        return places[0], _layer(*weights[0])
    widths = [weight.shape[1] + (bias is not None) for weight, bias in weights]
    for number, (place, (_, bias)) in enumerate(zip(places, weights, strict=True)):
        network.set_submodule(place, ScaledIdentity(widths, number, bias is not None))
    return places[0], _layer(_joined(weights), None)


def split_state(network: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits a state dict of this uncut network into those of the backbone and the last layer. The latter is empty if a classifier is
    missing."""
    places = classifiers(network)
    if isinstance(network, Encoder) and not any(key.startswith("encoder.") for key in state):
        state = {f"encoder.{key}": value for key, value in state.items()}  # as it is published
    own = {f"{place}.{name}" for place in places for name in ("weight", "bias")}
    kept = {key: value for key, value in state.items() if key.partition(".")[0] not in AUXILIARY}
    backbone = {key: value for key, value in kept.items() if key not in own}
    if any(f"{place}.weight" not in state for place in places):
        return backbone, {}
    weights = [(state[f"{place}.weight"].flatten(1), state.get(f"{place}.bias")) for place in places]
    if len(places) > 1:
        return backbone, {"weight": _joined(weights)}
    weight, bias = weights[0]
    return backbone, {"weight": weight} | ({} if bias is None else {"bias": bias})


def classifiers(network: nn.Module) -> Classifiers:
    """Returns the paths of the layers that give scores: `pretrained_cfg["classifier"]`, and whatever `get_classifier` adds.

    Some of timm's records name only one of a distilled network's two. Raises ArchitectureNotFound for a network without a classifier.
    """
    named = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    places = (named,) if isinstance(named, str) else tuple(named)
    places = tuple(place for place in places if place not in AUXILIARY)
    paths = {id(module): path for path, module in network.named_modules()}
    get_classifier: Any = getattr(network, "get_classifier", tuple)
    answer = get_classifier()
    parts = [paths.get(id(part), "") for part in (answer if isinstance(answer, tuple | list) else ())]
    for part in parts:  # "head_dist" beside "head.linear" has its layer at "head_dist.linear"
        inner = next((p.removeprefix(first) for first in parts for p in places if p.startswith(f"{first}.")), "")
        places += () if not part or any(f"{p}.".startswith(f"{part}.") for p in places) else (part + inner,)
    modules = dict(network.named_modules())
    if not places or not all(isinstance(modules.get(place), nn.Linear | nn.Conv2d) for place in places):
        raise ArchitectureNotFound(f"{type(network).__name__} of timm has no classifier that can be taken off")
    return places


LayerWeights = tuple[Tensor, Tensor | None]  # (out, in), and the bias (out,)


def _weight_and_bias(classifier: nn.Module) -> LayerWeights:
    """Returns weight and bias of a linear layer; a 1x1 convolution over one position is one too."""
    weight, bias = classifier.weight, classifier.bias
    if not isinstance(weight, Tensor):
        raise TypeError(f"a classifier has a weight, which {type(classifier).__name__} has not")
    return weight.detach().flatten(1), bias.detach() if isinstance(bias, Tensor) else None


def _joined(weights: Sequence[LayerWeights]) -> Tensor:
    """Returns (out, sum of all in + 1): each weight, with its bias in the column of the constant that `ScaledIdentity` appends."""
    return torch.cat([torch.cat([w, b[:, None]], dim=1) if b is not None else w for w, b in weights], dim=1)


def _layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


class ScaledIdentity(nn.Module):
    """Stands in place of a classifier if a network sums the scores of several, each with its own factor.

    Puts its input (N, D), and a 1 for the bias, into columns of its own between zeros: (N, sum of all D + 1). The network's weighted sum
    of these is the feature vector of which one linear layer gives the same scores.
    """

    def __init__(self, widths: Sequence[int], number: int, has_bias: bool) -> None:
        super().__init__()
        self.has_bias, self.zeros = has_bias, (sum(widths[:number]), sum(widths[number + 1 :]))

    def forward(self, features: Tensor) -> Tensor:
        if self.has_bias:
            features = F.pad(features, (0, 1), value=1.0)
        return F.pad(features, self.zeros)
