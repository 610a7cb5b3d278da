"""Random changes to a batch of training images that keep what is on them."""

import torch
from torch import Tensor


def light(pixels: Tensor, flip: Tensor) -> Tensor:
    """Mirror the images where `flip` (N,) is true, then shift each by up to a sixteenth of the side, borders reflected.

    uint8 (N, C, H, W) -> the same, in channels_last memory. Uses torch's default generator. A sixteenth and not the usual eighth: in runs
    of some ten epochs a stronger shift costs more than it brings.
    """
    n, _, height, width = pixels.shape
    rows = _mirrored(torch.arange(height) + _shifts(n, height), height)  # (N, H)
    columns = _mirrored(torch.arange(width) + _shifts(n, width), width)  # (N, W)
    columns = torch.where(flip[:, None], width - 1 - columns, columns)
    images = torch.arange(n)[:, None, None]
    return pixels.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # one gather


def flips(images: int, seed: int, epoch: int) -> Tensor:
    """Which of all images are mirrored in this epoch, bool (images,): each in every second epoch, half of them in the first.

    Seeing both sides of every image in any two epochs is worth more than tossing a coin each time (Jordan 2024, airbench).
    """
    first = torch.rand(images, generator=torch.Generator().manual_seed(seed)) < 0.5
    return first ^ (epoch % 2 == 1)


def _shifts(n: int, side: int) -> Tensor:
    reach = side // 16
    return torch.randint(-reach, reach + 1, (n, 1))


def _mirrored(index: Tensor, side: int) -> Tensor:
    """-1 -> 1, side -> side - 2: reflection without repeating the edge."""
    last = side - 1
    return last - (last - index.abs()).abs()
