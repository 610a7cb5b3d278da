"""What an error on a device means: memory, a lost device, or a batch's own fault."""

from typing import Any

import pytest
import torch

from models.runtime import device_works, failures, is_device_lost, is_out_of_memory

CUDA = torch.device("cuda", 0)
GIB = 2**30


class Gpu:
    """A simulated GPU: `errors` are raised by the next computations, the last one for good; `free` bytes of 80 GiB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *errors: Exception, free: int = 40 * GIB) -> None:
        self.errors, self.asked, self.free, real = [*errors], 0, free, torch.ones

        def ones(size: int, device: torch.device) -> torch.Tensor:
            self.asked += 1
            if self.errors:
                raise self.errors[0] if len(self.errors) == 1 else self.errors.pop(0)
            return real(size)

        monkeypatch.setattr(torch, "ones", ones)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, 80 * GIB))


STICKY = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1073741824 bytes."),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1073741824 bytes."),
    RuntimeError("Exception from src/core: std::bad_alloc"),
    MemoryError(),
]
AMBIGUOUS = [
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "GET was unable to find an engine to execute this computation",
    "FIND was unable to find an engine to execute this computation",
    "Unable to find an engine to execute this computation",
]
ITS_OWN = [
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx(...)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("CUDA error: the provided PTX was compiled with an unsupported toolchain."),
    RuntimeError("CUDA driver error: invalid argument"),
    RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    NotImplementedError("Could not run 'aten::x' with arguments from the 'CUDA' backend"),
    torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
    torch.AcceleratorError("CUDA error: invalid argument"),
    torch.AcceleratorError("CUDA error: too many resources requested for launch"),
    ValueError("CUDA error"),
]


def named(error: Any) -> str:
    return str(error)[:60]


@pytest.mark.parametrize("error", MEMORY, ids=named)
def test_memory_is_never_a_lost_device_and_needs_no_question(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    gpu = Gpu(monkeypatch, STICKY)
    assert is_out_of_memory(error)
    assert is_out_of_memory(error, CUDA)
    assert not is_device_lost(error, CUDA)
    assert gpu.asked == 0


@pytest.mark.parametrize("text", AMBIGUOUS)
def test_an_ambiguous_error_is_memory_where_little_is_free(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    gpu = Gpu(monkeypatch)
    assert not is_out_of_memory(RuntimeError(text), CUDA)
    gpu.free = GIB
    assert is_out_of_memory(RuntimeError(text), CUDA)
    assert not is_device_lost(RuntimeError(text), CUDA)


@pytest.mark.parametrize("error", ITS_OWN, ids=named)
def test_an_error_of_a_device_that_works_is_the_batchs_own(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    Gpu(monkeypatch, free=GIB)
    assert not is_out_of_memory(error, CUDA)
    assert not is_device_lost(error, CUDA)


@pytest.mark.parametrize("error", [*map(RuntimeError, AMBIGUOUS), *ITS_OWN[:-1]], ids=named)
def test_any_other_error_is_a_lost_device_where_the_device_fails_too(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    gpu = Gpu(monkeypatch, STICKY)
    assert is_device_lost(error, CUDA)
    assert gpu.asked > 0


def test_an_ordinary_error_asks_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, STICKY)
    assert not is_device_lost(KeyError("layer4"), CUDA)
    assert gpu.asked == 0


@pytest.mark.parametrize("error", MEMORY[:4], ids=named)
def test_a_device_whose_memory_is_full_works(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    Gpu(monkeypatch, error)
    assert device_works(CUDA)


def test_only_an_error_that_stays_is_sticky(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, torch.AcceleratorError("CUDA error: invalid configuration argument"))
    assert not device_works(CUDA)
    gpu.errors.append(torch.OutOfMemoryError("the earlier error is reported once"))
    assert device_works(CUDA)


def test_a_gpu_that_does_not_say_how_much_is_free_is_not_short_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise STICKY

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert not failures.has_little_memory(CUDA)
    assert not failures.has_little_memory(torch.device("cpu"))
