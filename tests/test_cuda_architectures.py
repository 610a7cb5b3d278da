"""Every network, head and reference on a GPU: no constant stays on the CPU, and no dtypes clash. A sample here, all in `make soak`."""

import copy

import pytest
import torch
from support.fake_cuda import CUDA, fake_cuda
from support.timm_walk import families

from models import architectures
from models.classifier import Backbone, Head, HeadConfig, LayerConfig
from models.runtime.options import Precision
from models.runtime.torch_engine import TorchEngine
from service.inference import forward
from service.inference.forward import HeadPart, NeighboursPart
from service.inference.results import PartFunction

pytestmark = pytest.mark.system

SAMPLE = (
    "alexnet",
    "convnext_tiny",
    "efficientnet_lite0",
    "googlenet_small",
    "lenet5",
    "nin",
    "resnet18",
    "squeezenet1_0",
    "swin_t",
    "vit_b_16",
    "timm/test_vit",
    "timm/test_nfnet",
)
TIMM = [name for names in families().values() for name in names]
EVERY = [name for name in (*architectures.names(), *TIMM) if name not in SAMPLE]


def check(name: str, precision: Precision) -> None:
    """One batch from pixels on the CPU to float32 features on the GPU."""
    with fake_cuda() as gpu, torch.inference_mode():
        backbone = gpu.backbone(name)
        engine = TorchEngine(backbone, CUDA, precision, "channels_last", 1)
        features = engine(batch_for(backbone, 3))
        assert (features.device, features.dtype, tuple(features.shape)) == (
            CUDA,
            torch.float32,
            (3, backbone.feature_dim),
        )


def batch_for(backbone: Backbone, count: int) -> torch.Tensor:
    kind = backbone.ref.preprocessing
    return torch.zeros(count, kind.channels, kind.height, kind.width, dtype=torch.uint8)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_network_runs_in_float16(name: str) -> None:
    check(name, "float16")


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["resnet18", "timm/test_vit"])
def test_a_network_runs_in_other_precisions(name: str, precision: Precision) -> None:
    check(name, precision)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # an LSTM's
@pytest.mark.soak
@pytest.mark.parametrize("name", EVERY)
def test_every_network_runs_in_float16(name: str) -> None:
    check(name, "float16")


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(HeadConfig(layers=(LayerConfig(in_features=512),)), id="linear"),
        pytest.param(HeadConfig(kind="mean", layers=(LayerConfig(in_features=512),) * 2), id="mean"),
        pytest.param(HeadConfig(kind="feature_sum", layers=(LayerConfig(in_features=512),) * 2, hidden=16), id="sum"),
        pytest.param(HeadConfig(layers=(LayerConfig(in_features=512, kind="conv"),)), id="convolution"),
    ],
)
def test_every_kind_of_head_runs_on_the_gpu(config: HeadConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_finite", lambda *_: [])  # fake tensors have no values
    with fake_cuda(), torch.inference_mode():
        on_cpu = Head(config, 5).eval()
        head = copy.deepcopy(on_cpu).to(CUDA)
        features = torch.zeros(4, 512, device=CUDA)
        parts: list[PartFunction] = [HeadPart({CUDA: head}, member) for member in range(len(config.layers))]
        near: PartFunction = NeighboursPart({CUDA: torch.zeros(300, 512, device=CUDA)})
        pixels = [torch.zeros(3, 8, 8, dtype=torch.uint8)] * 4
        asked = [[*parts, near], [*parts, near], parts, parts]
        rows = forward.run(lambda _: features, CUDA, pixels, asked).rows  # type: ignore[arg-type]
        assert {value.device.type for row in rows for value in row.values()} == {"cpu"}
        assert on_cpu.combine([rows[0][part][None] for part in parts]).shape == (1, 5)


def test_maps_come_with_features() -> None:
    with fake_cuda() as gpu, torch.inference_mode():
        plain = gpu.backbone("resnet18")
        backbone = Backbone(plain.ref, plain.module, plain.feature_dim, map="layer4")
        features, maps = TorchEngine(backbone, CUDA, "float16", "channels_last", 1).with_maps(batch_for(backbone, 2))
        assert (features.device, maps.device, maps.dtype) == (CUDA, CUDA, torch.float32)
        assert tuple(maps.shape) == (2, 512, 7, 7)
