"""The part of the GPU check that runs on a GPU alone, on pretended and simulated GPUs."""

import contextlib
import json
import os
import subprocess
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from support.fake_cuda import CUDA, FakeGpu, fake_cuda
from support.simulated_device import LOST, SimulatedGpu, SimulatedRuntime, out_of_memory, simulated

from models.errors import OutOfMemory
from models.runtime.torch_engine import TorchEngine
from service.diagnostics.gpu_check import errors, facts, server
from service.diagnostics.gpu_check.measures import batches, graphs, memory, own_tests, serving, transfers
from service.diagnostics.gpu_check.session import Session, random_pixels
from service.inference.results import PartFunction


def on_gpu(folder: Path) -> Session:
    return Session(CUDA, folder)


@contextlib.contextmanager
def more_of_torch_cuda(**answers: Any) -> Iterator[dict[str, mock.Mock]]:
    """Functions of torch.cuda that neither fixture answers, with the signatures of the real ones."""
    fakes = {}
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            fakes[name] = mock.create_autospec(getattr(torch.cuda, name), **answer)
            stack.enter_context(mock.patch.object(torch.cuda, name, fakes[name]))
        yield fakes


# facts


def test_facts_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, f"NVIDIA H200, 580.65.06{', x' * 6}")
    properties = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(facts, "gpu_problem", lambda: None)
    with fake_cuda(free=100 * 2**30), more_of_torch_cuda(get_device_properties={"return_value": properties}):
        measured = facts.facts(on_gpu(tmp_path))
    assert measured.problems == ()
    assert (measured.figures["gpu"], measured.figures["driver"]) == ("Fake GPU", "580.65.06")
    assert "-i 00000000:1b:00.0" in (tmp_path / "asked").read_text()


def test_a_full_gpu_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "gpu_problem", lambda: None)
    monkeypatch.setattr(facts, "nvidia_smi", lambda device, columns: {})
    with fake_cuda(free=2**30):
        measured = facts.facts(on_gpu(tmp_path))
    assert "1.0 GB are free" in measured.problems[0]


def test_an_exclusive_gpu_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "gpu_problem", lambda: None)
    monkeypatch.setattr(facts, "nvidia_smi", lambda device, columns: {"compute_mode": "Exclusive_Process"})
    with fake_cuda():
        measured = facts.facts(on_gpu(tmp_path))
    assert "nvidia-smi -c DEFAULT" in measured.problems[0]


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, says: str, again: str = "") -> None:
    """A tool of that name, first in PATH, which notes what it is asked for."""
    tool = folder / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\necho "{says}"\n{again}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")


# transfers


