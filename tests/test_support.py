"""The three ways to test a GPU's code without a GPU do what they promise."""

import asyncio
import copy
import time
from pathlib import Path

import pytest
import torch
from support.emulated_arithmetic import computed_in, round_to_tf32, tf32
from support.fake_cuda import CUDA, crossings, fake_cuda
from support.image_files import save, solid
from support.simulated_device import LOST, SimulatedGpu, located, out_of_memory, simulated
from torch import nn

from models import architectures
from models.classifier import Head
from models.runtime.torch_engine import TorchEngine
from models.store.store import ModelStore
from service.inference.engine import Engine
from service.observability.metrics import Metrics
from service.settings import Settings

# fake_cuda


def test_an_operation_that_mixes_devices_raises() -> None:
    with fake_cuda(), pytest.raises(RuntimeError, match="device"):
        torch.ones(2, device=CUDA) + torch.ones(2)


def test_an_operation_that_mixes_dtypes_raises() -> None:
    with fake_cuda(), pytest.raises(RuntimeError, match="dtype"):
        torch.ones(2, 2, device=CUDA, dtype=torch.float16) @ torch.ones(2, 2, device=CUDA)


def test_the_engine_runs_on_the_fake_gpu() -> None:
    with fake_cuda() as gpu, torch.inference_mode():
        engine = TorchEngine(gpu.backbone("lenet5"), CUDA, "float16", "channels_last", 1)
        features = engine(torch.zeros(3, 3, 32, 32, dtype=torch.uint8))
        assert (features.device, features.dtype, engine.dtype) == (CUDA, torch.float32, torch.float16)


@pytest.mark.parametrize(
    ("copies", "blocking"),
    [
        pytest.param(lambda cpu, gpu: cpu.to(CUDA), True, id="pageable"),
        pytest.param(lambda cpu, gpu: cpu.to(CUDA, non_blocking=True), True, id="pageable, non_blocking"),
        pytest.param(lambda cpu, gpu: cpu.pin_memory().to(CUDA), True, id="pinned"),
        pytest.param(lambda cpu, gpu: cpu.pin_memory().to(CUDA, non_blocking=True), False, id="pinned, non_blocking"),
        pytest.param(lambda cpu, gpu: gpu.copy_(cpu), True, id="copy_"),
        pytest.param(lambda cpu, gpu: gpu.copy_(cpu.pin_memory(), non_blocking=True), False, id="copy_, pinned"),
        pytest.param(lambda cpu, gpu: gpu.cpu(), True, id="back"),
        pytest.param(lambda cpu, gpu: gpu[[0, 2]], True, id="index from a list"),
        pytest.param(lambda cpu, gpu: gpu.sum().item(), True, id="item"),
        pytest.param(lambda cpu, gpu: bool((gpu > 0).all()), True, id="bool"),
        pytest.param(lambda cpu, gpu: gpu.tolist(), True, id="tolist"),
    ],
)
@pytest.mark.parametrize("inference", [pytest.param(True, id="inference"), pytest.param(False, id="training")])
def test_a_crossing_is_recorded(copies, blocking: bool, inference: bool) -> None:  # type: ignore[no-untyped-def]
    with fake_cuda(), torch.inference_mode(inference):
        cpu, gpu = torch.zeros(4), torch.zeros(4, device=CUDA)
        with crossings() as log:
            copies(cpu, gpu)
        assert [crossing.blocking for crossing in log.all] == [blocking]


def test_what_stays_on_one_side_is_no_crossing() -> None:
    with fake_cuda(), crossings() as log:
        head = copy.deepcopy(nn.Linear(4, 2)).eval()
        head(torch.ones(1, 4)).softmax(dim=1).tolist()
    assert log.all == []


def test_a_training_step_runs_on_the_fake_gpu() -> None:
    with fake_cuda(), crossings() as log:
        network = nn.Linear(4, 2).to(CUDA)
        log.all.clear()
        network(torch.ones(3, 4, device=CUDA)).sum().backward()
        torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9).step()
        assert network.weight.grad is not None
    assert log.all == []


# simulated_device


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    store = ModelStore(tmp_path / "weights")
    parts = architectures.cut("lenet5", architectures.build("lenet5", 10))
    ref = store.put_backbone("lenet5", parts.backbone, parts.preprocessing)
    store.activate(
        "tiny", store.publish("tiny", [ref], Head.of(parts.layer), [f"class {i}" for i in range(10)]).version
    )
    return store


def engine_over(store: ModelStore, tmp_path: Path) -> Engine:
    return Engine(Settings(weights=store.root, data=tmp_path / "data", timeout_ms=5000), store, Metrics())


async def answered(engine: Engine, count: int) -> list[object]:
    engine.start()
    try:
        await engine.wait_ready(30)
        return await asyncio.gather(
            *(engine.predict([save(solid(), "JPEG")]) for _ in range(count)), return_exceptions=True
        )
    finally:
        engine.close()


async def test_two_simulated_gpus_serve(store: ModelStore, tmp_path: Path) -> None:
    first, second = SimulatedGpu(0, per_image_s=0.01, max_batch=2), SimulatedGpu(1, per_image_s=0.01, max_batch=2)
    with simulated(first, second):
        answers = await answered(engine_over(store, tmp_path), 12)
    assert not [a for a in answers if isinstance(a, Exception)]
    assert first.batches
    assert second.batches


async def test_a_simulated_gpu_sleeps() -> None:
    gpu = SimulatedGpu(base_s=0.05)
    began, spent = time.monotonic(), time.process_time()
    gpu.compute(1)
    assert time.monotonic() - began > 0.04 > time.process_time() - spent


def test_a_sticky_error_loses_the_gpu_and_another_does_not() -> None:
    gpu = SimulatedGpu()
    gpu.fail(1, out_of_memory())
    gpu.fail(2, LOST)
    with pytest.raises(torch.OutOfMemoryError):
        gpu.compute(1)
    with pytest.raises(torch.AcceleratorError):
        gpu.compute(1)
    with simulated(gpu), pytest.raises(torch.AcceleratorError):
        torch.ones(1, device=gpu.device).sum().item()


def test_a_located_tensor_says_where_it_is() -> None:
    gpu = torch.device("cuda", 1)
    features = located(torch.ones(2, 3), gpu)
    assert (features.device, (features * 2).device, features[0].device) == (gpu, gpu, gpu)
    assert features.cpu().device.type == "cpu"


# emulated_arithmetic


def test_tf32_keeps_ten_bits() -> None:
    exact, beyond = 1 + 2**-10, 1 + 2**-12
    assert round_to_tf32(torch.tensor([exact, beyond])).tolist() == [exact, 1.0]


@pytest.mark.parametrize("inference", [pytest.param(True, id="inference"), pytest.param(False, id="training")])
def test_convolutions_and_products_round_under_tf32(inference: bool) -> None:
    torch.manual_seed(0)
    x, layers = torch.rand(2, 3, 8, 8), nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    with torch.inference_mode(inference):
        exact = layers(x)
        with tf32():
            rounded = layers(x)
    difference = float(((exact - rounded).abs().max() / exact.abs().max()).detach())
    assert 1e-6 < difference < 5e-3


def test_an_engine_computes_in_the_emulated_precision(store: ModelStore) -> None:
    classifier = store.load("tiny", 1)
    with computed_in("float16"):
        engine = TorchEngine(classifier.backbones[0], torch.device("cpu"), "float32", "channels_last", 1)
    assert engine.precision == "float16"
