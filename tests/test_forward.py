"""One batch on its device: values per image, and what crosses between the CPU and a GPU."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.fake_cuda import CUDA, Crossings, FakeGpu, crossings, fake_cuda
from torch import Tensor

from models.classifier import Head, HeadConfig, LayerConfig
from models.runtime.torch_engine import TorchEngine
from service.inference import forward
from service.inference.forward import HeadPart, NeighboursPart
from service.inference.results import PartFunction

CPU = torch.device("cpu")
Asked = list[list[PartFunction]]
DIM = 128  # of its features


class Pixels:
    """Features = an image's first pixel, twice; its map is the image."""

    max_batch = 8

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels[:, 0, 0, 0].float()[:, None].repeat(1, 2)

    def with_maps(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self(pixels), pixels.float()


def images(*values: int) -> list[Tensor]:
    return [torch.full((1, 2, 2), value, dtype=torch.uint8) for value in values]


def double(features: Tensor) -> Tensor:
    return features * 2


def absolute(features: Tensor) -> Tensor:
    return features.abs()


def broken_at_7(features: Tensor) -> Tensor:
    return torch.where(features == 7, math.inf, features)


def test_each_image_gets_the_values_that_it_asked_for() -> None:
    asked: Asked = [[double, absolute], [absolute], [absolute, double]]
    values = forward.run(Pixels(), CPU, images(1, 2, 3), asked)
    assert [{part: value[0].item() for part, value in row.items()} for row in values.rows] == [
        {double: 2, absolute: 1},
        {absolute: 2},
        {absolute: 3, double: 6},
    ]
    assert (values.maps, values.finite) == ([None] * 3, [True] * 3)


def test_maps_come_with_those_images_that_want_them() -> None:
    values = forward.run(Pixels(), CPU, images(1, 2, 3), [[double]] * 3, mapped=[0, 2])
    assert [None if one is None else one[0, 0, 0].item() for one in values.maps] == [1, None, 3]


def test_an_infinite_value_concerns_its_image_alone() -> None:
    asked: Asked = [[absolute, broken_at_7], [broken_at_7], [absolute], [broken_at_7]]
    assert forward.run(Pixels(), CPU, images(7, 6, 7, 8), asked).finite == [False, True, True, True]


def batch(gpu: FakeGpu, heads: int, near: bool, mapped: bool, size: int = 104) -> Crossings:
    """A batch of a small ResNet on the pretended GPU: each image asks for one of `heads`, every other one for more."""
    backbone = replace(gpu.backbone("preact_resnet"), map="features.norm")
    runtime: Any = TorchEngine(backbone, CUDA, "float16", "channels_last", 1)
    parts = [HeadPart({CUDA: _head(gpu)}, 0) for _ in range(heads)]
    kept = NeighboursPart({CUDA: torch.zeros(32, DIM, device=CUDA)})
    asked: Asked = [[parts[row % heads], *([kept] if near and row % 2 else [])] for row in range(size)]
    pixels = [torch.zeros(3, 32, 32, dtype=torch.uint8) for _ in range(size)]
    with crossings() as log, torch.inference_mode():
        values = forward.run(runtime, CUDA, pixels, asked, range(0, size, 2) if mapped else ())
    assert [len(row) for row in values.rows] == [len(parts) for parts in asked]
    return log


def _head(gpu: FakeGpu) -> Head:
    head = Head(HeadConfig(layers=(LayerConfig(in_features=DIM),)), 10)
    moved: Head = gpu.faked(head.eval()).to(CUDA)  # type: ignore[assignment]
    return moved


@pytest.mark.system
@pytest.mark.parametrize(
    ("heads", "near", "mapped"),
    [
        pytest.param(1, False, False, id="1 head"),
        pytest.param(2, False, False, id="2 heads"),
        pytest.param(100, False, False, id="100 heads"),
        pytest.param(100, True, True, id="100 heads, neighbours, maps"),
    ],
)
def test_a_batch_waits_for_the_gpu_once(heads: int, near: bool, mapped: bool) -> None:
    """However many heads it has: pixels and one index go in without waiting, and all values come out by one copy."""
    with fake_cuda() as gpu:
        log = batch(gpu, heads, near, mapped)
    assert [crossing.to for crossing in log.blocking] == ["cpu"]
    assert len(log.to("cuda")) == (1 if heads == 1 else 2)
