"""What the benchmarks of the forward pass do on a GPU: devices agree, and batches are as large as a server's."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.fake_cuda import CUDA, FakeGpu, crossings, fake_cuda
from torch import nn

from benchmarks import forward, rig, serve
from models.classifier import Head
from models.runtime import choice
from models.runtime.torch_engine import TorchEngine


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_cuda() as gpu:
        yield gpu


def in_process(gpu: FakeGpu) -> serve.InProcess:
    backbone = gpu.backbone("lenet5")
    engine = TorchEngine(backbone, CUDA, "bfloat16", "channels_last", 1)
    head = gpu.faked(Head.of(nn.Linear(backbone.feature_dim, 10)))
    assert isinstance(head, Head)
    return serve.InProcess(engine, head, backbone.ref.preprocessing, CUDA, decoders=1)


@pytest.mark.system
@pytest.mark.parametrize("count", [1, 256])
def test_the_limit_of_a_server_computes_on_a_gpu(gpu: FakeGpu, count: int) -> None:
    """One copy in, one out; a head that stayed on the CPU raises."""
    limit = in_process(gpu)
    shape = limit.preprocessing
    pixels = [torch.zeros(shape.channels, shape.height, shape.width, dtype=torch.uint8)] * count
    with crossings() as log:
        probabilities = limit.classify(pixels)
    assert (probabilities.device.type, probabilities.shape) == ("cpu", (count, 10))
    assert ([len(log.to("cuda")), len(log.to("cpu"))]) == [1, 1]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_limit_tries_batches_up_to_the_largest_that_a_server_may_choose(kind: str) -> None:
    assert max(serve.BATCHES[kind]) >= choice.LARGEST_BATCH[kind]
    assert rig.CONNECTIONS[kind] >= max(serve.BATCHES[kind])
    assert max(forward.BATCHES["cuda"]) >= choice.LARGEST_BATCH["cuda"]


@pytest.mark.system
def test_every_contender_of_the_forward_benchmark_computes_on_a_gpu(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = gpu.backbone("lenet5")

    def compiled(backbone: Any, device: torch.device, options: Any) -> TorchEngine:
        return TorchEngine(backbone, device, options.precision, "channels_last", 1)

    monkeypatch.setattr(forward, "compile_backbone", compiled)
    contenders = forward.contenders(backbone, CUDA)
    assert contenders.keys() == {"plain torch", "torch float32", "torch bfloat16", "torch float16"}
    pixels = forward.pixels_of(backbone.ref.preprocessing, 4)
    assert {str(run(pixels).device) for run in contenders.values()} == {"cuda:0"}
    cell = forward.Cell("plain torch", 4, contenders["plain torch"])
    with crossings() as log:
        cell.measure(pixels, 0.0)
    assert len(log.to("cpu")) == 2  # the clock starts when the warm-up is done, and stops when the pass is
