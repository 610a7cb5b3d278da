"""The small networks: the parameter counts of papers and textbooks, shapes, the cut, a training step."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from models import architectures
from models.architectures.classics import NETWORKS
from models.architectures.classics.inception import SharedInception, narrow_inception
from models.architectures.classics.residual import LeakyBottleneck, resnet_bottleneck_28

pytestmark = pytest.mark.system

LARGE = "resnet_bottleneck_28"  # 1.7 GB of weights: only outlined, on the meta device
SOME_LAYERS = ((1, 16, 1), (2, 32, 2))  # of the same blocks, small enough to train

# Channels, side of the image, features before the last layer, parameters with 10 classes.
TEXTBOOKS = [
    pytest.param("mnist_cnn", 1, 28, 1568, 28_938, id="two-convolution MNIST CNN"),
    pytest.param("lenet_wide", 1, 28, 1024, 3_821_834, id="wide LeNet for MNIST"),
    pytest.param("alexnet_28", 1, 28, 4096, 71_988_682, id="AlexNet for MNIST"),
    pytest.param("vgg16_narrow", 1, 224, 256, 1_102_386, id="narrow VGG-16"),
    pytest.param("vgg19_narrow", 1, 224, 256, 1_185_650, id="narrow VGG-19"),
    pytest.param("vgg11_single", 1, 224, 4096, 123_496_458, id="VGG-11 of single convolutions"),
    pytest.param("vgg13", 1, 224, 4096, 128_990_666, id="VGG-13, torchvision's"),
    pytest.param("resnet_bottleneck_28", 1, 28, 100, 414_580_190, id="bottleneck residual network for MNIST"),
    pytest.param("googlenet_small", 1, 28, 1408, 97_298, id="small GoogLeNet"),
    pytest.param("googlenet_small_shared", 1, 28, 1408, 96_274, id="small GoogLeNet, one shared 1x1 convolution"),
    pytest.param("resnet_small_v1", 1, 28, 512, 41_610, id="small residual network v1"),
    pytest.param("resnet_small_v2", 1, 28, 512, 41_610, id="small residual network v2"),
    pytest.param("lenet5", 3, 32, 84, 62_006, id="LeNet-5 for CIFAR-10"),
    pytest.param("alexnet_32", 3, 32, 256, 2_472_266, id="AlexNet for 32 px"),
    pytest.param("googlenet_v1_3x3", 3, 32, 1024, 6_158_346, id="GoogLeNet for 32 px, two 3x3 for a 5x5"),
    pytest.param("resnet18_32", 3, 32, 512, 11_173_962, id="ResNet-18 for 32 px"),
    pytest.param("densenet121_32", 3, 32, 384, 1_000_618, id="DenseNet for 32 px"),
    pytest.param("hybrid_vgg_resnet", 1, 32, 256, 2_325_002, id="VGG block + ResNet stage"),
    pytest.param("shallow_narrow", 1, 28, 256, 925_482, id="shallow and narrow"),
    pytest.param("preact_resnet", 3, 32, 128, 896_938, id="the embedded cifar10 model"),
    pytest.param("vgg16_32", 3, 32, 512, 14_728_266 - 4_224, id="VGG-16 for CIFAR-10 without convolution biases"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a shared machine a second thread would mostly wait for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def parameters(name: str, num_classes: int = 10, channels: int = 3) -> int:
    return sum(p.numel() for p in architectures.outline(name, num_classes, channels).parameters())


@pytest.mark.parametrize(("name", "channels", "side", "features", "count"), TEXTBOOKS)
def test_textbook_networks_have_their_parameters(
    name: str, channels: int, side: int, features: int, count: int
) -> None:
    assert parameters(name, 10, channels) == count
    network = architectures.cut(name, architectures.outline(name, 10, channels), channels)
    images = torch.empty(2, channels, side, side, device="meta")
    assert network.preprocessing.crop == side
    assert network.feature_dim == features
    assert network.backbone.eval()(images).shape == (2, features)
    assert network.layer(network.backbone(images)).shape == (2, 10)


def test_the_documentation_has_each_count() -> None:
    page = (Path(__file__).parents[1] / "docs" / "guide" / "textbooks.md").read_text()
    counts = [(param.values[0], f"{param.values[-1]:,}") for param in TEXTBOOKS]
    assert [count for _, count in counts if count not in page] == []


@pytest.mark.parametrize("name", NETWORKS)
def test_gray_images_and_any_class_count(name: str) -> None:
    network, side = architectures.outline(name, 7, 1).eval(), NETWORKS[name].size
    assert network(torch.empty(1, 1, side, side, device="meta")).shape == (1, 7)


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_cifar_resnets_have_the_published_size(depth: int, millions: float, version: str) -> None:
    assert parameters(f"resnet{depth}_{version}") / 1e6 == pytest.approx(millions, rel=0.03)


def test_the_embedded_model_fits_two_megabytes_in_float16() -> None:
    state = architectures.outline("preact_resnet", 10).state_dict()
    assert sum(2 * value.numel() for value in state.values()) < 1_900_000


def test_small_inception_modules_have_88_channels() -> None:
    for module in (narrow_inception(10), SharedInception(10)):
        assert module(torch.rand(1, 10, 12, 12)).shape == (1, 88, 12, 12)


def test_googlenet_v1_has_nine_modules() -> None:
    names = [name for name, _ in NETWORKS["googlenet_v1"].build(10, 3).features.named_children()]
    assert sum(name.startswith("inception") for name in names) == 9


@pytest.mark.parametrize(("depth", "convolutions"), [(11, 8), (13, 10), (16, 13), (19, 16)])
def test_vgg_has_its_convolutions(depth: int, convolutions: int) -> None:
    network = NETWORKS[f"vgg{depth}_32"].build(10, 3)
    assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == convolutions


# Training

SLOW = {LARGE, "vgg11_single", "resnet110_v1", "resnet110_v2", "resnet56_v1", "resnet56_v2", "resnet44_v1"}


def train_one_step(network: nn.Module, images: torch.Tensor) -> None:
    """One step of SGD, after which each parameter has had a finite gradient."""
    optimizer = torch.optim.SGD(network.train().parameters(), lr=1e-3)
    loss = nn.functional.cross_entropy(network(images), torch.arange(len(images)) % 3)
    loss.backward()  # type: ignore[no-untyped-call]
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    optimizer.step()


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in SLOW])
def test_a_training_step(name: str) -> None:
    classic = NETWORKS[name]
    train_one_step(classic.build(3, 1), torch.rand(3, 1, classic.size, classic.size))


def test_a_training_step_of_the_bottleneck_network_made_small() -> None:
    network = resnet_bottleneck_28(3, 1, SOME_LAYERS)
    train_one_step(network, torch.rand(3, 1, 28, 28))
    seen = [int(value) for name, value in network.state_dict().items() if name.endswith("num_batches_tracked")]
    assert seen == [1] * len(seen)
    assert len(seen) == 1 + 9 + 2 + 1  # the stem, three in each block, two shortcuts, the hidden layer


def test_its_batch_norms_average_over_all_batches() -> None:
    block = LeakyBottleneck(4, 4, 1).train()
    norm = block.branch[1]
    assert isinstance(norm, nn.BatchNorm2d)
    batches = [torch.rand(3, 4, 5, 5) for _ in range(4)]
    means = []
    with torch.no_grad():
        for batch in batches:
            means.append(block.branch[0](batch).mean(dim=(0, 2, 3)))
            block(batch)
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(dim=0))
    assert norm.weight is None


def test_the_small_bottleneck_network_is_cut_like_any_other() -> None:
    network = resnet_bottleneck_28(5, 1, SOME_LAYERS).eval()
    images = torch.rand(2, 1, 28, 28)
    with torch.inference_mode():
        expected = network(images)
        cut = architectures.cut(LARGE, network, channels=1)
        torch.testing.assert_close(cut.layer(cut.backbone(images)), expected)
    assert (cut.layer_name, cut.feature_dim) == ("fc", 100)
