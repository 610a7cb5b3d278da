"""The small networks: shapes, sizes that the literature states, training."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from models.classics import NETWORKS, narrow_inception


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a shared machine a second thread would mostly wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def parameters(name: str, num_classes: int = 10, channels: int = 3) -> int:
    return sum(p.numel() for p in NETWORKS[name].build(num_classes, channels).parameters())


@pytest.mark.parametrize("name", [name for name in NETWORKS if "110" not in name])
@torch.inference_mode()
def test_gray_images_and_any_class_count(name: str) -> None:
    classic = NETWORKS[name]
    network = classic.build(7, 1).eval()
    assert network(torch.rand(1, 1, classic.size, classic.size)).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "channels", "expected"),
    [
        pytest.param("mnist_cnn", 1, 21_840, id="PyTorch's MNIST example"),
        pytest.param("lenet5", 3, 62_006, id="PyTorch's CIFAR-10 tutorial"),
        pytest.param(
            "vgg16_32", 3, 14_728_266 - 4_224, id="the usual VGG-16 for CIFAR-10, less its convolutions' biases"
        ),
        pytest.param("preact_resnet", 3, 896_938, id="the default model"),
        pytest.param("resnet50_28", 3, 23_520_842, id="ResNet-50 with a 3x3 stem"),
    ],
)
def test_parameter_counts(name: str, channels: int, expected: int) -> None:
    assert parameters(name, 10, channels) == expected


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_cifar_resnets_have_the_published_size(depth: int, millions: float, version: str) -> None:
    assert parameters(f"resnet{depth}_{version}") / 1e6 == pytest.approx(millions, rel=0.03)


def test_the_default_model_fits_two_megabytes_in_float16() -> None:
    state = NETWORKS["preact_resnet"].build(10, 3).state_dict()
    assert sum(2 * value.numel() for value in state.values()) < 1_900_000


def test_a_narrow_inception_module_has_88_channels() -> None:
    assert narrow_inception(10)(torch.rand(1, 10, 12, 12)).shape == (1, 88, 12, 12)


def test_googlenet_v1_has_nine_modules() -> None:
    names = [name for name, _ in NETWORKS["googlenet_v1"].build(10, 3).features.named_children()]
    assert sum(name.startswith("inception") for name in names) == 9


@pytest.mark.parametrize(("depth", "convolutions"), [(11, 8), (13, 10), (16, 13), (19, 16)])
def test_vgg_has_its_convolutions(depth: int, convolutions: int) -> None:
    network = NETWORKS[f"vgg{depth}_32"].build(10, 3)
    assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == convolutions


@pytest.mark.parametrize("name", ["mnist_cnn", "lenet5", "preact_resnet", "resnet20_v1", "googlenet_small", "nin"])
def test_every_parameter_gets_a_gradient(name: str) -> None:
    classic = NETWORKS[name]
    network = classic.build(3, 3)
    scores = network(torch.rand(4, 3, classic.size, classic.size))
    loss = nn.functional.cross_entropy(scores, torch.tensor([0, 1, 2, 0]))
    gradients = torch.autograd.grad(
        loss, list(network.parameters())
    )  # raises for a parameter that the loss does not use
    assert all(gradient.isfinite().all() for gradient in gradients)
