"""Computes heat maps that show where in an image a classifier sees a class.

    CAM (Zhou et al. 2016), if the features are an averaged or flattened map: what each position adds to a class's score, from the map of
    the same forward pass as the prediction
    Grad-CAM (Selvaraju et al. 2017), if there are layers between: the last map, weighted by the mean gradient of the score; by the
    float32 network on the CPU, with the gradient from the features back to that map only

The members' maps of an ensemble are scaled to 0..1, resized to the finest, and averaged.
"""

import base64
import io
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from models.classifier import Backbone, ConvLayer, Head, MLPLayer, Tap, channels_first, record_outputs
from models.preprocessing import Preprocessing, normalise

WATCHED = 32  # the network's last outputs, among which its map is looked for; all outputs of a large one would fill the memory
PREFIX_TOKENS = (1, 0, 2, 5, 3, 4, 6, 7, 8, 9)  # the most usual first, because some lengths fit two
AGREES = 1e-3  # of the largest feature
HEAT = ((0, 0, 80), (0, 110, 220), (60, 200, 120), (250, 220, 40), (220, 30, 20))  # from cold to hot, RGB
OPACITY = 0.6  # of the overlay where it is hottest

ModuleOutput = tuple[str, Tensor]  # a module's name and its output


# The map of a forward pass


def find_map(module: nn.Module, images: Tensor) -> tuple[Tensor, str | None]:
    """Return features (N, D) of a few images, and the module whose output they are, averaged over its positions or flattened.

    None if there are other layers between, so that CAM does not apply.
    """
    with _recorded_maps(module) as outputs, torch.inference_mode():
        features: Tensor = module(images)
        for name, output in reversed(outputs):
            if output.ndim == 4 and _is_map_of(upright(output, len(images)), features):
                return features, name
    return features, None


def upright(maps: Tensor, images: int) -> Tensor:
    """Return maps (N, D, h, w). A network that also looks at mirror images (`classics.Mirrored`) makes maps (2 * N, D, h, w):
    the second half is mirrored back, and averaged with the first."""
    if len(maps) == 2 * images:
        straight, mirrored = maps.chunk(2)
        return (straight + mirrored.flip(3)) / 2
    return maps


def _names(module: nn.Module) -> Iterable[str]:
    """The modules among whose outputs a map is looked for."""
    if isinstance(module, Tap):
        return [f"network.{module.name}"]
    return [name for name, _ in module.named_modules()]


