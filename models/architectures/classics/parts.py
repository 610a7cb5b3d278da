"""The pieces that the small networks share: the cut, named stages, convolutions with batch norm."""

from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn

from models.classifier import ConvLayer


class Net(nn.Module):
    """Features, flattened, then the last layer. `hidden` holds the fully connected layers between the two, if any."""

    def __init__(self, features: nn.Module, fc: nn.Linear | ConvLayer, hidden: nn.Module | None = None) -> None:
        super().__init__()
        self.features = features
        self.hidden = hidden or nn.Identity()
        self.fc = fc

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.hidden(self.features(x).flatten(1)))
        return scores


def stages(**parts: nn.Module) -> nn.Sequential:
    """Returns a sequence with named parts, so that training can freeze up to one of them."""
    return nn.Sequential(OrderedDict(parts))


def conv_relu(inputs: int, outputs: int, kernel: int, padding: int = 0, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, padding), nn.ReLU(inplace=True)]


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Returns a convolution that keeps the size (divided by the stride), then batch norm, which makes the bias redundant."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def conv_norm_relu(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return conv_norm(inputs, outputs, kernel, stride).append(nn.ReLU(inplace=True))


def conv_bias_norm_relu(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    """Returns the same with the redundant bias, as in the textbooks' MNIST networks and torchvision's VGG."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def norm_relu_conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), conv)


def linear_relu(*widths: int, dropout: float = 0.0) -> nn.Sequential:
    """Returns fully connected layers of these widths: dropout (if any), linear, ReLU, for each."""
    layers = nn.Sequential()
    for inputs, outputs in pairwise(widths):
        if dropout:
            layers.append(nn.Dropout(dropout))
        layers.extend([nn.Linear(inputs, outputs), nn.ReLU(inplace=True)])
    return layers
