"""What a process of training owes the one that started it: to end with it, and to say why it failed.

Imports nothing heavy by itself, see `child`.
"""

import ctypes
import errno
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.training.job.job_files import TrainingFailure

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent ends. The end of stdin covers a parent that ended before."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def explain(error: BaseException) -> "TrainingFailure":
    """An exception as a code and a sentence that says what to do; the traceback is on stderr."""
    from models.errors import ModelError
    from models.runtime import is_out_of_memory
    from models.training.job.job_files import TrainingFailure

    if is_out_of_memory(error):
        advice = "take a smaller batch_size, accumulate instead, a smaller base, or gradient_checkpointing"
        return TrainingFailure(code="out_of_memory", message=f"the trainer ran out of memory; {advice}")
    if ran_out_of_disk(error):
        return TrainingFailure(code="disk_full", message="the disk is full; free some space and start the job again")
    if isinstance(error, ModelError):
        return TrainingFailure(code=error.code, message=str(error), param=getattr(error, "param", None))
    if _has_lost_its_gpu(error):
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        return TrainingFailure(
            code="device_lost",
            message=f"the GPU failed and computes no more for this process ({cause}); the same run goes on from its last "
            "checkpoint in a new process; nvidia-smi and the kernel's log (Xid) say more",
        )
    return TrainingFailure(
        code="internal", message=f"{type(error).__name__} in the trainer; trainer.log in its folder says where"
    )


def _has_lost_its_gpu(error: BaseException) -> bool:
    import torch

    from models.runtime import is_device_lost

    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started and is_device_lost(error, torch.device("cuda", torch.cuda.current_device()))


def ran_out_of_disk(error: BaseException) -> bool:
    """safetensors wraps the system's error into its own, torch into a RuntimeError; both quote it or chain it."""
    return any(
        (isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT)) or "No space left on device" in str(e)
        for e in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
