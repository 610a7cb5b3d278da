"""Defines a classifier: backbones that turn images into features, and a head that turns features into class probabilities.

    image bytes --images.decode--> uint8 (C, H, W)
    uint8 (N, C, H, W) --normalise--> float32 --backbone--> features (N, D)     once per backbone, for all models
    features (N, D) --head.part--> (N, K) --head.combine--> probabilities (N, classes)

A backbone is identified by the hash of its weights, so every classifier that names it shares what is loaded, compiled and batched.
A head takes a few hundred KB.
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
    """The reference of a model to its backbone. `sha256` is the hash of the weights file in the store.

    `output` names the module whose output, averaged over its positions, is the feature vector; None: the whole network's output.
    """

    architecture: str = Field(max_length=256)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    preprocessing: Preprocessing
    output: str | None = Field(default=None, max_length=256)

    @property
    def key(self) -> str:
        """Return the folder's name in the store: the architecture, with `/` and other special characters replaced, and the first eight
        digits of the hash."""
        return f"{re.sub(r'[^A-Za-z0-9_.-]+', '.', self.architecture)}-{self.sha256[:8]}"


class LayerConfig(Record):
    """The configuration of one backbone's last layer.

    `linear`: features (N, D) -> (N, out). `conv` (SqueezeNet, network in network): features are a flattened map (N, in_features * P); a 1x1
    convolution, ReLU, and the mean over the P positions. `mlp`: linear layers of `hidden` widths and a last one, with `activation` between
    them.
    """

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
    """The configuration of a head.

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
    """A version of a model, as in its `config.json`."""

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
    """Return the configuration from which `make_layer` makes this layer."""
    if isinstance(layer, nn.Linear):
        return LayerConfig(in_features=layer.in_features, bias=layer.bias is not None)
    if isinstance(layer, ConvLayer):
        return LayerConfig(kind="conv", in_features=layer.in_channels, bias=layer.conv.bias is not None)
    if isinstance(layer, MLPLayer):
        hidden = tuple(one.out_features for one in layer.hidden if isinstance(one, nn.Linear))
        return LayerConfig(kind="mlp", in_features=layer.in_features, hidden=hidden, activation=layer.activation)
    raise TypeError(f"a head's layer is an nn.Linear, a ConvLayer or an MLPLayer, not {type(layer).__name__}")


class Head(nn.Module):
    """Turns features of one or more backbones into probabilities.

    It has two steps: `part` runs in each backbone's batch, on its device, and `combine` afterwards on the parts, which are at most
    (N, hidden) or (N, classes).
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
        """Return the head of a plain network: its last layer, then softmax."""
        last = layer.output if isinstance(layer, MLPLayer) else layer
        out_features = last.conv.out_channels if isinstance(last, ConvLayer) else last.out_features
        head = cls(HeadConfig(layers=(layer_config(layer),)), out_features)
        head.layers[0] = layer
        return head

    @classmethod
    def mean_of(cls, layers: Sequence[nn.Module], num_classes: int) -> "Head":
        """Return the head whose probabilities are the mean of those of several layers, one on each backbone."""
        head = cls(HeadConfig(kind="mean", layers=tuple(map(layer_config, layers))), num_classes)
        head.layers = nn.ModuleList(layers)
        return head

    def part(self, member: int, features: Tensor) -> Tensor:
        """Return the contribution of backbone `member`: features (N, D) -> float32 (N, K)."""
        scores: Tensor = self.layers[member](features.float())
        return scores.softmax(dim=1) if self.config.kind == "mean" else scores

    def scores(self, parts: Sequence[Tensor]) -> Tensor:
        """Return class scores (N, classes) from one part per backbone: logits, or log-probabilities of an ensemble's mean."""
        if self.config.kind == "mean":
            return torch.stack(tuple(parts)).mean(dim=0).log()
        if self.config.kind == "feature_sum":
            logits: Tensor = self.classifier(self.dropout(torch.stack(tuple(parts)).sum(dim=0)))
            return logits
        return parts[0]

    def combine(self, parts: Sequence[Tensor]) -> Tensor:
        """Return float32 probabilities (N, classes), which sum to 1, from one part per backbone."""
        return (self.scores(parts) / self.config.temperature).softmax(dim=1)

    def forward(self, *features: Tensor) -> Tensor:
        """Return class scores (N, classes), to train on, from features (N, D) of each backbone."""
        return self.scores([self.part(i, f) for i, f in enumerate(features)])

    def probabilities(self, *features: Tensor) -> Tensor:
        """Return float32 probabilities (N, classes) from features (N, D) of each backbone."""
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
    """Keeps a module's last output. It has no reference to the network, because a hook that refers to its own network makes a cycle, which
    `gc.freeze` would keep in memory."""

    output: Any = None

    def keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.output = output

    def take(self) -> Any:
        output, self.output = self.output, None
        return output


class Tap(nn.Module):
    """Computes features (N, D) from the output of a network's module `name`, see `pooled`. Call it from one thread only.

    Its hook stays, so that `fold_batch_norm` leaves the module's output as it is. Raises WeightsError for a module whose output is no
    tensor, or which never runs by itself.
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
        views = int(features.shape[0] // images.shape[0])  # of each image, if the network looks at several
        # By views and not by images, whose number is a constant in a traced network.
        return features if views == 1 else features.reshape(views, -1, features.shape[1]).mean(dim=0)


def pooled(output: Tensor) -> Tensor:
    """Return the mean (N, D) over the positions of a map (N, D, h, w) or (N, h, w, D), or over transformer tokens (N, T, D)."""
    if output.ndim == 3:
        return output.mean(dim=1)
    return channels_first(output).flatten(2).mean(dim=2) if output.ndim > 2 else output


def channels_first(maps: Tensor) -> Tensor:
    """Return a channels-last map (N, h, w, D), as Swin's, as (N, D, h, w).

    The positions are recognised by equal sides, so a channels-last map of images that are not square stays as it is.
    """
    _, first, second, last = maps.shape
    return maps.permute(0, 3, 1, 2) if first == second != last else maps


@dataclass(frozen=True, eq=False)
class Backbone:
    """A loaded network without its last layer: normalised float32 (N, C, H, W) -> float32 (N, D). In eval mode, on the CPU.

    `map` names the module whose output, averaged over its positions or flattened, is the feature vector; None if there is none.
    """

    ref: BackboneRef
    module: nn.Module
    feature_dim: int
    map: str | None = None


@dataclass(frozen=True, eq=False)
class Classifier:
    """A model version in memory, not compiled: the float32 reference with which faster engines are compared."""

    config: ModelConfig
    backbones: tuple[Backbone, ...]
    head: Head

    @torch.inference_mode()
    def probabilities(self, images: Sequence[Tensor]) -> Tensor:
        """Return float32 probabilities (N, classes) from uint8 (N, C, H, W) for each backbone, resized and cropped for it."""
        members = zip(self.backbones, images, strict=True)
        return self.head.probabilities(*(b.module(normalise(pixels, b.ref.preprocessing)) for b, pixels in members))


def top_k(probabilities: Tensor, k: int) -> tuple[list[list[int]], list[list[float]]]:
    """Return for each row of probabilities (N, classes) the k best class indices and their probabilities, best first."""
    values, indices = probabilities.topk(min(k, probabilities.shape[1]), dim=1)
    return indices.tolist(), values.tolist()
