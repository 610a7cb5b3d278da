"""GoogLeNet and its Inception modules."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.architectures.classics.parts import Net, conv_norm_relu, stages


class Parallel(nn.ModuleList):
    """Branches over the same input, joined along the channels: an Inception module."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], dim=1)


def narrow_inception(inputs: int) -> Parallel:
    """16 + 3 x 24 = 88 channels out: 1x1; 5x5; two 3x3; pooling."""
    return Parallel(
        [
            nn.Conv2d(inputs, 16, 1),
            nn.Sequential(nn.Conv2d(inputs, 16, 1), nn.Conv2d(16, 24, 5, padding=2)),
            nn.Sequential(nn.Conv2d(inputs, 16, 1), nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)),
            nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), nn.Conv2d(inputs, 24, 1)),
        ]
    )


class SharedInception(nn.Module):
    """`narrow_inception` with one 1x1 convolution of 16 maps: the 1x1 branch, and the input of the 5x5 and the 3x3 ones."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(inputs, 16, 1)
        self.five = nn.Conv2d(16, 24, 5, padding=2)
        self.three = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1))
        self.pool = nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), nn.Conv2d(inputs, 24, 1))

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.reduce(x)
        return torch.cat([reduced, self.five(reduced), self.three(reduced), self.pool(x)], dim=1)


def googlenet_small(num_classes: int, channels: int, module: Callable[[int], nn.Module]) -> Net:
    """Two Inception modules of 88 maps for MNIST: 28 -> 24 -> 12 -> 8 -> 4 px; `module` makes one from its input's maps."""
    conv1 = nn.Sequential(nn.Conv2d(channels, 10, 5), nn.MaxPool2d(2), nn.ReLU(inplace=True))
    conv2 = nn.Sequential(nn.Conv2d(88, 20, 5), nn.MaxPool2d(2), nn.ReLU(inplace=True))
    features = stages(conv1=conv1, incep1=module(10), conv2=conv2, incep2=module(20))
    return Net(features, nn.Linear(88 * 4 * 4, num_classes))


# Szegedy et al. 2015, table 1: 1x1; 3x3 reduce, 3x3; 5x5 reduce, 5x5; pool projection.
Widths = tuple[int, int, int, int, int, int]
INCEPTION_MODULES: dict[str, Widths] = {
    "inception3a": (64, 96, 128, 16, 32, 32),
    "inception3b": (128, 128, 192, 32, 96, 64),
    "inception4a": (192, 96, 208, 16, 48, 64),
    "inception4b": (160, 112, 224, 24, 64, 64),
    "inception4c": (128, 128, 256, 24, 64, 64),
    "inception4d": (112, 144, 288, 32, 64, 64),
    "inception4e": (256, 160, 320, 32, 128, 128),
    "inception5a": (256, 160, 320, 32, 128, 128),
    "inception5b": (384, 192, 384, 48, 128, 128),
}


def five(inputs: int, outputs: int) -> nn.Sequential:
    """The 5x5 convolution of the paper."""
    return conv_norm_relu(inputs, outputs, 5)


def two_threes(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions, which see as much as one 5x5."""
    return nn.Sequential(conv_norm_relu(inputs, outputs, 3), conv_norm_relu(outputs, outputs, 3))


def inception(inputs: int, widths: Widths, wide: Callable[[int, int], nn.Module]) -> Parallel:
    """An Inception module whose 5x5 branch `wide` makes, from its input and output maps."""
    one, three_reduce, three, wide_reduce, wide_out, pool = widths
    return Parallel(
        [
            conv_norm_relu(inputs, one, 1),
            nn.Sequential(conv_norm_relu(inputs, three_reduce, 1), conv_norm_relu(three_reduce, three, 3)),
            nn.Sequential(conv_norm_relu(inputs, wide_reduce, 1), wide(wide_reduce, wide_out)),
            nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv_norm_relu(inputs, pool, 1)),
        ]
    )


def googlenet_v1(num_classes: int, channels: int, wide: Callable[[int, int], nn.Module]) -> Net:
    """The nine modules of GoogLeNet, with batch norm, after one 3x3 convolution in place of the stem: 32 -> 16 -> 8 -> 1 px."""
    features = stages(stem=conv_norm_relu(channels, 192, 3))
    inputs = 192
    for name, widths in INCEPTION_MODULES.items():
        if name in ("inception4a", "inception5a"):
            features.add_module(f"pool{int(name[9]) - 1}", nn.MaxPool2d(3, stride=2, padding=1))
        features.add_module(name, inception(inputs, widths, wide))
        one, _, three, _, wide_out, pool = widths
        inputs = one + three + wide_out + pool
    features.add_module("pool5", nn.AdaptiveAvgPool2d(1))
    features.add_module("dropout", nn.Dropout(0.4))
    return Net(features, nn.Linear(inputs, num_classes))
