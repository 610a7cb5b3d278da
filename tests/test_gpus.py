"""Why a GPU cannot be used: each cause with its remedy."""

import os
import threading
import warnings
from pathlib import Path

import pytest
import torch
from support.fake_driver import NO_DRIVER, Card, with_gpus, without_gpu

from models.runtime import gpu_problem, gpus

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver."
UNKNOWN = "CUDA unknown error - this may be due to an incorrectly set up environment"
NONE = "No CUDA GPUs are available"
DEVICE_FILES = ("nvidiactl", "nvidia-uvm", "nvidia0")


def machine(folder: Path, driver: str = "570.86.15", files: tuple[str, ...] = DEVICE_FILES) -> Path:
    (folder / "dev").mkdir()
    for name in files:
        (folder / "dev" / name).touch()
    if driver:
        (folder / "version").write_text(
            f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Tue Jan 1\nGCC 12.3.0"
        )
    return folder


def said(problem: gpus.GpuProblem | None) -> tuple[str, str]:
    assert problem is not None
    return problem.code, str(problem)


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_gpu(monkeypatch, "Torch not compiled with CUDA enabled", machine(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", None)
    code, text = said(gpu_problem())
    assert (code, "built without CUDA; install the CUDA build" in text) == ("torch_without_cuda", True)


def test_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_gpu(monkeypatch, NO_DRIVER, machine(tmp_path, driver="", files=()), library=False)
    code, text = said(gpu_problem())
    assert (code, text) == ("no_driver", text)
    assert text.startswith("there is no NVIDIA driver; install one")


def test_a_driver_that_the_container_is_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_gpu(monkeypatch, NO_DRIVER, machine(tmp_path, files=()), library=False)
    code, text = said(gpu_problem())
    assert code == "no_driver"
    assert "driver 570.86.15 is not shown to this process (libnone.so.1 is missing)" in text
    assert "`--gpus all`" in text


@pytest.mark.parametrize(
    ("cuda", "needed"), [("12.8", "525.60 or later"), ("13.2", "580 or later"), ("15.0", "a driver for CUDA 15.0")]
)
def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: str, needed: str) -> None:
    without_gpu(monkeypatch, TOO_OLD, machine(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    code, text = said(gpu_problem())
    assert code == "driver_too_old"
    assert f"the NVIDIA driver 570.86.15 is too old for CUDA {cuda}; install" in text
    assert needed in text


def test_the_warning_of_is_available_counts_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_gpu(monkeypatch, NONE, machine(tmp_path))

    def is_available() -> bool:
        warnings.warn(f"CUDA initialization: {TOO_OLD}", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    assert said(gpu_problem())[0] == "driver_too_old"


def test_a_gpu_that_says_nothing_of_itself_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, Card())

    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: unknown error")

    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    assert said(gpu_problem())[0] == "gpu_broken"


@pytest.mark.parametrize(
    ("value", "cause"),
    [("", "hides every GPU"), ("-1", "hides every GPU"), ("7", "names no GPU"), ("GPU-1234", "names no GPU")],
)
def test_cuda_visible_devices_hides_the_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str, cause: str
) -> None:
    without_gpu(monkeypatch, NONE, machine(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    code, text = said(gpu_problem())
    assert code == "gpu_hidden"
    assert f"CUDA_VISIBLE_DEVICES={value!r} {cause}" in text


@pytest.mark.parametrize("closed", DEVICE_FILES)
def test_no_permission(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, closed: str) -> None:
    without_gpu(monkeypatch, UNKNOWN, machine(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != closed)  # root may open everything
    code, text = said(gpu_problem())
    assert code == "no_permission"
    assert f"no permission to open {tmp_path / 'dev' / closed}; add the user to the group" in text


def test_a_device_file_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_gpu(monkeypatch, UNKNOWN, machine(tmp_path, files=("nvidiactl", "nvidia0")))
    code, text = said(gpu_problem())
    assert (code, "nvidia-uvm is missing; run `nvidia-modprobe" in text) == ("no_driver", True)


def test_an_unknown_cause_quotes_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_gpu(monkeypatch, UNKNOWN, machine(tmp_path))
    code, text = said(gpu_problem())
    assert (code, UNKNOWN in text) == ("gpu_broken", True)


@pytest.mark.parametrize(
    ("capability", "carried", "runs"),
    [
        pytest.param((7, 0), ("sm_75", "sm_80"), False, id="volta"),
        pytest.param((6, 1), ("sm_75", "sm_80"), False, id="pascal"),
        pytest.param((7, 5), ("sm_75", "sm_80"), True, id="turing"),
        pytest.param((8, 9), ("sm_75", "sm_86"), True, id="a-later-minor"),
        pytest.param((9, 0), ("sm_80", "sm_86"), False, id="a-later-major"),
        pytest.param((12, 1), ("sm_80", "sm_120"), True, id="two-digits"),
        pytest.param((9, 0), ("sm_90a",), True, id="exactly-this-one"),
        pytest.param((10, 3), ("sm_100a",), False, id="not-exactly-this-one"),
        pytest.param((10, 3), ("sm_100f",), True, id="its-family"),
        pytest.param((12, 0), ("sm_80", "compute_90"), True, id="ptx"),
        pytest.param((8, 0), ("compute_90",), False, id="later-ptx"),
        pytest.param((9, 0), (), True, id="unknown-kernels"),
        pytest.param((9, 4), ("gfx942",), True, id="another-maker"),
    ],
)
def test_a_card_runs_the_kernels_that_torch_carries(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], carried: tuple[str, ...], runs: bool
) -> None:
    with_gpus(monkeypatch, Card(capability), carried=carried)
    assert (gpu_problem() is None) is runs


def test_a_card_that_is_too_old_is_named_with_the_kernels_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, Card((7, 0)))
    code, text = said(gpu_problem())
    assert code == "card_too_old"
    assert "cuda:0 (Tesla T1000, sm_70) is too old" in text
    assert "has kernels for sm_75, sm_80, sm_86, sm_90, sm_100, sm_120; use" in text


@pytest.mark.parametrize(
    ("error", "code", "remedy"),
    [
        pytest.param("CUDA error: out of memory", "no_memory", "nvidia-smi", id="context"),
        pytest.param("CUDA error: CUDA-capable device(s) is/are busy or unavailable", "gpu_busy", "DEFAULT", id="busy"),
        pytest.param("CUDA error: no kernel image is available", "card_too_old", "another GPU", id="kernel"),
        pytest.param("CUDA error: uncorrectable ECC error encountered", "gpu_broken", "dmesg", id="broken"),
    ],
)
def test_a_gpu_that_does_not_compute(monkeypatch: pytest.MonkeyPatch, error: str, code: str, remedy: str) -> None:
    with_gpus(monkeypatch, Card(error=torch.AcceleratorError(f"{error}\nCUDA kernel errors might be reported later")))
    found, text = said(gpu_problem())
    assert (found, remedy in text, "\n" in text) == (code, True, False)


def test_one_gpu_that_works_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, Card((6, 1)), Card())
    assert gpu_problem() is None
    usable, problems = gpus.gpus()
    assert ([str(device) for device in usable], [*problems]) == (["cuda:1"], ["cuda:0"])


def test_a_driver_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    with_gpus(monkeypatch, Card())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: release.wait(30))
    monkeypatch.setattr(gpus, "ANSWER_S", 0.05)
    code, text = said(gpu_problem())
    release.set()
    assert (code, "the NVIDIA driver does not answer" in text) == ("no_answer", True)


def test_a_gpu_that_hangs_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    with_gpus(monkeypatch, Card(), Card())
    monkeypatch.setattr(gpus, "_tried", lambda device: release.wait(30) if device.index == 0 else None)
    monkeypatch.setattr(gpus, "ANSWER_S", 0.05)
    usable, problems = gpus.gpus()
    release.set()
    assert [str(device) for device in usable] == ["cuda:1"]
    assert problems["cuda:0"].code == "no_answer"
