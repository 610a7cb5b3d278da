"""Every architecture: the cut, the names of its weights, one channel, class counts."""

import gc
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest
import torch
import torchvision.models
from torch import Tensor, nn

from models import architectures
from models.architectures import classics
from models.classifier import ConvLayer, Head, Tap, layer_config, make_layer
from models.errors import ArchitectureNotFound, WeightsError

NAMES = architectures.names()
HUGE = "resnet_bottleneck_28"  # 1.7 GB of weights; tests/test_classics.py cuts a smaller one of its kind
LEAST_SIZE = {"alexnet": 63, "inception": 75, "maxvit": 224}  # px; the others take 32


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small convolutions on a shared machine spend most of a second thread's time waiting: 4 times the processor time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_init(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random initialisation does nothing: `fill` is thirty times as fast."""
    random = ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_")
    for name in random:
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


@torch.no_grad()
def fill(network: nn.Module) -> nn.Module:
    """Weights of about the usual scale, from one short random sequence repeated (its length is prime, so rows differ)."""
    sequence = torch.rand(65_521, generator=torch.Generator().manual_seed(0))
    for p in network.parameters():
        repeats = -(-p.numel() // sequence.numel())
        values = (sequence * 2 - 1) * p[0].numel() ** -0.5 if p.dim() > 1 else sequence
        p.copy_(values.repeat(repeats)[: p.numel()].view_as(p))
    return network.eval()


def shrink(network: nn.Module) -> nn.Module:
    """A vision transformer that takes 2 x 2 patches: it takes one size alone, and vit_h_14 needs 167 G multiply-adds at its own."""
    if isinstance(network, torchvision.models.VisionTransformer):
        network.image_size = 2 * network.patch_size
        network.encoder.pos_embedding = nn.Parameter(network.encoder.pos_embedding[:, : 1 + 2 * 2])
    return network


def images(name: str, channels: int = 3) -> Tensor:
    """One random image of about the smallest size that the network takes."""
    family = name.split("_")[0]
    size = classics.NETWORKS[name].size if name in classics.NETWORKS else LEAST_SIZE.get(family, 32)
    if family == "vit":
        size = 2 * int(name.rpartition("_")[2])  # see `shrink`
    return torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("no_init")
@pytest.mark.parametrize("name", [name for name in NAMES if name != HUGE])
@torch.inference_mode()
def test_cut_split_and_loaded_it_answers_as_the_uncut_network(name: str) -> None:
    x, uncut = images(name), fill(architectures.build(name, 10))
    state = dict(uncut.state_dict())  # a plain dict: safetensors keeps no version numbers
    expected = shrink(uncut)(x)
    assert expected.std() > 0
    assert {buffer for buffer, _ in uncut.named_buffers()} <= state.keys(), "a buffer that is not stored has no value"
    network = architectures.cut(name, uncut)
    backbone_state, layer_state = architectures.split_state(name, state)
    assert len(backbone_state) + len(layer_state) == len(state)
    backbone, layer = architectures.create_backbone(name), make_layer(layer_config(network.layer), 10)
    backbone.load_state_dict(backbone_state, assign=True)
    layer.load_state_dict(layer_state)
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(network.layer(network.backbone(x)), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(layer(shrink(backbone)(x)), expected, rtol=0, atol=tolerance)


def test_a_network_is_freed_without_the_collector() -> None:
    """One of each family. `gc.freeze`, which a server calls once, keeps for ever what only the collector would free."""
    families = {name.split("_")[0].rstrip("0123456789"): name for name in NAMES if name != HUGE}
    kept = []
    gc.disable()
    try:
        for name in families.values():
            network = architectures.cut(name, architectures.outline(name, 7))
            *_, last = (path for path, _ in network.backbone.named_modules())
            tap = Tap(network.backbone, last)
            backbone, tapped = weakref.ref(network.backbone), weakref.ref(tap)
            del network, tap
            if backbone() is not None or tapped() is not None:
                kept.append(name)
    finally:
        gc.enable()
    assert not kept


@pytest.mark.parametrize(
    ("name", "layer_name", "feature_dim"),
    [
        pytest.param("alexnet", "classifier.6", 4096, id="alexnet"),
        pytest.param("vgg13", "classifier.6", 4096, id="vgg"),
        pytest.param("densenet121", "classifier", 1024, id="densenet"),
        pytest.param("inception_v3", "fc", 2048, id="inception"),
        pytest.param("mobilenet_v3_small", "classifier.3", 1024, id="mobilenet"),
        pytest.param("squeezenet1_1", "classifier.1", 512 * 13 * 13, id="squeezenet"),
        pytest.param("nin", "fc", 192 * 8 * 8, id="network in network"),
        pytest.param("preact_resnet", "fc", 128, id="classic"),
    ],
)
def test_where_the_cut_is(name: str, layer_name: str, feature_dim: int) -> None:
    network = architectures.cut(name, architectures.outline(name, 7))
    assert (network.layer_name, network.feature_dim) == (layer_name, feature_dim)
    is_conv = isinstance(network.layer, ConvLayer)
    assert is_conv == (name in ("squeezenet1_1", "nin"))
    assert Head.of(network.layer).num_classes == 7


def test_densenets_published_names_are_read() -> None:
    old = {"features.denseblock1.denselayer2.norm.1.weight": torch.ones(1)}
    backbone, _ = architectures.split_state("densenet121", old)
    assert list(backbone) == ["features.denseblock1.denselayer2.norm1.weight"]


@pytest.mark.usefixtures("no_init")
@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_auxiliary_classifiers_answer_in_training_and_are_not_served(name: str) -> None:
    network = architectures.create(name, 7, aux=True)
    fill(network.backbone).train()
    size = (
        network.preprocessing.height if name == "inception_v3" else 64
    )  # its auxiliary classifier needs the full 17x17 map
    answers = network.backbone(torch.rand(2, 3, size, size))
    assert network.layer(answers[0]).shape == (2, 7)
    assert {tuple(a.shape) for a in answers[1:]} == {(2, 7)}
    backbone, _ = architectures.split_state(name, network.backbone.state_dict())
    assert backbone.keys() == architectures.create_backbone(name).state_dict().keys()


@pytest.mark.usefixtures("no_init")
@pytest.mark.parametrize("aux", [pytest.param(True, id="with aux"), pytest.param(False, id="without aux")])
@torch.inference_mode()
def test_inception_is_cut_the_same_with_and_without_its_auxiliary_classifier(aux: bool) -> None:
    uncut = fill(architectures.build("inception_v3", 7, aux=aux))
    x = images("inception_v3")
    expected = uncut(x)
    network = architectures.cut("inception_v3", uncut)
    torch.testing.assert_close(network.layer(network.backbone(x)), expected)


def one_of_each_family() -> list[str]:
    """The first convolution is the same in all networks of a family: `resnet`, `vgg`, `swin`; and all small networks but the deepest."""
    families = {re.match(r"[a-z]+", name)[0]: name for name in reversed(NAMES)}  # type: ignore[index]
    return sorted({*families.values(), *classics.NETWORKS} - {"resnet110_v1", "resnet110_v2"})


@pytest.mark.parametrize("name", one_of_each_family())
def test_one_channel(name: str) -> None:
    network = architectures.cut(name, architectures.outline(name, 2, channels=1), channels=1)
    conv = next(m for m in network.backbone.modules() if isinstance(m, nn.Conv2d))
    assert conv.weight.shape[1] == conv.in_channels == network.preprocessing.channels == 1
    shape = network.preprocessing
    features = network.backbone.eval()(torch.empty(1, 1, shape.height, shape.width, device="meta"))
    assert features.shape == (1, network.feature_dim)


@torch.inference_mode()
def test_one_channel_gives_what_a_gray_image_gave_in_three() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        three = architectures.create("resnet18").backbone.eval()
        torch.manual_seed(0)
        one = architectures.create("resnet18", channels=1).backbone.eval()
    gray = images("resnet18", channels=1)
    torch.testing.assert_close(one(gray), three(gray.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's weights, as if they had been downloaded: random ones, of the right names and shapes."""
    from torchvision.models import WeightsEnum

    def state_dict(member: WeightsEnum, progress: bool, check_hash: bool) -> dict[str, Tensor]:
        name = type(member).__name__.removesuffix("_Weights").lower()
        options = {"aux_logits": True, "init_weights": False} if name in architectures.WITH_AUXILIARY else {}
        weights: dict[str, Tensor] = fill(torchvision.models.get_model(name, **options)).state_dict()
        return weights

    monkeypatch.setattr(WeightsEnum, "get_state_dict", state_dict)


@pytest.mark.usefixtures("published")
def test_published_weights_for_other_classes_keep_the_backbone_and_renew_the_layer() -> None:
    original = fill(torchvision.models.resnet18()).state_dict()
    whole, other = architectures.create("resnet18", weights=True), architectures.create("resnet18", 5, weights=True)
    assert whole.layer.state_dict()["weight"].equal(original["fc.weight"])
    assert other.layer.state_dict()["weight"].shape == (5, 512)
    assert other.backbone.state_dict()["conv1.weight"].equal(original["conv1.weight"])


@pytest.mark.usefixtures("published", "no_init")
def test_published_inception_renews_its_auxiliary_classifier_too() -> None:
    network = architectures.create("inception_v3", 5, weights=True, aux=True)
    assert network.backbone.state_dict()["AuxLogits.fc.weight"].shape == (5, 768)
    assert not any("Aux" in k for k in architectures.create("inception_v3", weights=True).backbone.state_dict())


@pytest.mark.usefixtures("published", "no_init")
@torch.inference_mode()
def test_inceptions_input_transform_is_its_preprocessing() -> None:
    pixels = images("inception_v3")
    theirs = fill(torchvision.models.inception_v3(transform_input=True, init_weights=False))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = theirs((pixels - mean) / std)
    ours = architectures.create("inception_v3", weights=True)
    ours.backbone.eval()
    assert (ours.preprocessing.mean, ours.preprocessing.std) == ((0.5,) * 3, (0.5,) * 3)
    torch.testing.assert_close(ours.layer(ours.backbone((pixels - 0.5) / 0.5)), expected, rtol=1e-4, atol=1e-4)


def test_classics_have_no_published_weights() -> None:
    assert architectures.published_weights("lenet5") is None
    with pytest.raises(WeightsError, match="create it without"):
        architectures.create("lenet5", weights=True)


def test_published_weights() -> None:
    assert str(architectures.published_weights("resnet50")) == "ResNet50_Weights.IMAGENET1K_V1"
    assert str(architectures.published_weights("resnet50", "IMAGENET1K_V2")) == "ResNet50_Weights.IMAGENET1K_V2"
    assert str(architectures.published_weights("vit_h_14")) == "ViT_H_14_Weights.IMAGENET1K_SWAG_LINEAR_V1"
    with pytest.raises(WeightsError, match="it has IMAGENET1K_V1, IMAGENET1K_V2"):
        architectures.published_weights("resnet50", "IMAGENET1K_V3")


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    with pytest.raises(ArchitectureNotFound, match="resnet50"):
        architectures.create("resnet51")
    with pytest.raises(ArchitectureNotFound, match="densenet121_32"):
        architectures.preprocessing_of("densenet121_3")


@pytest.mark.parametrize(
    ("name", "channels", "resize", "crop", "interpolation", "mean"),
    [
        pytest.param("resnet50", 3, 256, 224, "bilinear", (0.485, 0.456, 0.406), id="resnet50"),
        pytest.param("resnet50", 1, 256, 224, "bilinear", (0.449,), id="gray resnet50"),
        pytest.param("efficientnet_b3", 3, 320, 300, "bicubic", (0.485, 0.456, 0.406), id="efficientnet"),
        pytest.param("inception_v3", 3, 342, 299, "bilinear", (0.5, 0.5, 0.5), id="inception"),
        pytest.param("preact_resnet", 3, 32, 32, "bilinear", (0.491, 0.482, 0.447), id="classic"),
        pytest.param("mnist_cnn", 1, 28, 28, "bilinear", (0.1307,), id="gray classic"),
    ],
)
def test_preprocessing(
    name: str, channels: int, resize: int, crop: int, interpolation: str, mean: tuple[float, ...]
) -> None:
    found = architectures.preprocessing_of(name, channels)
    assert (found.resize, found.crop, found.interpolation, found.mean) == (resize, crop, interpolation, mean)


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_has_a_preprocessing(name: str) -> None:
    assert architectures.preprocessing_of(name).channels == 3


def test_two_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="channels"):
        architectures.preprocessing_of("resnet18", 2)


def test_the_default_model_does_without_torchvision() -> None:
    program = (
        "import sys; from models import architectures as a; a.create('preact_resnet', 10); "
        "a.create_backbone('preact_resnet'); assert 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
