"""Heat maps: CAM is exact where it is said to be, Grad-CAM finds what the score depends on, and both engines give the same."""

import base64
import io

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from models import architectures, heatmaps
from models.classifier import Backbone, BackboneRef, ConvLayer, Head, HeadConfig, LayerConfig, Tap
from models.preprocessing import normalise
from models.runtime import Options, compile_backbone
from models.runtime.openvino_engine import openvino_version

needs_openvino = pytest.mark.skipif(openvino_version() is None, reason="the extra openvino is not installed")
ENGINES = [pytest.param("torch", id="torch"), pytest.param("openvino", id="openvino", marks=needs_openvino)]
CPU = torch.device("cpu")


def made(name: str, tap: str | None = None) -> tuple[Backbone, Head]:
    """A random network in eval mode, and its own head of ten classes."""
    torch.manual_seed(0)
    network = architectures.create(name, 10)
    ref = BackboneRef(architecture=name, sha256="0" * 64, preprocessing=network.preprocessing, output=tap)
    module: nn.Module = network.backbone.eval().requires_grad_(False)
    if tap:
        module = Tap(module, tap)
    features, found = heatmaps.find_map(module, heatmaps.probe(network.preprocessing, 2))
    layer = nn.Linear(features.shape[1], 10) if tap else network.layer
    return Backbone(ref, module, features.shape[1], found), Head.of(layer.requires_grad_(False))


class InPlace(nn.Module):
    """Like DenseNet: what the hooked module answers is activated in place before it is averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.conv(x), inplace=True).mean(dim=(2, 3))


@pytest.mark.system
@pytest.mark.parametrize("engine", ENGINES)
def test_a_map_that_is_activated_in_place(engine: str) -> None:
    torch.manual_seed(0)
    ref, module = made("lenet5")[0].ref, InPlace().eval().requires_grad_(False)
    backbone = Backbone(ref, module, 4, heatmaps.find_map(module, heatmaps.probe(ref.preprocessing, 2))[1])
    assert backbone.map == "conv"
    runtime = compile_backbone(backbone, CPU, Options(engine=engine, precision="float32", threads=1, max_batch=2))  # type: ignore[arg-type]
    features, maps = runtime.with_maps(photo(backbone))
    torch.testing.assert_close(maps.mean(dim=(2, 3)), features)


def photo(backbone: Backbone, count: int = 2) -> Tensor:
    shape = backbone.ref.preprocessing
    return torch.randint(0, 256, (count, 3, shape.height, shape.width), dtype=torch.uint8)


EXACT = [
    pytest.param("resnet20_v1", None, id="pooled"),
    pytest.param("preact_resnet", None, id="two views"),
    pytest.param("densenet121_32", None, id="activated in place"),
    pytest.param("nin", None, id="last layer is a convolution"),
    pytest.param("googlenet_small", None, id="laid out flat"),
    pytest.param("resnet20_v1", "features.layer2", id="a named module"),
]


@pytest.mark.system
@pytest.mark.parametrize(("name", "tap"), EXACT)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_maps_of_a_cam_network_add_up_to_its_scores(engine: str, name: str, tap: str | None) -> None:
    backbone, head = made(name, tap)
    runtime = compile_backbone(backbone, CPU, Options(engine=engine, precision="float32", threads=1, max_batch=2))  # type: ignore[arg-type]
    features, maps = runtime.with_maps(photo(backbone))
    layer, scores = head.layers[0], head.part(0, features)
    assert len(maps) == 2
    for row in range(2):
        heat = heatmaps.class_maps(head, 0, maps[row], range(10))
        pooled = backbone.feature_dim == maps.shape[1] or isinstance(layer, ConvLayer)
        found = heat.mean(dim=(1, 2)) if pooled else heat.sum(dim=(1, 2))
        expected = scores[row] - layer.bias if isinstance(layer, nn.Linear) else scores[row]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.system
@pytest.mark.parametrize("name", ["lenet5", "alexnet_32", "vgg11_32", "mobilenet_v3_small"])
def test_other_networks_have_no_map_and_are_explained_by_gradients(name: str) -> None:
    backbone, head = made(name)
    heat = heatmaps.GradCam(backbone)(head, 0, photo(backbone)[0], [3, 5])
    assert backbone.map is None
    assert heat.shape[0] == 2
    assert heat.shape[1] > 1
    assert float(heat.min()) >= 0


class Corner(nn.Module):
    """Two features, of which the first sees only the upper left quarter of the map, and the second the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Conv2d(3, 1, 8, stride=8, bias=False)
        nn.init.ones_(self.map.weight)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.map(x)
        first = maps[:, :, :2, :2].sum(dim=(1, 2, 3))
        return torch.stack([first, maps.sum(dim=(1, 2, 3)) - first], dim=1).square()


