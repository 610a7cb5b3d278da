import pytest
import torch
from torch import Tensor

from models.training.augment import flips, light


@pytest.fixture
def images() -> Tensor:
    """uint8 (64, 3, 32, 32), channels_last, no two pixels of an image alike in all channels."""
    pixels = torch.arange(64 * 32 * 32 * 3).remainder(251).to(torch.uint8).view(64, 32, 32, 3)
    return pixels.permute(0, 3, 1, 2)


def test_small_sides_do_not_move_but_flip() -> None:
    pixels = torch.arange(2 * 3 * 8 * 8, dtype=torch.uint8).view(2, 3, 8, 8)
    out = light(pixels, torch.tensor([False, True]))
    assert torch.equal(out, torch.stack([pixels[0], pixels[1].flip(2)]))


def test_shape_type_and_memory_stay(images: Tensor) -> None:
    out = light(images, torch.ones(64, dtype=torch.bool))
    assert (out.shape, out.dtype) == (images.shape, torch.uint8)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_the_middle_is_the_image_shifted_by_at_most_a_sixteenth(images: Tensor) -> None:
    out = light(images, torch.zeros(64, dtype=torch.bool))
    shifts = set()
    for image, shifted in zip(images, out, strict=True):
        found = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if torch.equal(shifted[:, 4:28, 4:28], image[:, 4 + dy : 28 + dy, 4 + dx : 28 + dx])
        ]
        assert found
        shifts.update(found)
    assert {dy for dy, _ in shifts} == {dx for _, dx in shifts} == {-2, -1, 0, 1, 2}


def test_every_image_is_mirrored_in_every_second_epoch() -> None:
    first, second, third = (flips(1000, seed=3, epoch=epoch) for epoch in (1, 2, 3))
    assert torch.equal(first, ~second)
    assert torch.equal(first, third)
    assert 400 < first.sum() < 600
