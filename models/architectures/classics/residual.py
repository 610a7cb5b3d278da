"""Residual networks: post-activation (v1), pre-activation (v2), bottlenecks."""

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.architectures.classics.parts import Net, conv_norm, conv_norm_relu, conv_relu, stages


class Residual(nn.Module):
    """He et al. 2015: `relu(branch(x) + shortcut(x))`; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.branch(x) + self.shortcut(x)
        return total.relu()


def basic_v1(inputs: int, width: int, stride: int) -> Residual:
    branch = nn.Sequential(conv_norm_relu(inputs, width, 3, stride), conv_norm(width, width, 3))
    return Residual(inputs, width, stride, branch)


class PreActivation(nn.Module):
    """He et al. 2016: BN-ReLU-conv twice, and nothing after the sum. A 1x1 shortcut starts from the activated input."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        same = inputs == width and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.norm1(x).relu()
        straight = x if self.shortcut is None else self.shortcut(active)
        branch: Tensor = self.conv2(self.norm2(self.conv1(active)).relu())
        return branch + straight


Block = Callable[[int, int, int], nn.Module]  # (inputs, outputs, stride)
Layers = tuple[tuple[int, int, int], ...]  # (blocks, outputs, stride of the first block) each


def residual_layers(features: nn.Sequential, block: Block, inputs: int, layers: Layers) -> int:
    """Appends `layer1`, `layer2` ... and returns the last width."""
    for i, (blocks, width, stride) in enumerate(layers, start=1):
        first, rest = block(inputs, width, stride), [block(width, width, 1) for _ in range(blocks - 1)]
        features.add_module(f"layer{i}", nn.Sequential(first, *rest))
        inputs = width
    return inputs


def resnet_v1(num_classes: int, channels: int, block: Block, stem: int, layers: Layers) -> Net:
    features = stages(stem=conv_norm_relu(channels, stem, 3))
    width = residual_layers(features, block, stem, layers)
    features.add_module("pool", nn.AdaptiveAvgPool2d(1))
    return Net(features, nn.Linear(width, num_classes))


class Mirrored(nn.Sequential):
    """In eval mode (N, C, H, W) -> (N, D) is the mean over an image and its mirror image: a point of accuracy for twice the cost."""

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            return self.once(images)
        # Both in one batch, so that each layer is called once and batch norm can be folded.
        both = self.once(torch.cat([images, images.flip(3)]))  # (2 * N, D)
        return both.reshape(2, -1, both.shape[1]).mean(dim=0)

    def once(self, images: Tensor) -> Tensor:
        features: Tensor = super().forward(images).flatten(1)  # type: ignore[no-untyped-call]
        return features


def resnet_v2(num_classes: int, channels: int, stem: int, layers: Layers, mirrored: bool = False) -> Net:
    """Full pre-activation: a bare convolution in front, and the last batch norm and ReLU after all blocks."""
    features = stages(stem=nn.Conv2d(channels, stem, 3, padding=1, bias=False))
    width = residual_layers(features, PreActivation, stem, layers)
    features.add_module("norm", nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True)))
    features.add_module("pool", nn.AdaptiveAvgPool2d(1))
    if mirrored:
        features = Mirrored(OrderedDict(features.named_children()))
    return Net(features, nn.Linear(width, num_classes))


# He et al. 2015, section 4.2: of depth 6n + 2, n blocks at each of 32, 16 and 8 px.
CIFAR: dict[int, Layers] = {6 * n + 2: ((n, 16, 1), (n, 32, 2), (n, 64, 2)) for n in (3, 5, 7, 9, 18)}
PREACT: Layers = ((1, 64, 2), (1, 128, 2), (1, 128, 1), (1, 128, 2))  # 32 -> 16 -> 8 -> 8 -> 4 px; 0.9 M parameters
RESNET18: Layers = ((2, 64, 1), (2, 128, 2), (2, 256, 2), (2, 512, 2))  # 32 -> 32 -> 16 -> 8 -> 4 px


# MNIST


def resnet_small(num_classes: int, channels: int, block: Block) -> Net:
    """Two 5x5 convolutions, each followed by pooling and one residual block: 28 -> 24 -> 12 -> 8 -> 4 px."""
    conv1 = nn.Sequential(*conv_relu(channels, 16, 5), nn.MaxPool2d(2))
    conv2 = nn.Sequential(*conv_relu(16, 32, 5), nn.MaxPool2d(2))
    features = stages(conv1=conv1, block1=block(16, 16, 1), conv2=conv2, block2=block(32, 32, 1))
    return Net(features, nn.Linear(32 * 4 * 4, num_classes))


def cumulative_norm(width: int) -> nn.BatchNorm2d:
    """Batch norm without scale and shift, whose running statistics are plain means over all batches."""
    return nn.BatchNorm2d(width, affine=False, momentum=None)


class LeakyBottleneck(nn.Module):
    """1x1 to a quarter of the width, 3x3, 1x1 back, with leaky ReLU; the shortcut is a convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        width = outputs // 4
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, width, 1),
            cumulative_norm(width),
            nn.LeakyReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, padding=1),
            cumulative_norm(width),
            nn.LeakyReLU(inplace=True),
            nn.Conv2d(width, outputs, 1),
            cumulative_norm(outputs),
        )
        same = inputs == outputs and stride == 1
        projection = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), cumulative_norm(outputs))
        self.shortcut = nn.Identity() if same else projection

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.branch(x) + self.shortcut(x))


# 17 -> 17 -> 9 -> 5 -> 3 -> 2 -> 1 px
BOTTLENECKS: Layers = ((3, 256, 1), (4, 512, 2), (4, 1024, 2), (4, 2048, 2), (4, 4096, 2), (4, 8192, 2))


def resnet_bottleneck_28(num_classes: int, channels: int, layers: Layers = BOTTLENECKS) -> Net:
    """A residual network of 23 bottlenecks for MNIST, 415 M parameters; each convolution has a bias."""
    stem = nn.Sequential(nn.Conv2d(channels, 64, 2, 2, padding=3), cumulative_norm(64), nn.LeakyReLU(inplace=True))
    features = stages(stem=stem)
    width = residual_layers(features, LeakyBottleneck, 64, layers)
    features.add_module("pool", nn.AdaptiveAvgPool2d(1))
    hidden = nn.Sequential(nn.Linear(width, 100), nn.BatchNorm1d(100), nn.LeakyReLU(inplace=True))
    return Net(features, nn.Linear(100, num_classes), hidden)
