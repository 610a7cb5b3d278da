import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.training_data import settings
from torch import Tensor

from models.training.network.augment import (
    augment,
    augmented_copy,
    flip,
    flips,
    jitter,
    light,
    mix,
    random_crops,
    warp,
    whole,
)

YES, NO = torch.tensor([True] * 4), torch.tensor([False] * 4)
PRESETS = ["none", "light", "standard", "trivial", "randaugment"]


@pytest.fixture
def images() -> Tensor:
    """uint8 (64, 3, 32, 32), channels_last, no two pixels of an image alike in all channels."""
    pixels = torch.arange(64 * 32 * 32 * 3).remainder(251).to(torch.uint8).view(64, 32, 32, 3)
    return pixels.permute(0, 3, 1, 2)


def seeded(change: Callable[[], Tensor], seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return change()


# Light


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


# Resampling


@pytest.mark.parametrize(
    ("degrees", "mirrored", "upside_down", "expected"),
    [
        pytest.param(0.0, NO, NO, lambda x: x, id="nothing"),
        pytest.param(0.0, YES, NO, lambda x: x.flip(3), id="mirrored"),
        pytest.param(0.0, NO, YES, lambda x: x.flip(2), id="upside down"),
        pytest.param(90.0, NO, NO, lambda x: x.rot90(1, (2, 3)), id="a quarter turn"),
        pytest.param(90.0, YES, NO, lambda x: x.rot90(1, (2, 3)).flip(3), id="turned, then mirrored"),
    ],
)
def test_warp(
    images: Tensor, degrees: float, mirrored: Tensor, upside_down: Tensor, expected: Callable[[Tensor], Tensor]
) -> None:
    out = warp(images[:4], whole(4), torch.full((4,), degrees), mirrored, upside_down)
    assert torch.allclose(out, expected(images[:4]).float(), atol=0.1)


def test_a_crop_is_brought_to_full_size() -> None:
    pixels = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    pixels[..., 4:, :4] = 200  # the quarter below left
    out = warp(pixels, torch.tensor([[0.5, 0.5, -0.5, 0.5]]), torch.zeros(1), NO[:1], NO[:1])
    assert (out[..., 1:, :7] == 200).all()


def test_crops_lie_within_the_image_and_differ() -> None:
    width, height, x, y = seeded(lambda: random_crops(500)).unbind(1)
    area = width * height
    assert 0.3 < area.min() <= area.max() <= 1
    assert (x.abs() + width).max() <= 1 + 1e-6
    assert (y.abs() + height).max() <= 1 + 1e-6
    assert area.std() > 0.1


def test_jitter_keeps_gray_gray_and_the_range() -> None:
    gray = torch.full((50, 3, 4, 4), 200.0)
    out = seeded(lambda: jitter(gray))
    assert torch.allclose(out[:, 0], out[:, 2], atol=1e-3)
    assert 159 <= out.min() <= out.max() <= 255
    assert out.std() > 5


def test_flip_changes_whom_it_should(images: Tensor) -> None:
    which = torch.tensor([True, False])
    out = flip(images[:2], which, which)
    assert torch.equal(out, torch.stack([images[0].flip(1, 2), images[1]]))


# Presets


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_preset_keeps_shape_and_range_and_follows_the_seed(images: Tensor, preset: str, channels: int) -> None:
    chosen, mirrored = settings(augmentation=preset), flips(8, 0, 1)
    out, again = (seeded(lambda: augment(images[:8, :channels], mirrored, chosen)) for _ in range(2))
    assert out.shape == (8, channels, 32, 32)
    assert torch.equal(out, again)
    assert 0 <= out.min() <= out.max() <= 255


@pytest.mark.parametrize("preset", ["light", "standard", "trivial", "randaugment"])
def test_the_images_of_a_batch_are_changed_differently(images: Tensor, preset: str) -> None:
    alike = images[:1].repeat(16, 1, 1, 1)
    out = seeded(lambda: augment(alike, torch.zeros(16, dtype=torch.bool), settings(augmentation=preset, hflip=False)))
    assert len({image.numpy().tobytes() for image in out}) > 4


def test_the_switches(images: Tensor) -> None:
    four = images[:4]
    assert torch.equal(augment(four, YES, settings()), four)  # hflip is off where nothing is asked for
    assert torch.equal(augment(four, YES, settings(hflip=True)), four.flip(3))
    turned = seeded(lambda: augment(four, NO, settings(rotation=20)))
    assert (turned.dtype, torch.equal(turned, four.float())) == (torch.float32, False)


def test_vflip_turns_about_half_of_them(images: Tensor) -> None:
    out = seeded(lambda: augment(images, flips(64, 0, 1), settings(vflip=True)))
    turned = sum(torch.equal(after, before.flip(1)) for before, after in zip(images, out, strict=True))
    assert 16 < turned < 48


def test_copies_are_images_with_hashes_of_their_own(images: Tensor) -> None:
    one, digests = augmented_copy(images, settings(augmentation="standard"), number=1)
    again, same = augmented_copy(images, settings(augmentation="standard"), number=1)
    _, others = augmented_copy(images, settings(augmentation="standard"), number=2)
    assert (one.dtype, one.shape, len(set(digests)), len(digests[0])) == (torch.uint8, images.shape, 64, 16)
    assert torch.equal(one, again)
    assert (digests == same, digests == others) == (True, False)


# Mixing


@pytest.mark.parametrize(
    ("chosen", "mixed"),
    [
        pytest.param({"mixup": 0.5}, True, id="mixup"),
        pytest.param({"cutmix": 1.0}, True, id="cutmix"),
        pytest.param({"mixup": 0.5, "cutmix": 1.0}, True, id="either"),
        pytest.param({}, False, id="neither"),
    ],
)
def test_mixed_labels_are_shares(images: Tensor, chosen: dict[str, Any], mixed: bool) -> None:
    labels = torch.arange(64) % 4
    torch.manual_seed(1)
    out, shares = mix(images.float(), labels, 4, settings(**chosen))
    assert torch.equal(out, images.float()) is not mixed
    assert shares.shape == ((64, 4) if mixed else (64,))
    assert not mixed or torch.allclose(shares.sum(dim=1), torch.ones(64))


def test_light_does_without_torchvision() -> None:
    code = "import sys, models.training.network.trainer; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
