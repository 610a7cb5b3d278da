"""Batch sizes that a GPU computes. There are few, because cuDNN plans every layer anew for each new size.

The plans belong to the thread that made them, so a server warms up all sizes in the thread that serves.
"""

import torch
from torch import Tensor

BATCH_STEPS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


def batch_step(images: int) -> int:
    """Return the smallest step that holds so many images; beyond the last one, steps double."""
    step = next((step for step in BATCH_STEPS if step >= images), BATCH_STEPS[-1])
    while step < images:
        step *= 2
    return step


def steps_up_to(max_batch: int) -> list[int]:
    """Return every size that is computed for batches of at most `max_batch` images, up to the one that holds them all."""
    steps = [1]
    while steps[-1] < max_batch:
        steps.append(batch_step(steps[-1] + 1))
    return steps


def padded(pixels: Tensor, device: torch.device) -> Tensor:
    """Return uint8 (N, C, H, W) as (step, C, H, W) on `device`, in the same memory format, filled up with black images.

    Only the N real images are copied; the CPU does not wait for a copy from pinned memory.
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
