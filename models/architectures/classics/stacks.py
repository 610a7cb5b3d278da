"""Plain stacks of convolutions: LeNet, AlexNet, VGG, network in network."""

from collections.abc import Sequence

from torch import nn

from models.architectures.classics.parts import Net, conv_bias_norm_relu, conv_norm_relu, conv_relu, linear_relu, stages
from models.classifier import ConvLayer


def mnist_cnn(num_classes: int, channels: int) -> Net:
    """Two 5x5 convolutions with padding, ReLU and pooling: 28 -> 14 -> 7 px."""
    conv1 = nn.Sequential(*conv_relu(channels, 16, 5, padding=2), nn.MaxPool2d(2))
    conv2 = nn.Sequential(*conv_relu(16, 32, 5, padding=2), nn.MaxPool2d(2))
    return Net(stages(conv1=conv1, conv2=conv2), nn.Linear(32 * 7 * 7, num_classes))


def lenet5(num_classes: int, channels: int) -> Net:
    """LeNet-5 (LeCun et al. 1998) in its CIFAR-10 form, ReLU and max pooling: 32 -> 28 -> 14 -> 10 -> 5 px."""
    conv1 = nn.Sequential(*conv_relu(channels, 6, 5), nn.MaxPool2d(2))
    conv2 = nn.Sequential(*conv_relu(6, 16, 5), nn.MaxPool2d(2))
    return Net(stages(conv1=conv1, conv2=conv2), nn.Linear(84, num_classes), linear_relu(16 * 5 * 5, 120, 84))


def lenet_wide(num_classes: int, channels: int) -> Net:
    """LeNet for MNIST with 3x3 convolutions of 64 and 128 maps: 28 -> 14 -> 7 px."""
    conv1 = nn.Sequential(*conv_relu(channels, 64, 3, padding=1), nn.MaxPool2d(2))
    conv2 = nn.Sequential(*conv_relu(64, 128, 3, padding=1), nn.MaxPool2d(2))
    hidden = linear_relu(128 * 7 * 7, 512, 1024)
    return Net(stages(conv1=conv1, conv2=conv2), nn.Linear(1024, num_classes), hidden)


def alexnet_28(num_classes: int, channels: int) -> Net:
    """AlexNet for MNIST, 5x5 convolutions with batch norm, 72 M parameters: 28 -> 14 -> 7 -> 3 px."""
    features = stages(
        conv1=conv_norm_relu(channels, 64, 5).append(nn.MaxPool2d(2)),
        conv2=conv_norm_relu(64, 128, 5).append(nn.MaxPool2d(2)),
        conv3=conv_norm_relu(128, 256, 5),
        conv4=conv_norm_relu(256, 512, 5),
        conv5=conv_norm_relu(512, 1024, 5).append(nn.MaxPool2d(2)),
    )
    hidden = linear_relu(1024 * 3 * 3, 4096, 4096, dropout=0.5)
    return Net(features, nn.Linear(4096, num_classes), hidden)


def alexnet_32(num_classes: int, channels: int) -> Net:
    """AlexNet's five convolutions (Krizhevsky et al. 2012) with the last layer alone: 32 -> 8 -> 4 -> 2 -> 1 px."""
    features = stages(
        conv1=nn.Sequential(*conv_relu(channels, 64, 11, padding=5, stride=4), nn.MaxPool2d(2)),
        conv2=nn.Sequential(*conv_relu(64, 192, 5, padding=2), nn.MaxPool2d(2)),
        conv3=nn.Sequential(*conv_relu(192, 384, 3, padding=1)),
        conv4=nn.Sequential(*conv_relu(384, 256, 3, padding=1)),
        conv5=nn.Sequential(*conv_relu(256, 256, 3, padding=1), nn.MaxPool2d(2)),
    )
    return Net(features, nn.Linear(256, num_classes))


# Widths of the 3x3 convolutions in each block of Simonyan & Zisserman 2015, table 1; a max pooling ends each block.
VGG_BLOCKS: dict[int, tuple[tuple[int, ...], ...]] = {
    11: ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    13: ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}


def vgg_features(channels: int, blocks: Sequence[Sequence[int]]) -> nn.Sequential:
    """`block1`, `block2` ... of 3x3 convolutions with batch norm; a max pooling ends each."""
    features = nn.Sequential()
    for number, widths in enumerate(blocks, start=1):
        block = nn.Sequential()
        for width in widths:
            block.extend(conv_norm_relu(channels, width, 3))
            channels = width
        features.add_module(f"block{number}", block.append(nn.MaxPool2d(2)))
    return features


def vgg(num_classes: int, channels: int, depth: int) -> Net:
    """VGG with batch norm: 32 -> 16 -> 8 -> 4 -> 2 -> 1 px, which leaves no input for the original's large linear layers."""
    return Net(vgg_features(channels, VGG_BLOCKS[depth]), nn.Linear(512, num_classes))


def vgg_narrow(num_classes: int, channels: int, depth: int) -> Net:
    """VGG-16 or VGG-19 with an eighth of the maps and batch norm, for 224 px: 64 maps of 7 px at the end."""
    blocks = [[width // 8 for width in widths] for widths in VGG_BLOCKS[depth]]
    hidden = linear_relu(64 * 7 * 7, 256, 256, dropout=0.5)
    return Net(vgg_features(channels, blocks), nn.Linear(256, num_classes), hidden)


def vgg11_single(num_classes: int, channels: int) -> Net:
    """VGG with one 3x3 convolution per block and the original's linear layers, for 224 px: 512 maps of 7 px at the end."""
    features = nn.Sequential()
    for number, width in enumerate((64, 128, 256, 512, 512), start=1):
        features.add_module(f"block{number}", nn.Sequential(*conv_relu(channels, width, 3, padding=1), nn.MaxPool2d(2)))
        channels = width
    hidden = linear_relu(512 * 7 * 7, 4096, 4096, dropout=0.5)
    return Net(features, nn.Linear(4096, num_classes), hidden)


def shallow_narrow(num_classes: int, channels: int) -> Net:
    """Two 5x5 convolutions of 32 maps, then three 3x3 of 64, dropout after each group: 28 -> 14 -> 7 px."""
    convs = [*conv_bias_norm_relu(channels, 32, 5), *conv_bias_norm_relu(32, 32, 5)]
    first = nn.Sequential(*convs, nn.MaxPool2d(2), nn.Dropout(0.25))
    convs = [module for inputs in (32, 64, 64) for module in conv_bias_norm_relu(inputs, 64, 3)]
    second = nn.Sequential(*convs, nn.MaxPool2d(2), nn.Dropout(0.25))
    hidden = nn.Sequential(nn.Linear(64 * 7 * 7, 256), nn.BatchNorm1d(256), nn.ReLU(inplace=True))
    return Net(stages(conv_x2=first, conv_x3=second), nn.Linear(256, num_classes), hidden)


def mlpconv(inputs: int, widths: tuple[int, int, int], kernel: int) -> list[nn.Module]:
    """A convolution followed by two 1x1 convolutions: a small perceptron at each place."""
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
