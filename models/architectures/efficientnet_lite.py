"""EfficientNet-Lite (Tan and Liu 2020): EfficientNet without squeeze-and-excitation, with ReLU6, for small devices.

    images (N, C, size, size) --conv_stem, bn1--> 7 stages of inverted residual blocks --conv_head, bn2--> maps --mean--> (N, 1280)

Parameters have timm's names (`tf_efficientnet_lite0`), so its checkpoints fit. The networks are written here because the default model
is one of them: a server that needs no other network imports neither timm nor torchvision, which takes 2.5 s.
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from models.preprocessing import Preprocessing

EPSILON = 1e-3  # of batch norm, as TensorFlow has it
SCALE = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # mean and standard deviation of pixels in 0..1
STEM, FEATURES, EXPANSION = 32, 1280, 6  # the same in every size

# Of each stage: blocks, kernel, stride of the first block, output channels; of Lite0.
STAGES = ((1, 3, 1, 16), (2, 3, 2, 24), (2, 5, 2, 40), (3, 3, 2, 80), (3, 5, 1, 112), (4, 5, 2, 192), (1, 3, 1, 320))


@dataclass(frozen=True)
class Scaling:
    """Multipliers of the width and depth of Lite0, and the input: the shorter side is resized to `resize`, the centre `crop` is cut."""

    width: float
    depth: float
    crop: int
    resize: int

    def build(self, num_classes: int, channels: int) -> "EfficientNetLite":
        return EfficientNetLite(self, num_classes, channels)

    def preprocessing(self, channels: int) -> Preprocessing:
        mean, std = (values[:channels] for values in SCALE)
        return Preprocessing(
            resize=self.resize,
            crop=self.crop,
            channels=1 if channels == 1 else 3,
            interpolation="bicubic",
            mean=mean,
            std=std,
        )


SIZES = {
    "efficientnet_lite0": Scaling(width=1.0, depth=1.0, crop=224, resize=256),
    "efficientnet_lite1": Scaling(width=1.0, depth=1.1, crop=240, resize=272),
    "efficientnet_lite2": Scaling(width=1.1, depth=1.2, crop=260, resize=292),
}


class SameConv(nn.Conv2d):
    """TensorFlow's "same" padding for a stride of 2: what does not divide evenly goes to the right and the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = (self._padding(side, axis) for axis, side in enumerate(x.shape[-2:]))
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def _padding(self, side: int, axis: int) -> int:
        kernel, stride = self.kernel_size[axis], self.stride[axis]
        return max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    if stride > 1:
        return SameConv(inputs, outputs, kernel, stride, groups=groups, bias=False)
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)


def relu6(x: Tensor) -> Tensor:
    """Works in place: a second tensor of this size would cost a tenth of the forward pass."""
    return F.relu6(x, inplace=True)


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=EPSILON)


class SeparableBlock(nn.Module):
    """The first stage's block, without expansion: depthwise convolution, then projection."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv_dw = conv(inputs, inputs, kernel, groups=inputs)
        self.bn1 = norm(inputs)
        self.conv_pw = conv(inputs, outputs, 1)
        self.bn2 = norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self.bn2(self.conv_pw(relu6(self.bn1(self.conv_dw(x)))))
        return maps


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, projection; the input is added where shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * EXPANSION
        self.residual = stride == 1 and inputs == outputs
        self.conv_pw = conv(inputs, hidden, 1)
        self.bn1 = norm(hidden)
        self.conv_dw = conv(hidden, hidden, kernel, stride, groups=hidden)
        self.bn2 = norm(hidden)
        self.conv_pwl = conv(hidden, outputs, 1)
        self.bn3 = norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        hidden = relu6(self.bn2(self.conv_dw(relu6(self.bn1(self.conv_pw(x))))))
        maps: Tensor = self.bn3(self.conv_pwl(hidden))
        return x + maps if self.residual else maps


class EfficientNetLite(nn.Module):
    """float32 (N, channels, crop, crop) -> scores (N, num_classes)."""

    def __init__(self, size: Scaling, num_classes: int, channels: int) -> None:
        super().__init__()
        self.conv_stem = conv(channels, STEM, 3, stride=2)
        self.bn1 = norm(STEM)
        self.blocks = nn.Sequential()
        width = STEM
        for number, (blocks, kernel, stride, outputs) in enumerate(STAGES):
            outer = number in (0, len(STAGES) - 1)  # Lite scales neither the first nor the last stage's depth
            blocks = blocks if outer else math.ceil(blocks * size.depth)
            outputs = multiple_of_8(outputs * size.width)
            self.blocks.append(stage(width, outputs, kernel, stride, blocks, first=number == 0))
            width = outputs
        self.conv_head = conv(width, FEATURES, 1)
        self.bn2 = norm(FEATURES)
        self.relu = nn.ReLU6(inplace=True)  # a module, so that its output can be named: the map of the features
        self.classifier = nn.Linear(FEATURES, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.blocks(relu6(self.bn1(self.conv_stem(x))))
        maps = self.relu(self.bn2(self.conv_head(maps)))  # (N, 1280, h, w)
        scores: Tensor = self.classifier(maps.mean(dim=(2, 3)))
        return scores


def stage(inputs: int, outputs: int, kernel: int, stride: int, blocks: int, first: bool) -> nn.Sequential:
    if first:
        return nn.Sequential(SeparableBlock(inputs, outputs, kernel))
    widths = [inputs] + [outputs] * (blocks - 1)
    return nn.Sequential(
        *(InvertedResidual(width, outputs, kernel, stride if i == 0 else 1) for i, width in enumerate(widths))
    )


def multiple_of_8(channels: float) -> int:
    """The nearest multiple of 8 that is at least 90 % of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
