"""On a GPU a batch is filled up to one of few sizes; the answer is the same."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from support.fake_cuda import CUDA, crossings, fake_cuda
from test_runtime import NETWORKS, make_backbone, make_pixels, tapped
from torch import nn

from models.architectures.classics.residual import Mirrored
from models.classifier import Backbone
from models.preprocessing import normalise
from models.runtime import BATCH_STEPS, batch_step, choice, steps_up_to
from models.runtime.torch_engine import TorchEngine

CPU = torch.device("cpu")


def test_the_smallest_step_that_holds_the_batch() -> None:
    assert [batch_step(size) for size in (1, 3, 9, 17, 33, 97, 256)] == [1, 4, 16, 24, 48, 128, 256]
    assert [batch_step(size) for size in (257, 513, 1024)] == [512, 1024, 1024]
    assert all(batch_step(step) == step for step in BATCH_STEPS)


@pytest.mark.parametrize(
    ("max_batch", "steps"),
    [(1, [1]), (5, [1, 2, 4, 8]), (24, [1, 2, 4, 8, 16, 24]), (256, [*BATCH_STEPS]), (512, [*BATCH_STEPS, 512])],
)
def test_the_steps_up_to_a_batch_size_hold_every_batch(max_batch: int, steps: list[int]) -> None:
    assert steps_up_to(max_batch) == steps
    assert {batch_step(size) for size in range(1, max_batch + 1)} == {*steps}


@pytest.mark.parametrize("crop", [32, 224])
def test_only_steps_are_measured(crop: int) -> None:
    shape = make_backbone().ref.preprocessing.model_copy(update={"crop": crop, "resize": crop})
    assert all(size == batch_step(size) for size in choice._sizes(CUDA, shape))


def make_engine(backbone: Backbone, memory_format: str = "channels_last", pads: bool = True) -> TorchEngine:
    engine = TorchEngine(backbone, CPU, "float32", memory_format, 1)  # type: ignore[arg-type]
    assert not engine.pads  # nothing changes on a CPU
    engine.pads = pads
    return engine


@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
@pytest.mark.parametrize(("network", "channels"), NETWORKS)
def test_a_filled_batch_gives_the_same_rows(
    network: Callable[[int], nn.Module], channels: int, memory_format: str
) -> None:
    backbone = make_backbone(network, channels)
    engine, sizes = make_engine(backbone, memory_format), []
    engine.module.register_forward_hook(lambda _module, inputs, _output: sizes.append(len(inputs[0])))
    for size in (1, 3, 8, 17):
        pixels = make_pixels(size, channels)
        expected = backbone.module(normalise(pixels, backbone.ref.preprocessing))
        for given in (pixels, pixels.contiguous(), pixels.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(engine(given), expected, rtol=1e-4, atol=1e-4)
    assert set(sizes) == {1, 4, 8, 24}


def test_maps_of_a_filled_batch_are_those_of_its_images() -> None:
    backbone = make_backbone(tapped)
    backbone = Backbone(backbone.ref, backbone.module, backbone.feature_dim, "network.3")
    features, maps = make_engine(backbone).with_maps(make_pixels(3))
    expected = make_engine(backbone, pads=False).with_maps(make_pixels(3))
    torch.testing.assert_close((features, maps), expected, rtol=1e-5, atol=1e-5)


def mirrored(channels: int) -> nn.Module:
    return Mirrored(OrderedDict(conv=nn.Conv2d(channels, 16, 3), pool=nn.AdaptiveAvgPool2d(2)))


def test_maps_of_mirrored_images_too() -> None:
    backbone = make_backbone(mirrored)
    backbone = Backbone(backbone.ref, backbone.module, backbone.feature_dim, "conv")
    features, maps = make_engine(backbone).with_maps(make_pixels(3))
    expected = make_engine(backbone, pads=False).with_maps(make_pixels(3))
    assert len(maps) == 3
    torch.testing.assert_close((features, maps), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.system
@pytest.mark.parametrize("images", [1, 3, 8])
def test_a_batch_is_filled_up_on_the_gpu(images: int) -> None:
    with fake_cuda() as gpu, torch.inference_mode():
        engine = TorchEngine(gpu.backbone("resnet18"), CUDA, "float16", "channels_last", 1)
        pixels = gpu.pin(torch.zeros(images, 3, 224, 224, dtype=torch.uint8))
        with crossings() as log:
            features = engine(pixels)
    assert (features.shape, features.dtype, features.device) == ((images, 512), torch.float32, CUDA)
    assert [crossing.shape for crossing in log.all] == [(images, 3, 224, 224)]
    assert log.blocking == []
