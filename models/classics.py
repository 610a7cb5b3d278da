"""The small networks of the literature, for small images: any number of classes, 1 or 3 input channels.

Each is written once, as `features` and a last layer `fc`:

    images (N, C, size, size) --features--> maps --flatten--> (N, D) --fc--> scores (N, classes)

`NETWORKS` lists them by name. `preact_resnet` is the network of the embedded default model.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.classifier import ConvLayer

# Pieces


class Net(nn.Module):
    """Features, flattened, then the last layer. `hidden` holds the fully connected layers between the two, where there are any."""

    def __init__(self, features: nn.Module, fc: nn.Linear | ConvLayer, hidden: nn.Module | None = None) -> None:
        super().__init__()
        self.features = features
        self.hidden = hidden or nn.Identity()
        self.fc = fc

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.hidden(self.features(x).flatten(1)))
        return scores


def stages(**parts: nn.Module) -> nn.Sequential:
    """A sequence whose parts have names, so that training can freeze up to one of them."""
    return nn.Sequential(OrderedDict(parts))


def conv_relu(inputs: int, outputs: int, kernel: int, padding: int = 0, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, padding), nn.ReLU(inplace=True)]


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution that keeps the size (but for the stride), then batch norm, which makes a bias of its own needless."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def conv_norm_relu(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return conv_norm(inputs, outputs, kernel, stride).append(nn.ReLU(inplace=True))


def norm_relu_conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), conv)


def linear_relu(*widths: int, dropout: float = 0.0) -> nn.Sequential:
    """Fully connected layers of these widths, each after dropout (where there is any) and before ReLU."""
    layers = nn.Sequential()
    for inputs, outputs in pairwise(widths):
        if dropout:
            layers.append(nn.Dropout(dropout))
        layers.extend([nn.Linear(inputs, outputs), nn.ReLU(inplace=True)])
    return layers


class Parallel(nn.ModuleList):
    """Branches over the same input, joined along the channels: what GoogLeNet's authors call an Inception module."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], dim=1)


# Plain stacks


def mnist_cnn(num_classes: int, channels: int) -> Net:
    """Two convolutions, as in PyTorch's first MNIST example: 28 -> 24 -> 12 -> 8 -> 4 px."""
    conv1 = nn.Sequential(nn.Conv2d(channels, 10, 5), nn.MaxPool2d(2), nn.ReLU(inplace=True))
    conv2 = nn.Sequential(nn.Conv2d(10, 20, 5), nn.Dropout2d(), nn.MaxPool2d(2), nn.ReLU(inplace=True))
    hidden = linear_relu(20 * 4 * 4, 50).append(nn.Dropout())
    return Net(stages(conv1=conv1, conv2=conv2), nn.Linear(50, num_classes), hidden)


def lenet(num_classes: int, channels: int, maps: tuple[int, int]) -> Net:
    """LeNet-5 (LeCun et al. 1998) in its CIFAR-10 form, ReLU and max pooling: 32 -> 28 -> 14 -> 10 -> 5 px."""
    first, second = maps
    conv1 = nn.Sequential(*conv_relu(channels, first, 5), nn.MaxPool2d(2))
    conv2 = nn.Sequential(*conv_relu(first, second, 5), nn.MaxPool2d(2))
    return Net(stages(conv1=conv1, conv2=conv2), nn.Linear(84, num_classes), linear_relu(second * 5 * 5, 120, 84))


def alexnet(num_classes: int, channels: int) -> Net:
    """AlexNet's five convolutions and three linear layers (Krizhevsky et al. 2012) shrunk to 28 px: 28 -> 14 -> 7 -> 3."""
    features = stages(
        conv1=nn.Sequential(*conv_relu(channels, 32, 3, padding=1), nn.MaxPool2d(2)),
        conv2=nn.Sequential(*conv_relu(32, 64, 3, padding=1), nn.MaxPool2d(2)),
        conv3=nn.Sequential(*conv_relu(64, 128, 3, padding=1)),
        conv4=nn.Sequential(*conv_relu(128, 256, 3, padding=1)),
        conv5=nn.Sequential(*conv_relu(256, 256, 3, padding=1), nn.MaxPool2d(3, stride=2)),
    )
    return Net(features, nn.Linear(512, num_classes), linear_relu(256 * 3 * 3, 1024, 512, dropout=0.5))


# Widths of the 3x3 convolutions in each block of Simonyan & Zisserman 2015, table 1; a max pooling ends each block.
VGG_BLOCKS: dict[int, tuple[tuple[int, ...], ...]] = {
    11: ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    13: ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}


