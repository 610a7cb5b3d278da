"""Versions with random weights whose probabilities differ from image to image: what the initialisation gives hardly moves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import onnxruntime
import torch
from torch import Tensor, nn

from models import architectures
from models.architectures import Network
from models.classifier import Classifier, ConvLayer, Head, HeadConfig, LayerConfig, ModelConfig
from models.preprocessing import Preprocessing, normalise
from models.store.export.graph import graph_inputs
from models.store.store import ModelStore

CLASSES = ("ant", "bee", "\N{LATIN SMALL LETTER U WITH DIAERESIS}nicorn")


def noise(shape: Preprocessing, count: int) -> Tensor:
    """Random images of different brightness and contrast, uint8 (count, C, H, W)."""
    generator = torch.Generator().manual_seed(count)
    images = torch.rand((count, shape.channels, shape.height, shape.width), generator=generator)
    low, high = torch.rand((2, count, 1, 1, 1), generator=generator).sort(dim=0).values
    pixels: Tensor = 255 * (low + (high - low) * images)
    return pixels.to(torch.uint8)


@torch.no_grad()
def network(architecture: str, channels: int = 3, images: int = 2) -> Network:
    """Random weights, with batch norm's statistics those of some images, so that nothing vanishes on the way."""
    torch.manual_seed(0)
    made = architectures.create(architecture, len(CLASSES), channels)
    for module in made.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    made.backbone.train()(normalise(noise(made.preprocessing, images), made.preprocessing))
    made.backbone.eval()
    return made


@torch.no_grad()
def lively(head: Head, features: Sequence[Tensor]) -> Head:
    """The head with its scores of these images brought to a mean of 0 and a deviation of 1."""
    for layer, member in zip(head.layers, features, strict=True):
        _standardise(layer.conv if isinstance(layer, ConvLayer) else layer, layer, member)
    if head.config.kind == "feature_sum":
        summed = torch.stack([head.part(i, member) for i, member in enumerate(features)]).sum(dim=0)
        _standardise(head.classifier, head.classifier, summed)
    return head.eval()


def _standardise(weights: Any, layer: nn.Module, inputs: Tensor) -> None:
    scores = layer(inputs)
    scale = scores.std(dim=0).mean().clamp(min=1e-6)
    weights.weight.div_(scale)
    if weights.bias is not None and isinstance(layer, nn.Linear):
        weights.bias.copy_((weights.bias - scores.mean(dim=0)) / scale)


def publish(
    store: ModelStore,
    name: str,
    *members: str,
    kind: Literal["single", "mean", "feature_sum"] = "single",
    channels: int = 3,
    output: str | None = None,
    temperature: float = 0.7,
    lineage: dict[str, Any] | None = None,
) -> ModelConfig:
    """A version on these architectures. `output`: the module whose pooled output are the features."""
    refs, features, layers = [], [], []
    for architecture in members:
        made = network(architecture, channels)
        ref = store.put_backbone(architecture, made.backbone, made.preprocessing)
        ref = ref.model_copy(update={"output": output})
        backbone = store.load_backbone(ref)
        if output is None and isinstance(made.layer, ConvLayer):
            layers.append(LayerConfig(kind="conv", in_features=made.layer.in_channels))
        else:
            layers.append(LayerConfig(in_features=backbone.feature_dim))
        refs.append(ref)
        with torch.inference_mode():
            features.append(backbone.module(normalise(noise(ref.preprocessing, 4), ref.preprocessing)))
    torch.manual_seed(1)
    head = Head(HeadConfig(kind=kind, layers=tuple(layers), hidden=8, temperature=temperature), len(CLASSES))
    return store.publish(name, refs, lively(head, features), CLASSES, lineage=lineage)


def answers(path: Path, classifier: Classifier, count: int) -> tuple[Tensor, Tensor]:
    """Probabilities (count, classes) by onnxruntime, and by the version itself, of the same random images."""
    inputs = graph_inputs(classifier.config)
    images = {each.name: noise(each.preprocessing, count) for each in inputs}
    rows = {name: pixels.permute(0, 2, 3, 1).contiguous().numpy() for name, pixels in images.items()}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    [given] = session.run(["probabilities"], rows)
    of_member = {member: images[each.name] for each in inputs for member in each.members}
    expected = classifier.probabilities([of_member[member] for member in range(len(classifier.backbones))])
    return torch.from_numpy(given), expected