class CudaRuntime:
    """As torch._C._cudart: two functions that take numbers."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.registered = code, list[int]()

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        self.registered.append(size)
        return self.code

    def cudaHostUnregister(self, pointer: int) -> int:
        return 0


def test_transfers_from_three_kinds_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "BATCH_BYTES", 2 * transfers.ONE_BYTES)
    runtime = CudaRuntime()
    with fake_cuda(), more_of_torch_cuda(cudart={"return_value": runtime}), pointers():
        measured = transfers.transfers(on_gpu(tmp_path))
    assert runtime.registered == [2 * transfers.ONE_BYTES]
    assert {"pageable_gb_s", "pinned_gb_s", "registered_gb_s", "one_image_us", "features_back_ms"} <= set(
        measured.figures
    )


def test_memory_that_cuda_does_not_register_is_an_error() -> None:
    with fake_cuda(), more_of_torch_cuda(cudart={"return_value": CudaRuntime(code=1)}), pointers():  # noqa: SIM117
        with pytest.raises(RuntimeError, match="cudaHostRegister answers 1"), transfers.registered(4096):
            pass


@contextlib.contextmanager
def pointers() -> Iterator[None]:
    """Fake tensors have none."""
    with mock.patch.object(torch.Tensor, "data_ptr", return_value=4096):
        yield


# errors


def test_an_error_that_loses_the_gpu_is_told_apart() -> None:
    gpu = SimulatedGpu()
    gpu.fail(at=1, error=LOST)
    with simulated(gpu):
        seen = errors.observe(Session(gpu.device, Path()), errors.Case(lambda device: gpu.compute(1), lost=True))
    assert (seen["lost"], seen["works"], seen["out_of_memory"]) == (True, False, False)
    assert errors.difference(errors.Case(lambda device: None, lost=True), seen) == ""
    assert errors.difference(errors.Case(lambda device: None), seen) == "lost is True, works is False"


def test_an_error_of_one_batch_leaves_the_gpu() -> None:
    gpu = SimulatedGpu()
    gpu.fail(at=1, error="CUDA error: invalid argument")
    with simulated(gpu):
        seen = errors.observe(Session(gpu.device, Path()), errors.Case(lambda device: gpu.compute(1)))
    assert errors.difference(errors.Case(lambda device: None), seen) == ""


@pytest.mark.parametrize(
    ("output", "said"),
    [
        pytest.param("noise\n" + json.dumps({"raised": True}), None, id="an answer"),
        pytest.param("Segmentation fault", "exit code 7: torch broke", id="no answer"),
        pytest.param("", "exit code 7: torch broke", id="nothing"),
    ],
)
def test_a_case_in_a_process_of_its_own(
    output: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], 7, output, "torch broke")
    monkeypatch.setattr(subprocess, "run", mock.create_autospec(subprocess.run, return_value=done))
    assert errors.elsewhere(Session(torch.device("cpu"), tmp_path), "assertion in a kernel").get("wrong") == said


# batches


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGpu]:
    gpu = SimulatedGpu(max_batch=256)
    backbone = SimpleNamespace(feature_dim=8, ref=SimpleNamespace(preprocessing=SimpleNamespace(height=4)))
    for module in (batches, memory):
        monkeypatch.setattr(module, "random_backbone", lambda name: backbone)
    monkeypatch.setattr(batches, "compile_backbone", lambda *given: SimulatedRuntime(gpu, 8))
    with simulated(gpu):
        yield gpu


LIMITS: dict[str, dict[str, Any]] = {"memory_reserved": {"return_value": 0}, "set_per_process_memory_fraction": {}}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("per_head", "problems"), [pytest.param(False, 0, id="one wait a batch"), pytest.param(True, 1, id="one a head")]
)
def test_waits_of_a_batch_are_counted(per_head: bool, problems: int, tmp_path: Path) -> None:
    """A runtime that waits once per batch, and heads that wait each, as torch's detector reports it."""
    real_head = batches._head

    def wait() -> None:
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=2)

    def head(session: Session, width: int) -> PartFunction:
        part = real_head(session, width)

        def waiting(features: torch.Tensor) -> torch.Tensor:
            if per_head:
                wait()
            return part(features)

        return waiting

    def compute(runtime: SimulatedRuntime, pixels: torch.Tensor) -> torch.Tensor:
        wait()
        return call(runtime, pixels)

    call = SimulatedRuntime.__call__
    with (
        more_of_torch_cuda(set_sync_debug_mode={}) as fakes,
        mock.patch.object(SimulatedRuntime, "__call__", compute),
        mock.patch.object(batches, "_head", head),
        mock.patch.object(batches, "IMAGES", 8),
    ):
        measured = batches.heads(on_gpu(tmp_path))
    assert measured.figures["1"]["waits"] == (2.0 if per_head else 1.0)
    assert len(measured.problems) == problems
    assert [call.args for call in fakes["set_sync_debug_mode"].mock_calls] == [("warn",), ("default",)] * 3


def test_images_without_memory_are_answered(gpu: SimulatedGpu, tmp_path: Path) -> None:
    gpu.fail(at=1, error=out_of_memory())
    with more_of_torch_cuda(**LIMITS):
        measured = batches.out_of_memory_serving(on_gpu(tmp_path))
    assert measured.problems == ()
    assert (measured.figures["answered"], measured.figures["largest_batch"]) == (256, 128)


def test_a_lost_gpu_is_no_lack_of_memory(gpu: SimulatedGpu, tmp_path: Path) -> None:
    gpu.fail(at=1, error=LOST)
    with more_of_torch_cuda(**LIMITS):
        measured = batches.out_of_memory_serving(on_gpu(tmp_path))
    assert measured.problems[-1] == "the GPU counts as lost"


# memory


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("error", "problems"),
    [
        pytest.param(OutOfMemory("vgg13 needs 300 MB of GPU memory; 20 MB are free"), 0, id="clear"),
        pytest.param(torch.OutOfMemoryError("CUDA out of memory"), 3, id="torch's own"),
        pytest.param(KeyError(1), 3, id="a bug"),
    ],
)
def test_a_load_without_memory_has_to_say_so(error: Exception, problems: int, tmp_path: Path) -> None:
    loaded = SimpleNamespace(info=SimpleNamespace(precision="float16", max_batch=256))
    outcomes = mock.Mock(side_effect=[error, error, error, loaded])
    with more_of_torch_cuda(**LIMITS) as fakes, mock.patch.object(memory, "compile_backbone", outcomes):
        measured = memory.out_of_memory_loading(on_gpu(tmp_path))
    assert len(measured.problems) == problems
    assert measured.figures["all"]["loaded"] == "float16"
    shares = [call.args[0] for call in fakes["set_per_process_memory_fraction"].mock_calls]
    assert shares == [pytest.approx(mb / 80 / 1024) for mb in memory.LIMITS_MB] + [1.0]


