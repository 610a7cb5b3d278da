"""A backbone is compiled for a GPU that computes on the CPU and raises what a test asks for: precision, memory, streams."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_cuda import CUDA
from test_runtime import make_backbone, make_pixels
from torch import Tensor

from models.classifier import Backbone
from models.errors import OutOfMemory
from models.runtime import Options, RuntimeInfo, choice, compile_backbone, compiler, failures, footprint
from models.runtime.torch_engine import TorchEngine

CPU = torch.device("cpu")
MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
KERNEL = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx(...)`")
LOST = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


class Gpu:
    """`errors`: by precision and call (0: the construction), raised by engines; from a negative call on, all raise.

    `change`: what a precision does to features. `seconds`: of a batch, by precision. `calls`: what was asked of torch.cuda.
    """

    def __init__(self) -> None:
        self.errors: dict[tuple[str, int], Exception] = {}
        self.largest: int | None = None  # images that fit into memory
        self.change: dict[str, Callable[[Tensor], Tensor]] = {}
        self.seconds: dict[str, float] = {}
        self.capability = (9, 0)
        self.works = True
        self.calls: list[str] = []
        self.built: list[str] = []


class GpuEngine(TorchEngine):
    """Computes on the CPU in float32, and says it is on the GPU."""

    gpu: Gpu

    def __init__(self, backbone: Backbone, device: torch.device, precision: Any, *rest: Any) -> None:
        self.gpu.built.append(precision)
        self.count, self.precision = -1, precision
        self.fail(1)
        super().__init__(backbone, CPU, "float32", *rest)
        self.device, self.precision = CUDA, precision

    def fail(self, images: int) -> None:
        self.count += 1
        for (precision, at), error in self.gpu.errors.items():
            if precision == self.precision and (at == self.count or -self.count <= at < 0):
                raise error
        if self.gpu.largest is not None and images > self.gpu.largest:
            raise MEMORY

    def __call__(self, pixels: Tensor) -> Tensor:
        self.fail(len(pixels))
        self.device = CPU
        features: Tensor = super().__call__(pixels)
        self.device = CUDA
        change = self.gpu.change.get(self.precision)
        return features if change is None else change(features)


class FakeStream:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def synchronize(self) -> None:
        self.gpu.calls.append("stream.synchronize")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()

    def seconds_of(engine: GpuEngine, device: torch.device, pixels: Tensor) -> float:
        engine(pixels)
        usual = 0.004 if engine.precision == "float32" else 0.001
        return gpu.seconds.get(engine.precision, usual) * (1 + len(pixels) / 8)

    @contextlib.contextmanager
    def stream(_stream: FakeStream) -> Iterator[None]:
        gpu.calls.append("stream entered")
        yield
        gpu.calls.append("stream left")

    monkeypatch.setattr(GpuEngine, "gpu", gpu, raising=False)
    monkeypatch.setattr(compiler, "TorchEngine", GpuEngine)
    monkeypatch.setattr(choice, "LARGEST_BATCH", {"cuda": 16})
    monkeypatch.setattr(choice, "seconds_of", seconds_of)
    monkeypatch.setattr(choice, "machine_is_busy", lambda: False)
    monkeypatch.setattr(failures, "device_works", lambda device: gpu.works)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300 * 2**20, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(gpu))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(gpu))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    for name in ("empty_cache", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name: gpu.calls.append(name))
    return gpu


def compiled(**options: Any) -> RuntimeInfo:
    return compile_backbone(make_backbone(), CUDA, Options(threads=1, **options)).info


def errors_of(info: RuntimeInfo) -> dict[str, str | None]:
    return {candidate.precision: candidate.error for candidate in info.candidates}


def off_by(share: float) -> Callable[[Tensor], Tensor]:
    return lambda features: features + share * features.abs().max()


# Precision


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        pytest.param({}, "float16", id="equal"),
        pytest.param({"bfloat16": 0.00097}, "float16", id="within-the-noise"),
        pytest.param({"bfloat16": 0.0009}, "bfloat16", id="bfloat16-faster"),
        pytest.param({"bfloat16": 0.002}, "float16", id="bfloat16-slower"),
        pytest.param({"float32": 0.001}, "float32", id="float32-as-fast"),
    ],
)
def test_the_fastest_precision_is_taken_and_the_most_exact_of_equals(
    gpu: Gpu, seconds: dict[str, float], chosen: str
) -> None:
    gpu.seconds = seconds
    info = compiled()
    assert (info.precision, info.float32) == (chosen, "ieee")
    assert errors_of(info) == {"float16": None, "bfloat16": None, "float32": None}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(lambda features: features * float("inf"), "are not finite numbers", id="overflow"),
        pytest.param(lambda features: torch.full_like(features, float("nan")), "are not finite numbers", id="nan"),
        pytest.param(off_by(0.03), "differs from float32 by 0.03 of the largest feature; the limit is 0.02", id="off"),
        pytest.param(lambda features: features * 0, "differs from float32 by 1", id="underflow"),
    ],
)
def test_a_network_that_float16_cannot_hold_runs_in_bfloat16(
    gpu: Gpu, change: Callable[[Tensor], Tensor], reason: str
) -> None:
    gpu.change["float16"] = change
    info = compiled()
    assert info.precision == "bfloat16"
    assert reason in str(errors_of(info)["float16"])


def test_float32_is_the_last_resort(gpu: Gpu) -> None:
    gpu.change = {"float16": off_by(0.5), "bfloat16": off_by(0.5)}
    info = compiled()
    assert info.precision == "float32"
    assert [precision for precision, error in errors_of(info).items() if error is None] == ["float32"]
    assert info.agreement.max_difference < 1e-3


@pytest.mark.parametrize(
    ("capability", "built"), [((7, 5), ["float16"]), ((6, 1), []), ((8, 9), ["float16", "bfloat16"])]
)
def test_what_a_gpu_does_not_compute_is_not_tried(gpu: Gpu, capability: tuple[int, int], built: list[str]) -> None:
    gpu.capability = capability
    compiled()
    assert gpu.built == [*built, "float32"]


def test_a_forced_precision_is_the_only_one(gpu: Gpu) -> None:
    assert compiled(precision="bfloat16").precision == "bfloat16"
    assert gpu.built == ["bfloat16"]


def test_a_choice_on_disk_that_does_not_do_for_other_weights_gives_way(gpu: Gpu, tmp_path: Path) -> None:
    assert compiled(cache_dir=tmp_path).precision == "float16"
    gpu.change["float16"] = lambda features: features * float("nan")
    info = compiled(cache_dir=tmp_path)
    assert (info.source, info.precision) == ("cached", "bfloat16")
    assert "not finite" in str(errors_of(info)["float16"])


# Errors


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_kernel_that_does_not_know_the_network_gives_way_to_the_next_plan(gpu: Gpu, at: int) -> None:
    gpu.errors = {("float16", at): KERNEL}
    info = compiled()
    assert info.precision == "bfloat16"
    assert "CUBLAS_STATUS_NOT_SUPPORTED" in str(errors_of(info)["float16"])


def test_a_kernel_that_fails_while_it_is_measured_gives_way_too(gpu: Gpu) -> None:
    gpu.errors = {("float16", 3): KERNEL}
    info = compiled()
    assert info.precision == "bfloat16"
    assert "1 images: RuntimeError: CUDA error" in str(errors_of(info)["float16"])


@pytest.mark.parametrize("at", range(5))
def test_a_lost_device_ends_the_load(gpu: Gpu, at: int) -> None:
    gpu.errors, gpu.works = {("float16", at): LOST}, False
    with pytest.raises(torch.AcceleratorError):
        compiled()
    assert gpu.built == ["float16"] or at > 2  # from the third on it is measured, beside the others


# Memory


@pytest.mark.parametrize(
    "error",
    [MEMORY, RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED"), RuntimeError("CUDNN_STATUS_ALLOC_FAILED")],
)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_memory_that_runs_out_names_what_is_needed_and_free(
    gpu: Gpu, tmp_path: Path, at: int, error: Exception
) -> None:
    gpu.errors = {("float16", at): error}
    with pytest.raises(
        OutOfMemory, match=r"about \d+ MB in float16 .* GPU memory, and 300 MB of 81920 MB are free; end"
    ):
        compiled(cache_dir=tmp_path)
    assert gpu.built == ["float16"]  # no other precision, which needs as much or twice as much
    assert not (tmp_path / "engines").exists()
    assert gpu.calls[-1] == "empty_cache"


@pytest.mark.parametrize("at", [0, 1, 2])
def test_memory_that_runs_out_beside_an_engine_that_fits(gpu: Gpu, tmp_path: Path, at: int) -> None:
    gpu.errors = {("float32", at): MEMORY}
    info = compiled(cache_dir=tmp_path)
    assert info.precision == "float16"
    assert "out of memory" in str(errors_of(info)["float32"])
    assert not (tmp_path / "engines").exists()


def test_the_machines_own_memory_is_not_the_gpus(gpu: Gpu) -> None:
    gpu.errors = {("float16", 0): RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")}
    with pytest.raises(OutOfMemory, match="does not fit into this machine's memory"):
        compiled()


def test_the_memory_needed_is_weights_and_the_largest_layer() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    shape = make_backbone().ref.preprocessing
    assert footprint.activations(network, shape) == 2 * (2 * 64 * 16 * 16)  # the ReLU's input and output


@pytest.mark.parametrize("at", [3, 4, -3])
def test_memory_for_one_image_that_runs_out_while_measuring(gpu: Gpu, tmp_path: Path, at: int) -> None:
    gpu.errors = {(precision, at): MEMORY for precision in ("float16", "bfloat16", "float32")}
    with pytest.raises(OutOfMemory, match="GPU memory"):
        compiled(cache_dir=tmp_path)
    assert not (tmp_path / "engines").exists()


def test_a_batch_that_does_not_fit_is_not_recommended_and_nothing_remembered(gpu: Gpu, tmp_path: Path) -> None:
    def limited(engine: GpuEngine, device: torch.device, pixels: Tensor) -> float:
        gpu.largest = 4  # from the measurement on
        return float(engine(pixels) is None) + 0.0001

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "seconds_of", limited)
        info = compiled(cache_dir=tmp_path)
    assert (info.max_batch, info.source) == (4, "measured")
    assert [max(candidate.rates) for candidate in info.candidates] == [4, 4, 4]
    assert not (tmp_path / "engines").exists()


def test_memory_that_runs_out_with_a_choice_on_disk(gpu: Gpu, tmp_path: Path) -> None:
    compiled(cache_dir=tmp_path)
    gpu.errors = {("float16", 1): MEMORY}
    with pytest.raises(OutOfMemory):
        compiled(cache_dir=tmp_path)
    gpu.errors = {}
    assert compiled(cache_dir=tmp_path).precision == "float16"


def test_on_a_cpu_the_other_engine_may_want_less_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: object) -> None:
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(compiler, "openvino_version", lambda: "2026")
    monkeypatch.setattr(compiler, "OpenVinoEngine", fail)
    info = compile_backbone(make_backbone(), CPU, Options(threads=1, precision="float32", cache_dir=tmp_path)).info
    assert info.engine == "torch"
    assert not (tmp_path / "engines").exists()
    monkeypatch.setattr(compiler, "TorchEngine", fail)
    with pytest.raises(OutOfMemory, match=r"needs about \d MB in float32 .*; free memory"):
        compile_backbone(make_backbone(), CPU, Options(threads=1, precision="float32"))


# Streams


def test_loading_has_a_stream_of_its_own(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    real = choice.seconds_of
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(gpu))
    gpu.calls = calls
    real(lambda pixels: calls.append("pass") or pixels, CUDA, make_pixels(1))  # type: ignore[func-returns-value]
    assert calls == ["stream.synchronize", "pass", "stream.synchronize"]


def test_nothing_waits_for_the_whole_device(gpu: Gpu) -> None:
    compiled()
    assert gpu.calls[0] == "stream entered"
    assert gpu.calls[-2:] == ["stream left", "stream.synchronize"]
    assert "synchronize" not in gpu.calls


@pytest.mark.parametrize("serving", [True, False])
def test_freed_memory_is_left_alone_while_the_gpu_serves(gpu: Gpu, serving: bool) -> None:
    compile_backbone(make_backbone(), CUDA, Options(threads=1), is_serving=lambda: serving)
    assert ("empty_cache" in gpu.calls) is not serving


def test_a_measurement_that_hangs_on_another_gpu_does_not_hold_up_this_one(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "OTHER_MEASUREMENT_S", 0.05, raising=False)
    loaded: list[RuntimeInfo] = []
    thread = threading.Thread(target=lambda: loaded.append(compiled()), daemon=True)
    with compiler._measuring:
        thread.start()
        thread.join(10)
        assert len(loaded) == 1
    assert compiler._measuring.acquire(timeout=1)
    compiler._measuring.release()


@pytest.mark.system
def test_what_was_measured_beside_serving_is_measured_again(gpu: Gpu, tmp_path: Path) -> None:
    options = Options(threads=1, cache_dir=tmp_path)
    for serving, source in [(True, "measured"), (True, "cached"), (False, "measured"), (False, "cached")]:
        info = compile_backbone(make_backbone(), CUDA, options, is_serving=lambda answer=serving: answer).info  # type: ignore[misc]
        assert info.source == source


def test_one_batch_of_another_model_does_not_count(gpu: Gpu, tmp_path: Path) -> None:
    serving, options = iter([False, False, True]), Options(threads=1, cache_dir=tmp_path)
    compile_backbone(make_backbone(), CUDA, options, is_serving=lambda: next(serving, False))
    assert compile_backbone(make_backbone(), CUDA, options).info.source == "cached"
