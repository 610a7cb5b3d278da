"""Compares a compiled backbone with its float32 original on generated images."""

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.classifier import Backbone
from models.preprocessing import Preprocessing, normalise
from models.runtime.options import Agreement

IMAGES = 32
FEWEST = 4
PROBE_SECONDS = 1.0  # for the original's passes; a slow network is compared on fewer images


class Probe:
    """Up to 32 images and the original's features for them."""

    def __init__(self, backbone: Backbone, layer: nn.Module | None) -> None:
        pixels = probe_images(backbone.ref.preprocessing)
        self.layer = layer
        self.reference = _original_features(backbone, pixels)  # float32 (P, D)
        self.pixels = pixels[: len(self.reference)]

    def agreement(self, engine: Callable[[Tensor], Tensor]) -> Agreement:
        """Compare an engine with the original, with one image in a batch and with several, which exposes a network traced for one size."""
        features = torch.cat([engine(batch).cpu() for batch in (self.pixels[:1], self.pixels[1:])])
        difference = float((features - self.reference).abs().max() / self.reference.abs().max().clamp(min=1e-12))
        return Agreement(
            images=len(features),
            max_difference=difference if math.isfinite(difference) else math.inf,
            top1=None if self.layer is None else _same_best(self.layer, features, self.reference),
        )

    def warm_up(self, engine: Callable[[Tensor], Tensor], max_batch: int) -> None:
        """Run the two sizes that serving uses most, so that no request pays for their first run."""
        for size in (1, max_batch):
            engine(self.pixels[torch.arange(size) % len(self.pixels)].contiguous(memory_format=torch.channels_last))


@torch.inference_mode()
def _same_best(layer: nn.Module, features: Tensor, reference: Tensor) -> float:
    same: Tensor = layer(features).argmax(dim=1) == layer(reference).argmax(dim=1)
    return float(same.float().mean())


@torch.inference_mode()
def _original_features(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Return the original's features, float32 (P, D), one image at a time, so that no result depends on its batch."""
    start = time.perf_counter()
    features: list[Tensor] = []
    for image in torch.split(pixels, 1):
        inputs = normalise(image, backbone.ref.preprocessing).contiguous(memory_format=torch.channels_last)
        features.append(backbone.module(inputs))
        if len(features) >= FEWEST and time.perf_counter() - start > PROBE_SECONDS:
            break
    return torch.cat(features)


def probe_images(shape: Preprocessing) -> Tensor:
    """Return coarse random patterns with fine noise, uint8 (32, C, height, width), the same every time."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(IMAGES, shape.channels, 6, 6, generator=generator)
    smooth = F.interpolate(coarse, size=(shape.height, shape.width), mode="bilinear", antialias=False)
    noise = torch.randn(smooth.shape, generator=generator) * 0.05
    return ((smooth + noise).clamp(0, 1) * 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)
