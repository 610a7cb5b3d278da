"""Which devices there are, and the allocator."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.fake_driver import Card, with_gpus

from models import runtime
from models.errors import DeviceUnavailable
from models.runtime import device, gpus


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [
        pytest.param("auto", 0, ["cpu"], id="auto-without-gpu"),
        pytest.param("auto", 2, ["cuda:0", "cuda:1"], id="auto-with-gpus"),
        pytest.param("cuda", 2, ["cuda:0", "cuda:1"], id="every-gpu"),
        pytest.param("cuda:1", 2, ["cuda:1"], id="one-gpu"),
        pytest.param("cpu", 2, ["cpu"], id="cpu"),
    ],
)
def test_devices(monkeypatch: pytest.MonkeyPatch, name: str, count: int, expected: list[str]) -> None:
    with_gpus(monkeypatch, *[Card()] * count)
    assert [str(device) for device in runtime.devices(name)] == expected
    assert str(runtime.pick_device(name)) == expected[0]


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        pytest.param("cuda", 0, "device cuda cannot be used: there is no NVIDIA driver; install", id="no-gpu"),
        pytest.param("cuda:0", 0, "device cuda:0 cannot be used: there is no NVIDIA driver", id="no-gpu-0"),
        pytest.param("cuda:2", 2, "there are 2, numbered from 0", id="too-few"),
        pytest.param("tpu", 2, "unknown device 'tpu'", id="unknown"),
        pytest.param("cuda:01", 2, "unknown device 'cuda:01'", id="leading-zero"),
        pytest.param("cuda:99999999999", 2, "unknown device 'cuda:99999999999'", id="too-long"),
        pytest.param("cuda:999", 2, "there are 2, numbered from 0", id="far-too-few"),
        pytest.param("cuda:x", 2, "unknown device 'cuda:x'", id="not-a-number"),
    ],
)
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, name: str, count: int, message: str) -> None:
    with_gpus(monkeypatch, *[Card()] * count)
    with pytest.raises(DeviceUnavailable, match=message):
        runtime.devices(name)


def test_a_trainer_leaves_a_fifth_of_a_gpus_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 80))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: shares.append(given))
    for name in ("cpu", "cuda:1"):
        device.leave_memory(torch.device(name))
    [(share, bounded)] = shares
    assert (share, bounded) == (0.8 * 60 / 80, torch.device("cuda:1"))


def test_a_fall_back_to_the_cpu_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with_gpus(monkeypatch)
    runtime.devices("auto")
    assert "running on the CPU: there is no NVIDIA driver; install" in caplog.text


BROKEN = Card(error=torch.AcceleratorError("CUDA error: out of memory"))


def test_one_unusable_gpu_of_an_automatic_set_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_gpus(monkeypatch, Card(), BROKEN, Card())
    assert [str(device) for device in runtime.devices("auto")] == ["cuda:0", "cuda:2"]
    assert "cuda:1 is not used: no memory is free on cuda:1; end the process" in caplog.text


@pytest.mark.parametrize(("name", "usable"), [("cuda", False), ("cuda:1", False), ("cuda:0", True)])
def test_an_unusable_gpu_that_is_named_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str, usable: bool) -> None:
    with_gpus(monkeypatch, Card(), BROKEN)
    if usable:
        assert [str(device) for device in runtime.devices(name)] == [name]
    else:
        with pytest.raises(DeviceUnavailable, match="no memory is free on cuda:1"):
            runtime.devices(name)


def test_a_gpu_that_is_not_asked_for_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    with_gpus(monkeypatch, Card(), Card())
    monkeypatch.setattr(gpus, "_tried", lambda device: tried.append(str(device)))
    runtime.devices("cuda:1")
    assert tried == ["cuda:1"]


def test_where_every_gpu_is_unusable_the_cpu_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_gpus(monkeypatch, BROKEN, BROKEN)
    assert [str(device) for device in runtime.devices("auto")] == ["cpu"]
    assert caplog.text.count("running on the CPU: no memory is free") == 2


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        pytest.param((6, 1), (), id="pascal"),
        pytest.param((7, 0), ("float16",), id="volta"),
        pytest.param((7, 5), ("float16",), id="turing"),
        pytest.param((8, 0), ("float16", "bfloat16"), id="ampere"),
        pytest.param((12, 0), ("float16", "bfloat16"), id="blackwell"),
    ],
)
def test_a_gpu_computes_16_bits_by_its_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: tuple[str, ...]
) -> None:
    with_gpus(monkeypatch, Card(capability))
    assert device.half_precisions(torch.device("cuda", 0)) == expected


def test_float32_on_a_gpu_is_not_tf32() -> None:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        torch.backends.cuda.matmul.allow_tf32 = True
        device.use_ieee_float32()
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):  # as training does
            pass
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        pytest.param("max 100000", 4, id="none"),
        pytest.param("150000 100000", 2, id="one-and-a-half"),
        pytest.param("900000 100000", 4, id="more-than-there-are"),
    ],
)
def test_a_containers_quota_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, expected: int) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(device, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4))
    assert runtime.cpu_count() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="counts the page faults of glibc's malloc")
def test_a_tuned_allocator_faults_pages_in_once() -> None:
    program = """
import resource, runpy, sys, threading
allocator = runpy.run_path("models/runtime/allocator.py")
if sys.argv[1] == "tuned": allocator["tune_allocator"]()
def fill():
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        memory = bytearray(b"x") * (100 * 2**20)  # over 64 MB, in a thread that would have an arena of its own
        del memory
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=fill)
thread.start(); thread.join()
"""
    root = Path(__file__).parents[1]
    faults = {
        mode: int(subprocess.check_output([sys.executable, "-c", program, mode], cwd=root))
        for mode in ("default", "tuned")
    }
    assert faults["default"] > 20_000
    assert faults["tuned"] < 100