def vgg(num_classes: int, channels: int, depth: int) -> Net:
    """VGG with batch norm: 32 -> 16 -> 8 -> 4 -> 2 -> 1 px, so that the large linear layers of the original have no place."""
    features = nn.Sequential()
    for i, widths in enumerate(VGG_BLOCKS[depth], start=1):
        block = nn.Sequential()
        for width in widths:
            block.extend(conv_norm_relu(channels, width, 3))
            channels = width
        features.add_module(f"block{i}", block.append(nn.MaxPool2d(2)))
    return Net(features, nn.Linear(channels, num_classes))


def shallow_narrow(num_classes: int, channels: int) -> Net:
    """Two convolutions of 32 maps, then three of 64, dropout after each group: 32 -> 16 -> 8 px."""
    first = nn.Sequential(*conv_relu(channels, 32, 3, 1), *conv_relu(32, 32, 3, 1), nn.MaxPool2d(2), nn.Dropout(0.25))
    convs = [*conv_relu(32, 64, 3, 1), *conv_relu(64, 64, 3, 1), *conv_relu(64, 64, 3, 1)]
    second = nn.Sequential(*convs, nn.MaxPool2d(2), nn.Dropout(0.25))
    hidden = linear_relu(64 * 8 * 8, 256).append(nn.Dropout(0.5))
    return Net(stages(conv_x2=first, conv_x3=second), nn.Linear(256, num_classes), hidden)


# Network in network