def test_nothing_may_be_remembered_after_a_failed_load() -> None:
    failed = {"error": "OutOfMemory", "clear": True, "message": "not enough memory", "remembered": 1}
    measured = memory.judged({"20_mb": failed, "all": {"loaded": "float16", "remembered": 1}})
    assert measured.problems == ("with 20_mb: a choice was remembered although the load failed",)


# graphs


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """With graphs whose capture runs the pass."""
    with (
        fake_cuda() as gpu,
        more_of_torch_cuda(graph={}, CUDAGraph={}, graph_pool_handle={"return_value": (0, 1)}) as fakes,
    ):
        gpu.captures = fakes["graph"]  # type: ignore[attr-defined]
        yield gpu


def test_a_pass_is_captured_on_a_stream_of_its_own(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    backbone = fake_gpu.backbone("lenet5")
    engine = TorchEngine(backbone, CUDA, "float16", "channels_last", 1)
    captured = graphs.capture(on_gpu(tmp_path), engine, random_pixels(4, backbone).to(CUDA), (0, 1))
    assert (captured.features.shape, captured.features.device) == ((4, 84), CUDA)
    [call] = fake_gpu.captures.mock_calls[:1]  # type: ignore[attr-defined]
    assert (call.kwargs["capture_error_mode"], call.kwargs["pool"]) == ("thread_local", (0, 1))


def test_graphs_are_captured_while_another_thread_serves(
    fake_gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the check in this thread, since fake tensors belong to it: the one that serves is left out."""
    backbone, idle = fake_gpu.backbone("lenet5"), SimpleNamespace(count=8, failures=[])
    monkeypatch.setattr(graphs, "random_backbone", lambda name: backbone)
    monkeypatch.setattr(graphs, "_serving", lambda session: contextlib.nullcontext(idle))
    monkeypatch.setattr(graphs, "relative_difference", lambda found, expected: 0.0)
    measured = graphs.graphs(on_gpu(tmp_path))
    assert list(measured.figures["sizes"]) == [str(size) for size in graphs.SIZES]
    assert "batches_served_meanwhile" in measured.figures


def test_the_thread_that_serves_stops_at_its_first_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(pixels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "random_backbone", lambda name: None)
    monkeypatch.setattr(graphs, "_engine", lambda session, backbone: fail)
    monkeypatch.setattr(graphs, "random_pixels", lambda size, backbone: torch.zeros(size))
    with graphs._serving(on_gpu(tmp_path)) as served:
        while not served.failures:
            threading.Event().wait(0.01)
    assert "stream is capturing" in served.failures[0]


def test_graphs_beside_python(fake_gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = fake_gpu.backbone("lenet5")
    monkeypatch.setattr(graphs, "random_backbone", lambda name: backbone)
    figures = graphs.beside_python(on_gpu(tmp_path)).figures
    assert set(figures["4_threads"]) == {"eager", "graph"}
    assert set(figures["waiting_cpu_share"]) == {"cpu", "event"}


# The GPU beside a server


def test_utilisation_is_sampled_until_the_block_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "37, 1024", again='echo "[N/A], 1"; echo "41, 2048"; exec sleep 60')
    monkeypatch.setattr(server, "pci_address", lambda device: "0:1:0.0")
    with server.watched(on_gpu(tmp_path)) as utilisation:
        while not (tmp_path / "asked").exists():
            threading.Event().wait(0.01)
        threading.Event().wait(0.2)
    assert utilisation.figures() == {"gpu_percent": 39, "gpu_memory_peak_mb": 2048}
    assert "-lms 200" in (tmp_path / "asked").read_text()


def test_without_nvidia_smi_there_is_no_utilisation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(server, "pci_address", lambda device: "0:1:0.0")
    with server.watched(on_gpu(tmp_path)) as utilisation:
        pass
    assert utilisation.figures() == {"gpu_percent": None, "gpu_memory_peak_mb": None}


def test_memory_is_that_of_all_processes(tmp_path: Path) -> None:
    gpu = SimulatedGpu(memory=8 * 2**30)
    gpu.free = 6 * 2**30
    with simulated(gpu):
        assert serving.memory_mb(on_gpu(tmp_path)) == 2048


# The project's own tests


@pytest.mark.parametrize(
    ("code", "output", "problems"),
    [
        pytest.param(0, "3 passed in 20 s", (), id="passed"),
        pytest.param(
            1,
            "FAILED tests/test_a.py::test_b - boom\n1 failed",
            ("tests/test_a.py::test_b - boom",),
            id="failed",
        ),
        pytest.param(2, "usage error", ("pytest ends with 2: usage error",), id="broken"),
        pytest.param(5, "", ("pytest ends with 5: no output",), id="no tests"),
    ],
)
def test_the_projects_own_tests(code: int, output: str, problems: tuple[str, ...]) -> None:
    assert own_tests.judged(code, output).problems == problems
