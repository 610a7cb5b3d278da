"""What a classifier is: backbones that turn images into features, and a head that turns features into class probabilities.

    image bytes --images.decode--> uint8 (C, H, W)
    uint8 (N, C, H, W) --normalise--> float32 --backbone--> features (N, D)     once per backbone, whoever asks
    features (N, D) --head.part--> (N, K) --head.combine--> probabilities (N, classes)

A backbone is known by the hash of its weights, so whatever is loaded, compiled and batched is shared by every classifier
that names it. A head costs a few hundred KB.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import AwareDatetime, Field, model_validator
from torch import Tensor, nn

from models.activations import Activation
from models.errors import WeightsError
from models.files.class_names import complaint
from models.files.records import NAME_PATTERN, Record
from models.preprocessing import Preprocessing, normalise

MAX_CLASSES = 100_000  # ImageNet-21k has 21,841


ModelName = Annotated[str, Field(pattern=NAME_PATTERN)]
VersionNumber = Annotated[int, Field(ge=1, le=999_999_999)]


class BackboneRef(Record):
    """Which backbone a model stands on: `sha256` is the hash of its weights file in the store.

    `output` names the module whose output, averaged over its positions, are the features; None: all of the network.
    """

    architecture: str = Field(max_length=256)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    preprocessing: Preprocessing
    output: str | None = Field(default=None, max_length=256)

    @property
    def key(self) -> str:
        """The folder's name in the store: the architecture, `/` and other characters of timm's names replaced, and the first eight digits
        of the hash."""
        return f"{re.sub(r'[^A-Za-z0-9_.-]+', '.', self.architecture)}-{self.sha256[:8]}"


class LayerConfig(Record):
    """One backbone's last layer. `linear`: features (N, D) -> (N, out). `conv` (SqueezeNet, network in network): features are a flattened
    map (N, in_features * P); a 1x1 convolution, ReLU, and the mean over the P positions. `mlp`: linear layers of `hidden` widths and the
    last one, with `activation` between them."""

    kind: Literal["linear", "conv", "mlp"] = "linear"
    in_features: int = Field(ge=1, le=2**24)
    bias: bool = True
    hidden: tuple[Annotated[int, Field(ge=1, le=2**20)], ...] | None = Field(
        default=None, max_length=20, exclude_if=lambda hidden: hidden is None
    )
    activation: Activation | None = Field(default=None, exclude_if=lambda activation: activation is None)

    @model_validator(mode="after")
    def _consistent(self) -> "LayerConfig":
        if (self.kind == "mlp") != bool(self.hidden and self.activation):
            raise ValueError("hidden and activation belong to a layer of kind mlp, which needs both")
        return self


class HeadConfig(Record):
    """How features become probabilities.

    `single`: one backbone, softmax of its layer's scores divided by `temperature`.
    `mean`: the mean of the members' probabilities. `feature_sum`: each member mapped to `hidden`, summed, dropout, a linear classifier.
    """

    kind: Literal["single", "mean", "feature_sum"] = "single"
    layers: tuple[LayerConfig, ...] = Field(min_length=1, max_length=100)
    hidden: int = Field(default=512, ge=1, le=2**20)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    temperature: float = Field(default=1.0, ge=1e-4, le=1e4)

    @model_validator(mode="after")
    def _consistent(self) -> "HeadConfig":
        if self.kind == "single" and len(self.layers) != 1:
            raise ValueError(f"a single head has one layer, not {len(self.layers)}")
        return self


class ModelConfig(Record):
    """A version of a served model, as `config.json` says it."""

    name: ModelName
    version: VersionNumber
    created_at: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    classes: tuple[str, ...] = Field(min_length=1, max_length=MAX_CLASSES)
    backbones: tuple[BackboneRef, ...] = Field(min_length=1, max_length=100)
    head: HeadConfig
    head_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    metrics: dict[str, Any] = Field(default_factory=dict)
    lineage: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if len(self.backbones) != len(self.head.layers):
            raise ValueError(f"{len(self.backbones)} backbones, but the head has {len(self.head.layers)} layers")
        if wrong := complaint(self.classes):
            raise ValueError(wrong)
        if not isinstance(self.lineage.get("command", ""), str):
            raise ValueError("lineage.command is not text")
        return self

    def check_without_hash(self) -> None:
        """Names may repeat, as two of ImageNet's do in some publications; by hand it is a mistake."""
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: two have the same name")