def test_grad_cam_is_hot_where_the_map_is() -> None:
    ref = made("lenet5")[0].ref
    head = Head(HeadConfig(layers=(LayerConfig(in_features=2),)), 2)
    pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)
    pixels[:, 8:16, 16:24] = 255  # brighter than the mean at row 1, column 2 only
    head.layers[0].weight.data = torch.tensor([[0.0, -1.0], [0.0, 1.0]])
    heat = heatmaps.heat_maps([heatmaps.GradCam(Backbone(ref, Corner(), 2))(head, 0, pixels, [0])])
    assert heat.argmax() == 1 * 4 + 2
    assert heat.max() == 1


def test_a_transformer_is_explained_by_the_words_that_its_class_token_looks_at() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.last = nn.Conv2d(3, 8, 8, stride=8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0)
            self.last.self_attn.batch_first = True

        def forward(self, x: Tensor) -> Tensor:
            words = self.patches(x).flatten(2).transpose(1, 2)
            encoded: Tensor = self.last(torch.cat([words.mean(1, keepdim=True), words], dim=1))
            return encoded[:, 0]

    torch.manual_seed(0)
    ref = made("lenet5")[0].ref
    head = Head(HeadConfig(layers=(LayerConfig(in_features=8),)), 2)
    grad_cam = heatmaps.GradCam(Backbone(ref, Words().eval().requires_grad_(False), 8))
    assert grad_cam(head, 0, photo(made("lenet5")[0])[0], [0, 1]).shape == (2, 4, 4)


@pytest.mark.parametrize("words", [pytest.param(True, id="words"), pytest.param(False, id="channels last, as in Swin")])
def test_a_named_module_is_explained_by_its_own_output(words: bool) -> None:
    class Bright(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.last, self.after = nn.Conv2d(3, 8, 8, stride=8), nn.Identity(), nn.Linear(8, 8)
            self.patches.weight.data.fill_(1 / 192)

        def forward(self, x: Tensor) -> Tensor:
            maps = self.patches(x).permute(0, 2, 3, 1)  # (N, 4, 4, 8)
            flat = maps.flatten(1, 2)
            found = self.last(torch.cat([flat.mean(1, keepdim=True), flat], dim=1) if words else maps)
            return self.after(found).flatten(1)  # type: ignore[no-any-return]

    ref, head = made("lenet5")[0].ref, Head(HeadConfig(layers=(LayerConfig(in_features=8),)), 2)
    head.layers[0].weight.data = torch.tensor([[-1.0] * 8, [1.0] * 8])
    pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)
    pixels[:, 8:16, 16:24] = 255
    grad_cam = heatmaps.GradCam(Backbone(ref, Tap(Bright().eval().requires_grad_(False), "last"), 8))
    heat = grad_cam(head, 0, pixels, [1])
    assert (heat.shape, int(heat.argmax())) == ((1, 4, 4), 1 * 4 + 2)


def test_a_network_without_any_map_says_so() -> None:
    with pytest.raises(ValueError, match="none of its last layers has a map"):
        heatmaps.GradCam(Backbone(made("lenet5")[0].ref, nn.Flatten(), 3072))


def test_a_feature_sum_is_split_among_its_members() -> None:
    layers = (LayerConfig(in_features=3), LayerConfig(in_features=4))
    head = Head(HeadConfig(kind="feature_sum", layers=layers, hidden=6), 5).eval()
    maps = [torch.randn(3, 2, 2), torch.randn(4, 3, 3)]
    heat = [heatmaps.class_maps(head, member, maps[member], range(5)) for member in range(2)]
    pooled = [m.mean(dim=(1, 2))[None] for m in maps]
    zero = head(torch.zeros(1, 3), torch.zeros(1, 4))
    torch.testing.assert_close(sum(h.mean(dim=(1, 2)) for h in heat), (head(*pooled) - zero)[0])


def test_heat_is_between_nothing_and_one_at_the_finest_members_size() -> None:
    heat = heatmaps.heat_maps([torch.tensor([[[1.0, -3.0], [0.5, 0.0]]]), torch.rand(1, 4, 4)])
    assert heat.shape == (1, 4, 4)
    assert float(heat.min()) >= 0
    assert float(heat.max()) == 1
    assert not heatmaps.heat_maps([-torch.rand(1, 2, 2)]).any()


def test_an_overlay_is_the_image_where_it_is_cold_and_red_where_it_is_hot() -> None:
    gray = torch.full((1, 8, 8), 100, dtype=torch.uint8)
    heat = torch.zeros(2, 2)
    heat[1, 1] = 1
    shown = Image.open(io.BytesIO(base64.b64decode(heatmaps.overlay(gray, heat))))
    assert shown.size == (8, 8)
    assert shown.getpixel((0, 0)) == (100, 100, 100)
    red, green, blue = shown.getpixel((7, 7))  # type: ignore[misc]
    assert red > green
    assert red > blue


@pytest.mark.system
def test_a_map_is_what_the_original_network_would_give() -> None:
    backbone, _ = made("preact_resnet")
    pixels = photo(backbone)
    runtime = compile_backbone(backbone, CPU, Options(engine="torch", precision="float32", threads=1, max_batch=2))
    expected = backbone.module(normalise(pixels, backbone.ref.preprocessing))
    torch.testing.assert_close(runtime.with_maps(pixels)[1].mean(dim=(2, 3)), expected, rtol=1e-3, atol=1e-4)