@contextmanager
def _recorded_maps(module: nn.Module) -> Iterator[deque[ModuleOutput]]:
    """Yields the last outputs that have positions, in the order in which they are made."""
    outputs: deque[ModuleOutput] = deque(maxlen=WATCHED)

    def record(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and _spatial(output) is not None:
            outputs.append((name, output))

    with record_outputs(module, _names(module), record):
        yield outputs


def _is_map_of(maps: Tensor, features: Tensor) -> bool:
    within = AGREES * float(features.abs().max().clamp(min=1e-12))
    for found in (maps.mean(dim=(2, 3)), maps.flatten(1)):
        if found.shape == features.shape and float((found - features).abs().max()) <= within:
            return True
    return False


def _spatial(output: Tensor) -> Tensor | None:
    """Return a map, or a transformer's tokens (N, p + h * w, D), as (N, D, h, w); None if it is neither or has one position only.

    The p tokens before the positions are none, a class token, two of them, or one and up to eight registers.
    """
    if output.ndim == 4 and (maps := channels_first(output))[0, 0].numel() > 1:
        return maps
    for before in PREFIX_TOKENS if output.ndim == 3 else ():
        side = math.isqrt(max(output.shape[1] - before, 0))
        if side > 1 and side**2 == output.shape[1] - before:
            return output[:, before:].transpose(1, 2).reshape(len(output), -1, side, side)
    return None


# From a map to a class's map


@torch.no_grad()
def class_maps(head: Head, member: int, maps: Tensor, classes: Sequence[int]) -> Tensor:
    """Return what each position of one image's float32 map (D, h, w) adds to the scores of these classes, without the bias: (k, h, w)."""
    layer = head.layers[member]
    if isinstance(layer, ConvLayer):
        scores: Tensor = layer.conv(maps[None])[0].relu()  # (K, h, w)
        return torch.einsum("ck,khw->chw", _mixing(head, classes), scores)
    if isinstance(layer, MLPLayer):
        weights = _slopes(layer, maps, classes)
    else:
        if not isinstance(layer, nn.Linear):
            raise TypeError("a head's layer is a ConvLayer, an MLPLayer or linear")
        weights = _mixing(head, classes) @ layer.weight  # (k, D), or (k, D * h * w)
    if weights.shape[1] == len(maps):
        return torch.einsum("cd,dhw->chw", weights, maps)
    return (weights.reshape(-1, *maps.shape) * maps).sum(dim=1)


def _slopes(layer: MLPLayer, maps: Tensor, classes: Sequence[int]) -> Tensor:
    """Return the gradients of these classes' scores at the features of this image, (k, D) or (k, D * h * w)."""
    features = maps.mean(dim=(1, 2)) if layer.in_features == len(maps) else maps.flatten()
    with torch.enable_grad():
        features = features.detach().requires_grad_()
        scores = layer(features[None])[0]
        return torch.stack([torch.autograd.grad(scores[c], features, retain_graph=True)[0] for c in classes])


def _mixing(head: Head, classes: Sequence[int]) -> Tensor:
    """Return the weights (k, K) of a member's layer outputs in the scores of these classes."""
    if head.config.kind == "feature_sum":
        return head.classifier.weight[classes]
    return torch.eye(head.num_classes)[classes]


class GradCam:
    """Grad-CAM by a backbone's own module, on the CPU. Call it from one thread only. Raises ValueError if no layer has a map."""

    def __init__(self, backbone: Backbone) -> None:
        self.module = backbone.module
        self.preprocessing = backbone.ref.preprocessing
        self.name = _last_with_gradient(self.module, self.preprocessing)

    def __call__(self, head: Head, member: int, pixels: Tensor, classes: Sequence[int]) -> Tensor:
        """Return the maps of one image, uint8 (C, H, W): float32 (k, h, w), not negative."""
        kept: list[Tensor] = []

        def cut(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[-1].clone()  # later layers may change it in place

        hook = self.module.get_submodule(self.name).register_forward_hook(cut, prepend=True)  # before the hook of a Tap
        try:
            with torch.enable_grad():
                features = self.module(normalise(pixels[None], self.preprocessing))
                scores = _member_scores(head, member, features)
        finally:
            hook.remove()
        return torch.stack([_weighted(scores[0, c], kept[-1]) for c in classes])


def _last_with_gradient(module: nn.Module, shape: Preprocessing) -> str:
    """Return the last module whose output has positions on which the features depend, which tokens beside a class token may not."""
    image = probe(shape, 1).requires_grad_()
    with _recorded_maps(module) as outputs, torch.enable_grad():
        features = module(image)
        outputs = deque(
            (name, output) for name, output in outputs if output.requires_grad
        )  # position biases do not require it
        tensors = [output for _, output in outputs]
        gradients = torch.autograd.grad(features.square().sum(), [image, *tensors], allow_unused=True)[1:]
    for (name, _), gradient in zip(reversed(outputs), reversed(gradients), strict=True):
        spatial = None if gradient is None else _spatial(gradient)
        if spatial is not None and bool(spatial.any()):
            return name
    raise ValueError("none of its last layers has a map")


def _member_scores(head: Head, member: int, features: Tensor) -> Tensor:
    scores: Tensor = head.layers[member](features)
    if head.config.kind == "feature_sum":
        scores = head.classifier(scores)
    return scores


def _weighted(score: Tensor, output: Tensor) -> Tensor:
    """Return the map (h, w) with each channel weighted by the mean gradient of the score over its positions; negative sums become 0."""
    (gradient,) = torch.autograd.grad(score, output, retain_graph=True)
    maps, slopes = _spatial(output.detach()), _spatial(gradient)
    if maps is None or slopes is None:
        raise RuntimeError("the output of the hooked module has no positions")
    heat = (slopes.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1, keepdim=True).relu()
    return upright(heat, 1)[0, 0]


def probe(shape: Preprocessing, count: int) -> Tensor:
    """Return normalised noise, float32 (count, C, height, width), the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, shape.channels, shape.height, shape.width, generator=generator)


# What is shown


def heat_maps(members: Sequence[Tensor]) -> Tensor:
    """Combine the maps (k, h, w) of each member to (k, H, W) in 0..1: 1 where the class is strongest, 0 where nothing speaks for it."""
    size = max((tuple(maps.shape[1:]) for maps in members), key=math.prod)
    scaled = [_to_one(maps) for maps in members]
    same = [
        maps if maps.shape[1:] == size else F.interpolate(maps[:, None], size=size, mode="bilinear")[:, 0]
        for maps in scaled
    ]
    return same[0] if len(same) == 1 else _to_one(torch.stack(same).mean(dim=0))


def _to_one(maps: Tensor) -> Tensor:
    heat = maps.relu()
    return heat / heat.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)


def overlay(pixels: Tensor, heat: Tensor) -> str:
    """Return a PNG in base64 of an image as the network saw it, uint8 (C, H, W), under a heat map (h, w) in 0..1."""
    size = (pixels.shape[1], pixels.shape[2])
    smooth = F.interpolate(heat[None, None], size=size, mode="bilinear")[0, 0]  # (H, W)
    anchors = torch.tensor(HEAT, dtype=torch.float32)
    place = smooth * (len(HEAT) - 1)
    low = place.long().clamp(max=len(HEAT) - 2)
    colour = torch.lerp(anchors[low], anchors[low + 1], (place - low)[..., None])  # (H, W, 3)
    image = pixels.float().expand(3, -1, -1).permute(1, 2, 0)
    shown = torch.lerp(image, colour, (OPACITY * smooth)[..., None]).round().to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(shown.numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
