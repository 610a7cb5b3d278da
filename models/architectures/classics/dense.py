"""DenseNet for small images."""

import torch
from torch import Tensor, nn

from models.architectures.classics.parts import Net, norm_relu_conv, stages

BLOCKS = (6, 12, 24, 16)  # layers of each dense block: DenseNet-121's


class DenseLayer(nn.Module):
    """Huang et al. 2017, the bottleneck form: 1x1 to 4 x `growth` maps, 3x3 to `growth`, appended to the input's maps."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            norm_relu_conv(inputs, 4 * growth, 1),
            norm_relu_conv(4 * growth, growth, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.branch(x)], dim=1)


def densenet121_32(num_classes: int, channels: int, growth: int = 12) -> Net:
    """DenseNet-121's blocks with growth 12; each transition halves maps and size: 32 -> 16 -> 8 -> 4 px."""
    width = 2 * growth
    features = stages(stem=nn.Conv2d(channels, width, 3, padding=1, bias=False))
    for number, layers in enumerate(BLOCKS, start=1):
        dense = nn.Sequential(*(DenseLayer(width + layer * growth, growth) for layer in range(layers)))
        features.add_module(f"denseblock{number}", dense)
        width += layers * growth
        if number < len(BLOCKS):
            transition = norm_relu_conv(width, width // 2, 1).append(nn.AvgPool2d(2))
            features.add_module(f"transition{number}", transition)
            width //= 2
    features.add_module("norm", nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)))
    return Net(features, nn.Linear(width, num_classes))
