"""The batch sizes that a GPU computes: few, because cuDNN plans every layer anew for each size it has not seen.

The plans belong to the thread that made them, so a server warms the steps in the thread that serves.
"""

import torch
from torch import Tensor

BATCH_STEPS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def batch_step(images: int) -> int:
    """The smallest step that holds so many images; beyond the last one, steps double."""
    step = next((step for step in BATCH_STEPS if step >= images), BATCH_STEPS[-1])
    while step < images:
        step *= 2
    return step


def steps_up_to(max_batch: int) -> list[int]:
    """Every size that is computed where at most `max_batch` images travel together; the last one holds them all."""
    steps = [1]
    while steps[-1] < max_batch:
        steps.append(batch_step(steps[-1] + 1))
    return steps


def padded(pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 (N, C, H, W) -> (step, C, H, W) on `device`, in the same memory format: black images fill the batch up.

    Only the N real ones are copied there; from pinned memory the CPU does not wait for it.
    """
    images = len(pixels)
    channels_last = pixels.is_contiguous(memory_format=torch.channels_last)
    rows = torch.empty(
        (batch_step(images), *pixels.shape[1:]),
        dtype=pixels.dtype,
        device=device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    rows[:images].copy_(pixels, non_blocking=True)
    rows[images:].zero_()
    return rows