class ConvLayer(nn.Module):
    """The last layer of SqueezeNet and network in network: (N, in_channels * P) -> (N, out), whatever the number of positions P."""

    def __init__(self, in_channels: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.conv = nn.Conv2d(in_channels, out_features, kernel_size=1, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        maps = features.reshape(features.shape[0], self.in_channels, -1, 1)  # (N, in, P, 1)
        scores: Tensor = self.conv(maps)
        return scores.relu().mean(dim=(2, 3))


class MLPLayer(nn.Module):
    """Linear layers with an activation between them, as some checkpoints end: (N, in_features) -> (N, out)."""

    def __init__(self, in_features: int, hidden: Sequence[int], out_features: int, activation: Activation) -> None:
        super().__init__()
        self.in_features, self.activation = in_features, activation
        widths = [in_features, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))
        self.output = nn.Linear(widths[-1], out_features)

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.hidden:
            features = layer(features)
            if self.activation != "none":
                features = getattr(F, self.activation)(features)
        scores: Tensor = self.output(features)
        return scores


Layer = nn.Linear | ConvLayer | MLPLayer


def make_layer(config: LayerConfig, out_features: int) -> Layer:
    if config.kind == "mlp" and config.hidden and config.activation:
        return MLPLayer(config.in_features, config.hidden, out_features, config.activation)
    if config.kind == "conv":
        return ConvLayer(config.in_features, out_features, config.bias)
    return nn.Linear(config.in_features, out_features, config.bias)


def layer_config(layer: nn.Module) -> LayerConfig:
    """The configuration of which `make_layer` makes this layer."""
    if isinstance(layer, nn.Linear):
        return LayerConfig(in_features=layer.in_features, bias=layer.bias is not None)
    if isinstance(layer, ConvLayer):
        return LayerConfig(kind="conv", in_features=layer.in_channels, bias=layer.conv.bias is not None)
    if isinstance(layer, MLPLayer):
        hidden = tuple(one.out_features for one in layer.hidden if isinstance(one, nn.Linear))
        return LayerConfig(kind="mlp", in_features=layer.in_features, hidden=hidden, activation=layer.activation)
    raise TypeError(f"a head's layer is an nn.Linear, a ConvLayer or an MLPLayer, not {type(layer).__name__}")


class Head(nn.Module):
    """Features of one or more backbones -> probabilities.

    It is cut in two so that each backbone's batch does its own share: `part` runs in that batch, on its device, and `combine`
    afterwards, over parts that are at most (N, hidden) or (N, classes).
    """

    def __init__(self, config: HeadConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        width = config.hidden if config.kind == "feature_sum" else num_classes
        self.layers = nn.ModuleList(make_layer(layer, width) for layer in config.layers)
        if config.kind == "feature_sum":
            self.dropout = nn.Dropout(config.dropout)
            self.classifier = nn.Linear(config.hidden, num_classes)

    @classmethod
    def of(cls, layer: Layer) -> "Head":
        """The head of a plain network: its own last layer, then softmax."""
        last = layer.output if isinstance(layer, MLPLayer) else layer
        out_features = last.conv.out_channels if isinstance(last, ConvLayer) else last.out_features
        head = cls(HeadConfig(layers=(layer_config(layer),)), out_features)
        head.layers[0] = layer
        return head

    def part(self, member: int, features: Tensor) -> Tensor:
        """What backbone `member` contributes: features (N, D) -> float32 (N, K)."""
        scores: Tensor = self.layers[member](features.float())
        return scores.softmax(dim=1) if self.config.kind == "mean" else scores

    def scores(self, parts: Sequence[Tensor]) -> Tensor:
        """One part per backbone -> class scores (N, classes): logits, or log-probabilities of an ensemble's mean."""
        if self.config.kind == "mean":
            return torch.stack(tuple(parts)).mean(dim=0).log()
        if self.config.kind == "feature_sum":
            logits: Tensor = self.classifier(self.dropout(torch.stack(tuple(parts)).sum(dim=0)))
            return logits
        return parts[0]

    def combine(self, parts: Sequence[Tensor]) -> Tensor:
        """One part per backbone -> float32 probabilities (N, classes), which sum to 1."""
        return (self.scores(parts) / self.config.temperature).softmax(dim=1)

    def forward(self, *features: Tensor) -> Tensor:
        """One (N, D) per backbone -> class scores (N, classes), to train on."""
        return self.scores([self.part(i, f) for i, f in enumerate(features)])

    def probabilities(self, *features: Tensor) -> Tensor:
        """One (N, D) per backbone -> float32 probabilities (N, classes)."""
        return self.combine([self.part(i, f) for i, f in enumerate(features)])


@contextmanager
def record_outputs(network: nn.Module, names: Iterable[str], record: Callable[[str, Any], None]) -> Iterator[None]:
    """Call `record(name, output)` for each output of the modules `names` of `network`, in the order in which they run."""

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: record(name, output)

    hooks = [network.get_submodule(name).register_forward_hook(hook_of(name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Last:
    """Keeps a module's last output. As a hook it refers to no network: a network that a hook of its own refers to is a cycle, which
    `gc.freeze` would keep in memory for ever."""

    output: Any = None

    def keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.output = output

    def take(self) -> Any:
        output, self.output = self.output, None
        return output


class Tap(nn.Module):
    """The output of a network's module `name` -> (N, D), see `pooled`. To be called from one thread.

    Raises WeightsError for a module that answers no tensor, or never runs by itself.
    """

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network = network
        self.name = name
        self._last = _Last()
        network.get_submodule(name).register_forward_hook(self._last.keep)

    def forward(self, images: Tensor) -> Tensor:
        self.network(images)
        tapped = self._last.take()
        if not isinstance(tapped, Tensor):
            raise WeightsError(f"the module {self.name!r} has no output that could be features: name one that holds it")
        features = pooled(tapped)
        views = int(features.shape[0] // images.shape[0])  # of each image, where the network looks at several
        # Not by the number of images: a traced network keeps that of its example.
        return features if views == 1 else features.reshape(views, -1, features.shape[1]).mean(dim=0)


def pooled(output: Tensor) -> Tensor:
    """The mean over the positions of a map (N, D, h, w), or (N, h, w, D), or over a transformer's words (N, T, D) -> (N, D)."""
    if output.ndim == 3:
        return output.mean(dim=1)
    return channels_first(output).flatten(2).mean(dim=2) if output.ndim > 2 else output


def channels_first(maps: Tensor) -> Tensor:
    """(N, h, w, D), as Swin has its maps, -> (N, D, h, w). Equal sides tell which axes are the positions, so of images that are not
    square a map with channels last stays as it is."""
    _, first, second, last = maps.shape
    return maps.permute(0, 3, 1, 2) if first == second != last else maps


@dataclass(frozen=True, eq=False)
class Backbone:
    """A network without its last layer, weights loaded: float32 (N, C, H, W), normalised -> float32 (N, D). In eval mode, on the CPU.

    `map` names the module whose output, averaged over its positions or laid out flat, are the features; None: there is no such.
    """

    ref: BackboneRef
    module: nn.Module
    feature_dim: int
    map: str | None = None


@dataclass(frozen=True, eq=False)
class Classifier:
    """A model version in memory, uncompiled: the float32 reference that everything faster is compared with."""

    config: ModelConfig
    backbones: tuple[Backbone, ...]
    head: Head

    @torch.inference_mode()
    def probabilities(self, images: Sequence[Tensor]) -> Tensor:
        """One uint8 (N, C, H, W) per backbone, each after its own preprocessing -> float32 probabilities (N, classes)."""
        members = zip(self.backbones, images, strict=True)
        return self.head.probabilities(*(b.module(normalise(pixels, b.ref.preprocessing)) for b, pixels in members))


def top_k(probabilities: Tensor, k: int) -> tuple[list[list[int]], list[list[float]]]:
    """Probabilities (N, classes) -> per row the k best class indices and their probabilities, best first; at most all classes."""
    values, indices = probabilities.topk(min(k, probabilities.shape[1]), dim=1)
    return indices.tolist(), values.tolist()