def mlpconv(inputs: int, widths: tuple[int, int, int], kernel: int) -> list[nn.Module]:
    """A convolution followed by two 1x1 ones: a small perceptron slid over the image."""
    first, second, third = widths
    return [
        *conv_relu(inputs, first, kernel, padding=kernel // 2),
        *conv_relu(first, second, 1),
        *conv_relu(second, third, 1),
    ]


def nin(num_classes: int, channels: int) -> Net:
    """Network in network (Lin et al. 2014), its CIFAR-10 form: 32 -> 16 -> 8 px. The last 1x1 convolution, averaged, is the last layer."""
    features = stages(
        block1=nn.Sequential(*mlpconv(channels, (192, 160, 96), 5), nn.MaxPool2d(3, 2, padding=1), nn.Dropout()),
        block2=nn.Sequential(*mlpconv(96, (192, 192, 192), 5), nn.AvgPool2d(3, 2, padding=1), nn.Dropout()),
        block3=nn.Sequential(*conv_relu(192, 192, 3, padding=1), *conv_relu(192, 192, 1)),
    )
    return Net(features, ConvLayer(192, num_classes))


# GoogLeNet


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


def googlenet_small(num_classes: int, channels: int) -> Net:
    """Two narrow Inception modules for MNIST: 28 -> 24 -> 12 -> 8 -> 4 px, 88 maps at the end."""
    conv1 = nn.Sequential(nn.Conv2d(channels, 10, 5), nn.MaxPool2d(2), nn.ReLU(inplace=True))
    conv2 = nn.Sequential(nn.Conv2d(88, 20, 5), nn.MaxPool2d(2), nn.ReLU(inplace=True))
    features = stages(conv1=conv1, incep1=narrow_inception(10), conv2=conv2, incep2=narrow_inception(20))
    return Net(features, nn.Linear(88 * 4 * 4, num_classes))


# Szegedy et al. 2015, table 1: 1x1; 3x3 reduce, 3x3; 5x5 reduce, 5x5; pool projection.
INCEPTION_MODULES: dict[str, tuple[int, int, int, int, int, int]] = {
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


def inception(inputs: int, widths: tuple[int, int, int, int, int, int]) -> Parallel:
    one, three_reduce, three, five_reduce, five, pool = widths
    return Parallel(
        [
            conv_norm_relu(inputs, one, 1),
            nn.Sequential(conv_norm_relu(inputs, three_reduce, 1), conv_norm_relu(three_reduce, three, 3)),
            nn.Sequential(conv_norm_relu(inputs, five_reduce, 1), conv_norm_relu(five_reduce, five, 5)),
            nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv_norm_relu(inputs, pool, 1)),
        ]
    )


def googlenet_v1(num_classes: int, channels: int) -> Net:
    """The nine modules of GoogLeNet, with batch norm, after one 3x3 convolution in place of the stem: 32 -> 16 -> 8 -> 1 px."""
    features = stages(stem=conv_norm_relu(channels, 192, 3))
    inputs = 192
    for name, widths in INCEPTION_MODULES.items():
        if name in ("inception4a", "inception5a"):
            features.add_module(f"pool{int(name[9]) - 1}", nn.MaxPool2d(3, stride=2, padding=1))
        features.add_module(name, inception(inputs, widths))
        one, _, three, _, five, pool = widths
        inputs = one + three + five + pool
    features.add_module("pool5", nn.AdaptiveAvgPool2d(1))
    features.add_module("dropout", nn.Dropout(0.4))
    return Net(features, nn.Linear(inputs, num_classes))


# Residual networks


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


def bottleneck(inputs: int, outputs: int, stride: int) -> Residual:
    """1x1 to a quarter of the width, 3x3, 1x1 back."""
    width = outputs // 4
    narrow = nn.Sequential(conv_norm_relu(inputs, width, 1), conv_norm_relu(width, width, 3, stride))
    return Residual(inputs, outputs, stride, narrow.append(conv_norm(width, outputs, 1)))


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
RESNET50: Layers = ((3, 256, 1), (4, 512, 2), (6, 1024, 2), (3, 2048, 2))  # 28 -> 28 -> 14 -> 7 -> 4 px


# DenseNet


class DenseLayer(nn.Module):
    """Huang et al. 2017: `growth` new maps, appended to all those before."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.branch = norm_relu_conv(inputs, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.branch(x)], dim=1)


def densenet_small(num_classes: int, channels: int) -> Net:
    """Four dense blocks of four layers, growth 32; each transition halves maps and size: 32 -> 16 -> 8 -> 4 px."""
    width, growth, layers = 64, 32, 4
    features = stages(stem=conv_norm_relu(channels, width, 3))
    for i in range(1, 5):
        dense = nn.Sequential(*(DenseLayer(width + j * growth, growth) for j in range(layers)))
        features.add_module(f"denseblock{i}", dense)
        width += layers * growth
        if i < 4:
            transition = norm_relu_conv(width, width // 2, 1).append(nn.AvgPool2d(2))
            features.add_module(f"transition{i}", transition)
            width //= 2
    features.add_module("norm", nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)))
    return Net(features, nn.Linear(width, num_classes))


# Hybrids of pieces cut from torchvision's networks, which are imported only when one is built


def hybrid_resnet_vgg(num_classes: int, channels: int) -> Net:
    """ResNet-18's stem and first stage (64 px -> 16), then VGG-11's blocks from 128 maps on (16 -> 8 -> 4 -> 2 -> 1)."""
    from torchvision.models import resnet18
    from torchvision.models.vgg import cfgs, make_layers  # the blocks without the 124 M parameters behind them

    resnet = resnet18()
    resnet.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
    blocks = make_layers(cfgs["A"], batch_norm=True)[4:]  # [:4] is the block of 64 maps, which layer1 replaces
    features = stages(stem=stem, layer1=resnet.layer1, blocks=blocks, pool=nn.AdaptiveAvgPool2d(1))
    return Net(features, nn.Linear(512, num_classes))


def hybrid_vgg_resnet(num_classes: int, channels: int) -> Net:
    """VGG-11's blocks of 64 and 128 maps (64 px -> 16), then ResNet-18's last two stages (16 -> 8 -> 4)."""
    from torchvision.models import resnet18
    from torchvision.models.vgg import cfgs, make_layers

    blocks = make_layers(cfgs["A"], batch_norm=True)[:8]
    blocks[0] = nn.Conv2d(channels, 64, 3, padding=1)
    resnet = resnet18()
    features = stages(blocks=blocks, layer3=resnet.layer3, layer4=resnet.layer4, pool=nn.AdaptiveAvgPool2d(1))
    return Net(features, nn.Linear(512, num_classes))


# The table


@dataclass(frozen=True)
class Classic:
    """`build(num_classes, channels)` makes the network; it takes square images of `size` pixels."""

    build: Callable[[int, int], Net]
    size: int


NETWORKS: dict[str, Classic] = {
    "mnist_cnn": Classic(mnist_cnn, 28),
    "lenet5": Classic(partial(lenet, maps=(6, 16)), 32),
    "lenet5_wide": Classic(partial(lenet, maps=(64, 128)), 32),
    "alexnet_28": Classic(alexnet, 28),
    **{f"vgg{depth}_32": Classic(partial(vgg, depth=depth), 32) for depth in VGG_BLOCKS},
    "nin": Classic(nin, 32),
    "googlenet_small": Classic(googlenet_small, 28),
    "googlenet_v1": Classic(googlenet_v1, 32),
    **{f"resnet{d}_v1": Classic(partial(resnet_v1, block=basic_v1, stem=16, layers=CIFAR[d]), 32) for d in CIFAR},
    **{f"resnet{d}_v2": Classic(partial(resnet_v2, stem=16, layers=CIFAR[d]), 32) for d in CIFAR},
    "preact_resnet": Classic(partial(resnet_v2, stem=32, layers=PREACT, mirrored=True), 32),
    "resnet50_28": Classic(partial(resnet_v1, block=bottleneck, stem=64, layers=RESNET50), 28),
    "densenet_small": Classic(densenet_small, 32),
    "shallow_narrow": Classic(shallow_narrow, 32),
    "hybrid_resnet_vgg": Classic(hybrid_resnet_vgg, 64),
    "hybrid_vgg_resnet": Classic(hybrid_vgg_resnet, 64),
}
